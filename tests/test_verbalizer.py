import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.byte_bpe import byte_bpe
from ulmrec_hf.verbalizer import LETTERS, LetterVerbalizer

PROMPT = "### Candidates:\nA. soap\nB. brush\n\n### Response:\n"


def byte_level(*merged: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that also holds the `merged` strings as whole tokens."""
    return byte_bpe(added=merged, use_regex=False)


def words(*known: str) -> PreTrainedTokenizerFast:
    """A whitespace tokenizer: what is not `known` is unknown."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", *known])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_letters_are_upper_then_lower_case():
    assert LETTERS == "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize("count", [1, 20, 52])
def test_ids_follow_the_prompt(count):
    tokenizer = byte_level()
    verbalizer = LetterVerbalizer(tokenizer, PROMPT, count)
    assert len(set(verbalizer.ids)) == count
    assert tokenizer.convert_ids_to_tokens(verbalizer.ids) == list(LETTERS[:count])


def test_scores_are_the_letters_logits_in_float32():
    verbalizer = LetterVerbalizer(byte_level(), PROMPT, 5)
    logits = torch.randn(3, 256, dtype=torch.bfloat16)
    scores = verbalizer.scores(logits)
    assert scores.shape == (3, 5)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores[:, 2], logits[:, verbalizer.ids[2]].float())


def test_a_letter_that_merges_with_the_end_of_the_prompt():
    with pytest.raises(ValueError, match=r"letters are not single tokens .* the letter 'C' becomes"):
        LetterVerbalizer(byte_level("\nC"), PROMPT, 4)
    assert len(LetterVerbalizer(byte_level("\nC"), PROMPT, 2).ids) == 2


def test_a_letter_of_several_tokens():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("B", "BB")
    tokenizer.name_or_path = "my/base"
    with pytest.raises(ValueError, match=r"letters are not single tokens of the tokenizer 'my/base': .* letter 'B'"):
        LetterVerbalizer(tokenizer, PROMPT, 2)


def test_letters_that_share_the_unknown_token():
    tokenizer = words("Answer", ":", "A", "B")
    assert LetterVerbalizer(tokenizer, "Answer :", 2).ids == [3, 4]
    with pytest.raises(ValueError, match="the letter 'C' has the id 0, which is the unknown token"):
        LetterVerbalizer(tokenizer, "Answer :", 3)


def test_letters_that_are_folded_together():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert len(LetterVerbalizer(tokenizer, PROMPT, 26).ids) == 26
    with pytest.raises(ValueError, match=r"the letter 'a' has the id .* another letter's"):
        LetterVerbalizer(tokenizer, PROMPT, 27)


@pytest.mark.parametrize("count", [0, 53])
def test_more_candidates_than_letters(count):
    with pytest.raises(ValueError, match=f"num_candidates must be 1 to 52.*got {count}"):
        LetterVerbalizer(byte_level(), PROMPT, count)


@pytest.mark.data
def test_llama_2_letters_are_read_in_context(shared):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shared / "models" / "llama2_tokenizer")
    ids = LetterVerbalizer(tokenizer, PROMPT, 52).ids
    assert ids[0] == 29909
    assert tokenizer("A", add_special_tokens=False)["input_ids"] == [319]
    assert tokenizer.convert_ids_to_tokens(ids) == list(LETTERS)
    with pytest.raises(ValueError, match="letters are not single tokens"):
        LetterVerbalizer(tokenizer, "### Response: ", 2)
