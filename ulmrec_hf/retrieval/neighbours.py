"""What retrievers by neighbouring items share: a sparse matrix of item-to-item weights, and scoring by the history."""

from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np
import torch
from scipy import sparse

from ..tables import Sequences
from .base import CountingRetriever, RetrieverConfig
from .topk import hide

_POPULARITY_SHARE = 1e-6  # far below any weight that matters: orders items that no history item leads to
_FLOOR = 0.01  # on the log scale, the share of the best item's score that every item gets


class NeighbourConfig(RetrieverConfig):
    """The config of every `NeighbourRetriever`; `recency` is in [0, 1], and at 0 only the newest item counts."""

    recency: float = 0.6


class NeighbourRetriever(CountingRetriever):
    """Scores item j after the history h_1..h_n by sum_i recency^(n - i) * W[h_i, j], W sparse.

    Items that no history item leads to follow in the order of their popularity.
    """

    config_class = NeighbourConfig
    array_names = ("counts", "data", "indices", "indptr")

    def __init__(self, config: NeighbourConfig, arrays: dict[str, np.ndarray]):
        super().__init__(config, arrays)
        size = config.num_items + 1
        self.weights = sparse.csr_array((arrays["data"], arrays["indices"], arrays["indptr"]), shape=(size, size))

    @classmethod
    def from_weights(cls, config: NeighbourConfig, weights: sparse.csr_array, counts: np.ndarray) -> Self:
        """A retriever with these weights, csr [num_items + 1, num_items + 1], and counts, int64 [num_items + 1]."""
        weights.sort_indices()
        arrays = {
            "counts": counts,
            "data": weights.data.astype(np.float32),
            "indices": weights.indices.astype(np.int32),
            "indptr": weights.indptr.astype(np.int64),
        }
        return cls(config, arrays)

    def refit(self, sequences: Sequences) -> "NeighbourRetriever":
        """See `Retriever.refit`; here the counts that order the items without a neighbour in the history."""
        return type(self)(self.config, self.arrays | {"counts": sequences.counts()})

    def score(self, histories: Iterable[Sequence[int]]) -> torch.Tensor:
        """Weighted neighbours of the history, float32 [batch, num_items + 1]; see `Retriever.score`."""
        scores = self._led_to(histories).toarray()
        scores += self._popularity()
        return hide(torch.from_numpy(scores))

    def log_scores(self, histories: Iterable[Sequence[int]]) -> torch.Tensor:
        """log(1 + score / (floor * the best of the row)): what nothing leads to is unlikely, not impossible."""
        found, popularity = self._led_to(histories), self._popularity()
        lengths = np.diff(found.indptr)
        some = np.flatnonzero(lengths)
        # logs are expensive: taken only where there is a neighbour; all others get almost 0, in order of popularity
        found.data += popularity[found.indices]
        best = np.maximum.reduceat(found.data, found.indptr[some]) if len(some) else np.ones(0, np.float32)
        best = np.maximum(best, 1e-30)
        found.data = np.log1p(found.data / np.repeat(_FLOOR * best, lengths[some]))
        scores = found.toarray()
        scores += popularity
        scores[lengths == 0] = np.log1p(popularity / (_FLOOR * max(popularity.max(), 1e-30)))
        return hide(torch.from_numpy(scores))

    def _popularity(self) -> np.ndarray:
        counts = self.arrays["counts"]
        return (_POPULARITY_SHARE / max(counts.max(), 1) * counts).astype(np.float32)

    def _led_to(self, histories: Iterable[Sequence[int]]) -> sparse.csr_array:
        """float32 csr [batch, num_items + 1]: the weighted neighbours alone."""
        newest = self.newest_items(histories)
        lengths = [len(items) for items in newest]
        steps_back = np.concatenate([np.arange(n - 1, -1, -1) for n in lengths] or [np.empty(0)])
        rows = sparse.csr_array(
            (
                (self.config.recency**steps_back).astype(np.float32),
                np.concatenate([*newest, np.empty(0, np.int64)]),
                np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            ),
            shape=(len(newest), self.config.num_items + 1),
        )
        return rows @ self.weights
