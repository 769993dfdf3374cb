import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.byte_bpe import byte_bpe
from tests.tiny_llama import make_base
from ulmrec_hf import ULMRecTrainer, ULMRecTrainingArguments, UserIndex, UserRanker, load_base
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


# ---------------------------------------------------------------- the letters' logits

USERS = UserIndex(["u1", "u2"], np.array([[1, 2], [3, 4]]), 8)
ASKED = ["### User:\n<a_1><b_2>\n### Answer:\n", *(f"{number} red soap\n### Answer:\n" for number in range(40))]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {tied: make_base(tmp_path_factory.mktemp("bases") / str(tied), tied=tied) for tied in (True, False)}


def batch_of(tokenizer) -> dict[str, torch.Tensor]:
    batch = tokenizer(ASKED, padding=True, padding_side="left", return_tensors="pt")
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def ties(scores: torch.Tensor) -> float:
    """The share of rows in which two letters tie."""
    return np.mean([len(set(row)) < len(row) for row in scores.tolist()])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("computed", ["bfloat16", "autocast", "no adapter", "soft caps"])
def test_letter_logits_are_float32_products_without_ties(computed, tied, bases):
    dtype = "float32" if computed == "autocast" else "bfloat16"
    model, tokenizer = load_base(str(bases[tied]), USERS, use_peft=computed != "no adapter", dtype=dtype)
    model.eval()
    if computed == "autocast":
        model.autocast = "bfloat16"
    head, capped = model.get_output_embeddings(), lambda logits: logits
    if computed == "soft caps":  # as Gemma 2 does after its output layer
        plain, capped = model.get_base_model(), lambda logits: 3 * torch.tanh(logits / 3)
        forward = plain.forward

        def cap(**inputs):
            output = forward(**inputs)
            output.logits = capped(output.logits)
            return output

        plain.forward = cap
    seen = []
    hook = head.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    verbalizer = LetterVerbalizer(tokenizer, "### Answer:\n", 52)
    scores = verbalizer.scores(model, batch_of(tokenizer))
    hook.remove()
    hidden, own = seen[0]
    assert own.dtype == torch.bfloat16 and ties(own[:, -1, verbalizer.ids].float()) > 0.1
    assert scores.dtype == torch.float32 and scores.shape == (41, 52) and not scores.requires_grad
    assert ties(scores) == 0
    expected = capped(hidden[:, -1].float() @ head.weight[verbalizer.ids].float().T)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    assert not head._forward_hooks  # nothing is left on the model


def test_an_output_layer_with_lora_keeps_its_own_product(bases):
    model, tokenizer = load_base(str(bases[False]), lora_target_modules=["q_proj", "lm_head"])
    torch.nn.init.normal_(model.get_output_embeddings().lora_B["default"].weight)
    verbalizer, batch = LetterVerbalizer(tokenizer, "### Answer:\n", 5), batch_of(tokenizer)
    with torch.no_grad():
        expected = model.eval()(**batch).logits[:, -1, verbalizer.ids]
    torch.testing.assert_close(verbalizer.scores(model, batch), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_trainer_and_ranker_give_the_same_bits(dtype, bases, tmp_path):
    model, tokenizer = load_base(str(bases[True]), USERS, dtype=dtype)
    args = {"use_cpu": True, "bf16": dtype == "float32", "eval_strategy": "no", "load_best_model_at_end": False}
    args |= {"per_device_eval_batch_size": len(ASKED), "disable_tqdm": True}
    trainer = ULMRecTrainer(model, ULMRecTrainingArguments(str(tmp_path), **args), processing_class=tokenizer)
    rows = {"prompt": ASKED, "label": [0] * len(ASKED), "candidates": [list(range(20))] * len(ASKED)}
    scores = trainer.rank(Dataset.from_dict(rows))
    ranker = UserRanker(trainer.accelerator.unwrap_model(trainer.model), tokenizer)
    assert (ranker.scores(ASKED, 20, batch_size=len(ASKED)) == scores).all()


@pytest.mark.data
def test_llama_2_letters_are_read_in_context(shared):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shared / "models" / "llama2_tokenizer")
    ids = LetterVerbalizer(tokenizer, PROMPT, 52).ids
    assert ids[0] == 29909
    assert tokenizer("A", add_special_tokens=False)["input_ids"] == [319]
    assert tokenizer.convert_ids_to_tokens(ids) == list(LETTERS)
    with pytest.raises(ValueError, match="letters are not single tokens"):
        LetterVerbalizer(tokenizer, "### Response: ", 2)
