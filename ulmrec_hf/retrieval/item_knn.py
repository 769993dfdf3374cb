"""Sequential item-kNN: what followed, or came shortly before, the items of the history in other users' sequences."""

from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np
import torch
from scipy import sparse

from .base import CountingRetriever, RetrieverConfig, Sequences

_POPULARITY_SHARE = 1e-6  # far below any co-occurrence that counts: it only orders items without one
_FOLD = 1 << 22  # how many pairs are held before they are summed, at least


class ItemKNNConfig(RetrieverConfig):
    """The config of `ItemKNNRetriever`.

    Attributes:
        window: items at most this many steps apart are neighbours.
        backward_weight: weight of the earlier item of a pair as the neighbour of the later one; forward weighs 1.
        recency: weight of a history item for each step back from the newest, in (0, 1].
        popularity_exponent: what a history item leads to is divided by its train count to this power, since an item
            that everybody has tells little.
    """

    model_type = "item_knn"

    window: int = 50
    backward_weight: float = 0.5
    recency: float = 0.6
    popularity_exponent: float = 0.3


class ItemKNNRetriever(CountingRetriever):
    """Scores item j after the history h_1..h_n by sum_i recency^(n - i) * W[h_i, j].

    W[i, j] sums 1 / distance over the pairs where j follows i within the window in a train sequence, plus
    backward_weight / distance where j comes before i, divided by count(i)^popularity_exponent. Items that no history
    item leads to follow in the order of their popularity.
    """

    config_class = ItemKNNConfig
    array_names = ("counts", "data", "indices", "indptr")

    def __init__(self, config: ItemKNNConfig, arrays: dict[str, np.ndarray]):
        super().__init__(config, arrays)
        size = config.num_items + 1
        self.weights = sparse.csr_array((arrays["data"], arrays["indices"], arrays["indptr"]), shape=(size, size))

    @classmethod
    def fit(cls, train: Sequences, *, max_history: int = 50, **settings: float) -> Self:
        """Sums the pairs of `train`, which must be the train part alone; time and memory are linear in its length.

        Args:
            settings: fields of `ItemKNNConfig`.
        """
        config = ItemKNNConfig(
            num_items=train.num_items, catalogue=train.catalogue, max_history=max_history, **settings
        )
        counts = train.counts()
        follows = _sum_pairs(train, config.window)
        weights = (follows + config.backward_weight * follows.T).tocsr()
        weights.data /= np.repeat(np.maximum(counts, 1) ** config.popularity_exponent, np.diff(weights.indptr))
        weights.sort_indices()
        arrays = {
            "counts": counts,
            "data": weights.data.astype(np.float32),
            "indices": weights.indices.astype(np.int32),
            "indptr": weights.indptr.astype(np.int64),
        }
        return cls(config, arrays)

    def score(self, histories: Iterable[Sequence[int]]) -> torch.Tensor:
        """Weighted co-occurrence with the history, float32 [batch, num_items + 1]; see `Retriever.score`."""
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
        scores = (rows @ self.weights).toarray()
        counts = self.arrays["counts"]
        scores += (_POPULARITY_SHARE / max(counts.max(), 1) * counts).astype(np.float32)
        scores[:, 0] = -np.inf
        return torch.from_numpy(scores)


def _sum_pairs(train: Sequences, window: int) -> sparse.csr_array:
    """float64 csr [items + 1, items + 1]: the sum of 1 / distance over the pairs (earlier item, later item)."""
    size = train.num_items + 1
    user = np.repeat(np.arange(len(train), dtype=np.int32), train.lengths)
    total = sparse.csr_array((size, size), dtype=np.float64)
    pending, held = [], 0
    longest = int(train.lengths.max(initial=0))
    for distance in range(1, min(window, longest - 1) + 1):
        starts = np.flatnonzero(user[:-distance] == user[distance:])
        earlier, later = train.items[starts], train.items[starts + distance]
        other = earlier != later
        pending.append((earlier[other], later[other], np.full(int(other.sum()), 1 / distance)))
        held += len(pending[-1][0])
        # folding only when as much waits as is summed already keeps the whole sum linear
        if held >= max(_FOLD, total.nnz):
            total, pending, held = total + _to_csr(pending, size), [], 0
    return total + _to_csr(pending, size)


def _to_csr(pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]], size: int) -> sparse.csr_array:
    if not pairs:
        return sparse.csr_array((size, size), dtype=np.float64)
    rows, columns, values = (np.concatenate(part) for part in zip(*pairs, strict=True))
    return sparse.csr_array((values, (rows, columns)), shape=(size, size))
