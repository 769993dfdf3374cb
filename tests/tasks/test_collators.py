"""Collation: which tokens carry loss, where the padding is, and that the loss is the exact one."""

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.byte_bpe import byte_bpe
from ulmrec_hf.tasks.collators import ULMRecCollator, tokenize_rows
from ulmrec_hf.tokenization_user import UserTokenizer

ROWS = [
    {"prompt": "### User:\n<a_0><b_1>\n### Answer:\n", "completion": "B", "candidates": [4, 5], "label": 1},
    {"prompt": "a much longer question\n### Answer:\n", "completion": "likes red", "candidates": [], "label": -1},
    {"prompt": "who?\n", "completion": "<a_1><b_0>", "candidates": [], "label": -1},
    {"prompt": "nothing found\n", "completion": "", "candidates": [1, 2, 3], "label": -1},
]


@pytest.fixture(scope="module")
def tokenizer() -> UserTokenizer:
    return UserTokenizer.from_base(byte_bpe(end="<|end|>", use_regex=False), levels=2, codebook_size=4)


@pytest.fixture(scope="module")
def llama(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval()


def _supervised(labels):
    return [row[row != -100].tolist() for row in labels]


def test_labels_are_the_completion_and_the_end_token(tokenizer):
    batch = ULMRecCollator(tokenizer)(ROWS)
    end = tokenizer.eos_token_id
    assert _supervised(batch["labels"]) == [
        [*tokenizer("B")["input_ids"], end],
        [*tokenizer("likes red")["input_ids"], end],
        [*tokenizer.encode_user((1, 0)), end],
        [end],
    ]
    assert batch["logits_to_keep"] == len("likes red") + 2
    assert batch["labels"].shape == (4, batch["logits_to_keep"])
    # the pad token is the end token here, and padding carries no loss all the same
    assert tokenizer.pad_token_id == end


def test_padding_is_on_the_left_and_positions_count_own_tokens(tokenizer):
    batch = ULMRecCollator(tokenizer)(ROWS)
    for row, ids, mask, positions in zip(
        ROWS, batch["input_ids"], batch["attention_mask"], batch["position_ids"], strict=True
    ):
        own = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        padding = len(ids) - len(own)
        assert ids.tolist() == [tokenizer.pad_token_id] * padding + own
        assert mask.tolist() == [0] * padding + [1] * len(own)
        assert positions.tolist() == [0] * padding + list(range(len(own)))


def test_the_loss_equals_that_over_all_logits(tokenizer, llama):
    batch = ULMRecCollator(tokenizer)(ROWS)
    with torch.no_grad():
        output = llama(**batch)
        full = batch["labels"].new_full(batch["input_ids"].shape, -100)
        full[:, -batch["logits_to_keep"] :] = batch["labels"]
        expected = llama(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"],
            labels=full,
        )
    assert output.logits.shape[1] == batch["logits_to_keep"] < expected.logits.shape[1]
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-6, atol=1e-6)


def test_the_loss_equals_that_of_rows_without_padding(tokenizer, llama):
    collate = ULMRecCollator(tokenizer)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in ROWS:
            ids = tokenizer(row["prompt"] + row["completion"], return_tensors="pt")["input_ids"]
            ids = torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], dim=1)
            begin = len(tokenizer(row["prompt"])["input_ids"])
            logits = llama(input_ids=ids).logits[0, begin - 1 : -1]
            total += torch.nn.functional.cross_entropy(logits, ids[0, begin:], reduction="sum").item()
            count += ids.shape[1] - begin
        loss = llama(**collate(ROWS)).loss.item()
    assert loss == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_row_s_answer_logits_do_not_depend_on_its_batch(tokenizer, llama, kind):
    model = llama
    if kind == "gpt2":  # learned positions: padding would shift them but for position_ids
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128)
        model = GPT2LMHeadModel(config).eval()
    rows = list(tokenize_rows(Dataset.from_list(ROWS), tokenizer, evaluation=True))
    collate = ULMRecCollator(tokenizer)
    inputs = ("input_ids", "attention_mask", "position_ids")
    with torch.no_grad():
        batch = collate(rows)
        together = model(**{name: batch[name] for name in inputs}).logits[:, -1]
        for row, logits in zip(rows, together, strict=True):
            batch = collate([row])
            alone = model(**{name: batch[name] for name in inputs}).logits[0, -1]
            torch.testing.assert_close(alone, logits, rtol=1e-4, atol=1e-4)


def test_evaluation_batches_hold_the_prompt_alone(tokenizer):
    rows = tokenize_rows(Dataset.from_list(ROWS), tokenizer, evaluation=True)
    batch = ULMRecCollator(tokenizer)(list(rows))
    assert set(batch) == {"input_ids", "attention_mask", "position_ids", "labels", "num_candidates"}
    assert batch["labels"].tolist() == [1, -1, -1, -1]
    assert batch["num_candidates"].tolist() == [2, 0, 0, 3]
    for row, ids, mask in zip(ROWS, batch["input_ids"], batch["attention_mask"], strict=True):
        assert ids[mask.bool()].tolist() == tokenizer(row["prompt"])["input_ids"]


def test_tokenised_rows_give_the_same_batch_as_text(tokenizer):
    rows = [{**row, "task": number % 2} for number, row in enumerate(ROWS)]
    dataset = tokenize_rows(Dataset.from_list(rows), tokenizer)
    assert set(dataset.column_names) == {"input_ids", "completion_length", "length", "task"}
    assert dataset["length"][:] == [len(ids) for ids in dataset["input_ids"]]
    collate = ULMRecCollator(tokenizer, task_weights=[1.0, 3.0])
    first, second = collate(list(dataset)), collate(rows)
    assert first["weights"].tolist()[:2] == [1.0, 3.0]
    for name, value in first.items():
        assert torch.equal(value, second[name]) if torch.is_tensor(value) else value == second[name]


def test_a_letter_is_the_token_that_it_is_after_the_prompt():
    # here " A" and "A" are two tokens, and so are they in context
    base = byte_bpe(merges=[("Ġ", "A")], end="<|end|>", use_regex=False)
    tokenizer = UserTokenizer.from_base(base, levels=1, codebook_size=2)
    batch = ULMRecCollator(tokenizer)([{"prompt": "is:", "completion": " A"}])
    assert _supervised(batch["labels"]) == [[tokenizer.convert_tokens_to_ids("ĠA"), tokenizer.eos_token_id]]


def test_a_completion_that_merges_with_the_prompt_is_refused():
    base = byte_bpe(merges=[(":", "A")], end="<|end|>", use_regex=False)
    tokenizer = UserTokenizer.from_base(base, levels=1, codebook_size=2)
    with pytest.raises(ValueError, match=r"differently when the completion 'A' follows: end the prompt template"):
        ULMRecCollator(tokenizer)([{"prompt": "Answer:", "completion": "A"}])


def test_missing_tokens_are_refused():
    bare = byte_bpe(end=None, use_regex=False)
    with pytest.raises(ValueError, match="has no pad token: set pad_token"):
        ULMRecCollator(bare)
    bare.add_special_tokens({"pad_token": "<pad>"})
    with pytest.raises(ValueError, match="has no end token"):
        ULMRecCollator(bare)([ROWS[0]])
