"""Rows to batches: loss on the completion only, padding on the left."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that carries no loss


def tokenize_rows(dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase", *, evaluation: bool = False) -> "Dataset":
    """Tokenises a dataset's prompts and completions once, so that a training step only pads.

    Args:
        dataset: columns prompt and completion; for evaluation prompt, label and candidates.

    Returns:
        For training: input_ids (prompt, completion, end token), completion_length (the end token counted), length, and
        task where the dataset has it.
        For evaluation: input_ids (the prompt), label, num_candidates, length. `length` serves grouping by length.
    """
    return dataset.map(
        tokenize_batch,
        batched=True,
        remove_columns=[name for name in dataset.column_names if name != "task" or evaluation],
        fn_kwargs={"tokenizer": tokenizer, "evaluation": evaluation},
        desc="Tokenizing",
    )


def tokenize_batch(
    rows: Mapping[str, Sequence], tokenizer: "PreTrainedTokenizerBase", evaluation: bool = False
) -> dict[str, list]:
    """`tokenize_rows` for a dict of columns.

    Prompt and completion are tokenised as one text, because a letter alone may be another token than the same letter
    after the prompt (Llama-2: 319 and 29909). The prompt's own tokens must be the beginning of that text's tokens: they
    are what a model sees when it answers.

    Raises:
        ValueError: the tokenizer has no end token, or joins the end of a prompt with the beginning of its completion.
    """
    prompts = list(rows["prompt"])
    prompt_ids = tokenizer(prompts, verbose=False)["input_ids"] if prompts else []
    if evaluation:
        return {
            "input_ids": prompt_ids,
            "label": list(rows["label"]),
            "num_candidates": [len(candidates) for candidates in rows["candidates"]],
            "length": [len(ids) for ids in prompt_ids],
        }
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(f"The tokenizer {tokenizer.name_or_path!r} has no end token (eos_token): set one.")
    texts = [prompt + completion for prompt, completion in zip(prompts, rows["completion"], strict=True)]
    joint_ids = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    for prompt, completion, before, joint in zip(prompts, rows["completion"], prompt_ids, joint_ids, strict=True):
        if joint[: len(before)] != before:
            raise ValueError(
                f"The tokenizer {tokenizer.name_or_path!r} tokenises a prompt that ends in {prompt[-20:]!r} "
                f"differently when the completion {completion[:20]!r} follows: end the prompt template with a newline, "
                "and use a tokenizer that adds no end token by itself."
            )
    return {
        "input_ids": [[*joint, end] for joint in joint_ids],
        "completion_length": [
            len(joint) + 1 - len(before) for before, joint in zip(prompt_ids, joint_ids, strict=True)
        ],
        "length": [len(joint) + 1 for joint in joint_ids],
    }


class ULMRecCollator:
    """Batches of tokenised rows (`tokenize_rows`), or of training rows that still are text.

    Rows that hold `num_candidates` make an evaluation batch, all others a training batch. Padding is on the left, so
    that the last position is every row's answer position. `position_ids` count each row's own tokens, which models with
    learned positions need.

    A training batch holds `labels` [batch, k] and `logits_to_keep` = k, where k is the longest completion and its end
    token plus one: the model computes logits at the last k positions only, since no other carries loss. With
    `task_weights` it also holds `weights`, float32 [batch].
    An evaluation batch holds `labels` [batch], the target's place among the candidates (-1 = a miss), and
    `num_candidates` [batch]. All others are int64.

    Args:
        tokenizer: pads.
        task_weights: how much a row counts, by the number in its column `task`.

    Raises:
        ValueError: the tokenizer has no pad token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", task_weights: Sequence[float] | None = None):
        if tokenizer.pad_token_id is None:
            raise ValueError(f"The tokenizer {tokenizer.name_or_path!r} has no pad token: set pad_token.")
        self.tokenizer, self.task_weights = tokenizer, task_weights

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if "input_ids" not in rows[0]:
            columns = tokenize_batch({name: [row[name] for row in rows] for name in rows[0]}, self.tokenizer)
            tokenised = zip(*columns.values(), strict=True)
            joined = zip(rows, tokenised, strict=True)
            rows = [{**row, **dict(zip(columns, values, strict=True))} for row, values in joined]
        sequences = [row["input_ids"] for row in rows]
        longest = max(map(len, sequences))
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (longest - len(ids)) + list(ids) for ids in sequences])
        attention_mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in sequences])
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
        }
        if "num_candidates" in rows[0]:
            batch["labels"] = torch.tensor([row["label"] for row in rows])
            batch["num_candidates"] = torch.tensor([row["num_candidates"] for row in rows])
            return batch
        lengths = torch.tensor([row["completion_length"] for row in rows])
        keep = int(lengths.max()) + 1
        # by position, never by the pad token's id, which may be the end token's
        outside = torch.arange(keep) < keep - lengths[:, None]
        batch["labels"] = input_ids[:, -keep:].masked_fill(outside, IGNORED)
        batch["logits_to_keep"] = keep
        if self.task_weights is not None:
            batch["weights"] = torch.tensor([float(self.task_weights[row["task"]]) for row in rows])
        return batch
