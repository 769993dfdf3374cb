import pytest

from tests.retrieval.world import item_ids, make_lists
from ulmrec_hf.tables import Sequences


@pytest.fixture(scope="session")
def sequences() -> Sequences:
    return Sequences.from_lists(make_lists(), item_ids())
