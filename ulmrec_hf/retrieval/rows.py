"""The rows that neural retrievers train and validate on, and how they are batched and padded."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..protocol import MIN_ITEMS
from ..tables import Sequences
from .topk import seen_places


class TrainingRows(Dataset):
    """Rows of at most `max_history` inputs from the train part; every item but a user's first is a label once."""

    def __init__(self, train: Sequences, max_history: int):
        self.items = train.items
        starts, ends = [], []
        for begin, end in zip(train.offsets[:-1].tolist(), train.offsets[1:].tolist(), strict=True):
            for last in range(end, begin + 1, -max_history):
                starts.append(max(begin, last - max_history - 1))
                ends.append(last)
        if not starts:
            raise ValueError(
                "no user has two items in the train part, so there is no transition to learn from: "
                "use the retriever 'popularity', or data with longer sequences."
            )
        self.starts, self.ends = np.array(starts), np.array(ends)
        self.lengths = (self.ends - self.starts - 1).tolist()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = self.items[self.starts[index] : self.ends[index]]
        return {"input_ids": row[:-1], "labels": row[1:]}


class ValidationRows(Dataset):
    """One row per user with a train part and a validation target: the former, and the latter; short rows first."""

    def __init__(self, sequences: Sequences, max_history: int):
        self.sequences, self.max_history = sequences, max_history
        users = np.flatnonzero(sequences.lengths >= MIN_ITEMS)
        self.users = users[np.argsort(sequences.lengths[users], kind="stable")]

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> dict[str, Any]:
        *history, target, _ = self.sequences[self.users[index]].tolist()
        return {"input_ids": history[-self.max_history :], "history": history, "target": target}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pads training or validation rows to the longest of the batch.

    Returns:
        `input_ids`, int64 [batch, longest]; for training `labels` of the same shape, 0 where there is none; for
        validation `target`, int64 [batch], and `seen`, int64 [n, 2], the places (row, item) that are not ranked.
    """
    batch = {"input_ids": pad_right([row["input_ids"] for row in rows])}
    if "labels" in rows[0]:
        return batch | {"labels": pad_right([row["labels"] for row in rows])}
    return batch | {
        "seen": seen_places([row["history"] for row in rows]),
        "target": torch.tensor([row["target"] for row in rows]),
    }


class EqualBatches(Sampler[list[int]]):
    """Batches of rows of similar length, each with about the same number of labels, in random order.

    Rows of one length need no padding. With equally many rows per batch, a label in a batch of short rows would count
    for more. `lengths` are the labels of each row, `batch_size` is the mean number of rows.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int):
        self.lengths = np.asarray(lengths)
        labels = np.cumsum(np.sort(self.lengths))
        # a row belongs to the batch that its last label falls into
        self.ends = np.flatnonzero(np.diff((labels - 1) // (batch_size * self.lengths.mean()))) + 1

    def __len__(self) -> int:
        return len(self.ends) + 1

    def __iter__(self) -> Iterator[list[int]]:
        order = np.lexsort((torch.rand(len(self.lengths)).numpy(), self.lengths))
        batches = np.split(order, self.ends)
        return (batches[batch].tolist() for batch in torch.randperm(len(batches)).tolist())


def pad_right(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """int64 [rows, longest], padded on the right with 0, at least one column wide."""
    padded = np.zeros((len(rows), max(1, *(len(row) for row in rows), 1)), dtype=np.int64)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return torch.from_numpy(padded)
