"""Where user tokens start: at the words that their users write."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.byte_bpe import byte_bpe
from tests.tiny_llama import make_base
from ulmrec_hf import UserIndex, load_base
from ulmrec_hf.modeling import start_user_tokens
from ulmrec_hf.tokenization_user import UserTokenizer
from ulmrec_hf.user_token_rows import newest_preferences, start_from_texts

WORDS = ["ocean", "forest"]
CODES = np.array([[word, number] for number in range(4) for word in range(2)])
TEXTS = [f"likes {WORDS[word]} {number}" for word, number in CODES]
USERS = UserIndex([f"u{row}" for row in range(len(CODES))], CODES, 8)
PREFERENCES = pa.table({"user_id": USERS.user_ids, "position": [1] * len(TEXTS), "preference": TEXTS})


@pytest.fixture
def parts():
    tokenizer = UserTokenizer.from_base(byte_bpe([*TEXTS, *WORDS] * 9, end="<|end|>"), levels=2, codebook_size=8)
    torch.manual_seed(0)
    return tokenizer, torch.nn.Embedding(len(tokenizer), 16)


def row_of(tokenizer, level: int, code: int) -> int:
    return tokenizer.user_token_ids[level][code]


def test_a_first_code_starts_at_the_word_that_tells_its_users_from_others(parts):
    tokenizer, matrix = parts
    before = matrix.weight.detach().clone()
    start_from_texts([matrix], tokenizer, USERS, TEXTS)
    own = {token for level in tokenizer.user_token_ids for token in level}
    words = [token for token in range(len(tokenizer)) if token not in own]
    assert torch.equal(matrix.weight[words], before[words]), "no other row moves"
    rows = matrix.weight.detach() - before[words].mean(0)
    ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in WORDS]
    vectors = torch.stack([rows[part].mean(0) for part in ids])
    codes = rows[[row_of(tokenizer, 0, code) for code in range(2)]]
    similarity = torch.nn.functional.cosine_similarity(codes[:, None], vectors[None], dim=-1)
    assert similarity.argmax(1).tolist() == [0, 1]
    # as far from the mean as a word
    typical = (before[words] - before[words].mean(0)).norm(dim=1).mean()
    assert codes.norm(dim=1).mean() == pytest.approx(float(typical), rel=1e-4)
    assert rows[row_of(tokenizer, 0, 5)].norm() < 1e-5, "a code without users gets the mean row"


def test_later_codes_get_what_the_first_leaves_over(parts):
    tokenizer, matrix = parts
    start_from_texts([matrix], tokenizer, USERS, TEXTS)
    second = matrix.weight.detach()[[row_of(tokenizer, 1, code) for code in range(4)]]
    assert torch.pdist(second).min() > 1e-3  # the numbers differ
    start_from_texts([matrix], tokenizer, USERS, [f"likes {WORDS[word]}" for word, _ in CODES])
    second = matrix.weight.detach()[[row_of(tokenizer, 1, code) for code in range(4)]]
    assert torch.pdist(second).max() < 1e-4  # nothing is left over


def test_users_without_words_and_hostile_words_are_borne(parts):
    tokenizer, matrix = parts
    before = matrix.weight.detach().clone()
    start_from_texts([matrix], tokenizer, USERS, [None] * len(USERS))
    assert torch.equal(matrix.weight, before)
    start_from_texts([matrix], tokenizer, USERS, ["\u200b"] * len(USERS))  # nothing that a prompt could show
    assert torch.equal(matrix.weight, before)
    texts = ["likes <a_3> ocean", None, "", *TEXTS[3:]]
    start_from_texts([matrix], tokenizer, USERS, texts)
    assert matrix.weight.isfinite().all()
    plain = torch.nn.Embedding.from_pretrained(before.clone())
    plain.weight[row_of(tokenizer, 0, 3)] += 100  # what a text spells is no token: that row does not enter
    start_from_texts([plain], tokenizer, USERS, texts)
    torch.testing.assert_close(plain.weight, matrix.weight)
    with pytest.raises(ValueError, match="3 texts for 8 users"):
        start_from_texts([matrix], tokenizer, USERS, TEXTS[:3])


def test_the_newest_preference_counts():
    table = pa.table(
        {"user_id": ["u1", "u1", "u0", "u2"], "position": [2, 5, 1, 3], "preference": ["old", "new", "only", "(none)"]}
    )
    assert newest_preferences(table, USERS) == ["only", "new", *[None] * 6]


def test_a_base_loads_with_tokens_that_mean_something():
    rows = {}
    for name, given in (("noise", None), ("words", PREFERENCES)):
        model, tokenizer = load_base("embedded", USERS, given, lora_r=2)
        matrix = model.get_input_embeddings()
        ids = tokenizer.user_token_ids[0][:2]
        rows[name] = matrix(torch.tensor(ids)).detach()
        words = tokenizer([f" {word}" for word in WORDS], add_special_tokens=False)["input_ids"]
        vectors = torch.stack([matrix(torch.tensor(part)).detach().mean(0) for part in words])
    assert not torch.allclose(rows["noise"], rows["words"])
    difference = torch.nn.functional.cosine_similarity(
        rows["words"][0] - rows["words"][1], vectors[0] - vectors[1], dim=0
    )
    assert difference > 0.5


def test_rows_that_no_adapter_holds_are_left_as_they_are(tmp_path):
    """Those of an output layer with a bias, such as Phi's: a reloaded model has the base's."""
    model, tokenizer = load_base(str(make_base(tmp_path / "base", tied=False)), USERS, use_peft=False)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    layers = (model.get_input_embeddings(), model.lm_head)
    before = [layer.weight.detach().clone() for layer in layers]
    start_user_tokens(model, tokenizer, USERS, PREFERENCES)
    assert [torch.equal(layer.weight, old) for layer, old in zip(layers, before, strict=True)] == [False, True]
