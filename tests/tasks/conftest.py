import pytest

from tests.byte_bpe import byte_bpe
from tests.tasks.world import World, make_world
from ulmrec_hf.tasks.rows import TaskRows
from ulmrec_hf.tokenization_user import UserTokenizer


@pytest.fixture(scope="session")
def tokenizer() -> UserTokenizer:
    return UserTokenizer.from_base(byte_bpe(end="<|end|>"), levels=4, codebook_size=8)


@pytest.fixture(scope="session")
def plain_tokenizer() -> UserTokenizer:
    """Without user tokens."""
    return UserTokenizer.from_base(byte_bpe(end="<|end|>"), levels=0)


@pytest.fixture(scope="session")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def rows(world, tokenizer) -> TaskRows:
    return world.rows(tokenizer)
