"""Users as batches of vectors: one for each of their newest interactions."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch.utils.data import Dataset

from .embeddings import Embeddings

Table = np.ndarray | Embeddings  # vectors by row, float32 [rows, dim], in memory or on disk


@dataclass(frozen=True)
class Input:
    """One kind of vectors of the interactions.

    Attributes:
        table: the different vectors; they count at length 1, but where they are 0.
        ids: int32 [interactions], the row in `table`, -1 where an interaction has none.
        weight: what the vectors are multiplied by.
    """

    table: Table
    ids: np.ndarray
    weight: float = 1.0


class UserDataset(Dataset):
    """One row a user: the vectors of the newest interactions, and of the id string; read from tables on demand.

    Args:
        inputs: their vectors, at length 1, are weighed and joined; an interaction with none, or zeros, is left out.
        offsets: int64 [users + 1]; user u has the interactions `offsets[u]` to `offsets[u + 1]`, oldest first.
        user_ids: a row for each user's id string; None where it is not read.
        max_reviews: how many of the newest interactions are used.
    """

    def __init__(self, inputs: Sequence[Input], offsets: np.ndarray, user_ids: Table | None, max_reviews: int):
        known = np.any([part.ids >= 0 for part in inputs], axis=0)
        self.inputs = [replace(part, ids=part.ids[known]) for part in inputs]
        self._offsets, self._places = offsets, np.concatenate([[0], np.cumsum(known, dtype=np.int64)])
        self._users, self._begins, self._ends = np.arange(len(offsets) - 1), *self._places[[offsets[:-1], offsets[1:]]]
        self.user_ids, self.max_reviews = user_ids, max_reviews

    def before(self, users: np.ndarray, positions: np.ndarray) -> Self:
        """Row i is user `users[i]` before the interaction at `positions[i]`, int [rows] each; no vector is copied."""
        prefixes = copy(self)
        prefixes._users, prefixes._begins = self._users[users], self._begins[users]
        prefixes._ends = self._places[self._offsets[users] + positions]
        return prefixes

    def with_table(self, place: int, table: Table) -> Self:
        """The same with other vectors of the input at `place`."""
        other = copy(self)
        other.inputs = [replace(part, table=table) if at == place else part for at, part in enumerate(self.inputs)]
        return other

    @property
    def dim(self) -> int:
        """Length of an interaction's vector."""
        return sum(part.table.shape[1] for part in self.inputs)

    def __len__(self) -> int:
        return len(self._users)

    def __getitem__(self, user: int) -> int:
        return user

    def collate(self, users: Sequence[int]) -> dict[str, torch.Tensor]:
        """The padded batch that `Indexer.pool` takes."""
        users = np.asarray(users)
        ends = self._ends[users]
        counts = np.minimum(ends - self._begins[users], self.max_reviews)
        width = max(1, int(counts.max(initial=0)))
        mask = np.arange(width) < counts[:, None]
        places = (ends - counts)[:, None] + np.arange(width)
        texts = np.zeros((len(users), width, self.dim), np.float32)
        begin = 0
        for part in self.inputs:
            ids = np.full(mask.shape, -1, np.int64)
            ids[mask] = part.ids[places[mask]]
            end = begin + part.table.shape[1]
            texts[ids >= 0, begin:end] = part.weight * unit(part.table[ids[ids >= 0]])
            begin = end
        mask &= texts.any(axis=2)
        ids = np.zeros((len(users), 0), np.float32) if self.user_ids is None else self.user_ids[self._users[users]]
        return {
            "texts": torch.from_numpy(texts),
            "mask": torch.from_numpy(mask),
            "user_ids": torch.from_numpy(np.ascontiguousarray(ids)),
        }


def unit(vectors: np.ndarray) -> np.ndarray:
    """The rows at length 1, float32; zeros stay."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)
