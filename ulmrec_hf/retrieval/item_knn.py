"""Sequential item-kNN: what followed, or came shortly before, the items of the history in other users' sequences."""

from typing import Self

import numpy as np
from scipy import sparse

from ..tables import Sequences
from .neighbours import NeighbourConfig, NeighbourRetriever

_FOLD = 1 << 22  # how many pairs are held before they are summed, at least


class ItemKNNConfig(NeighbourConfig):
    """The config of `ItemKNNRetriever`.

    Attributes:
        window: items at most this many steps apart are neighbours.
        backward_weight: weight of the earlier item of a pair as the neighbour of the later one; forward weighs 1.
        popularity_exponent: what a history item leads to is divided by its train count to this power, since an item
            that everybody has tells little.
    """

    model_type = "item_knn"

    window: int = 50
    backward_weight: float = 0.5
    popularity_exponent: float = 0.3


class ItemKNNRetriever(NeighbourRetriever):
    """Neighbours are items of the same user.

    W[i, j] sums 1 / distance over the pairs where j follows i within the window in a train sequence, plus
    backward_weight / distance where j comes before i, divided by count(i)^popularity_exponent.
    """

    config_class = ItemKNNConfig

    @classmethod
    def fit(cls, train: Sequences, **settings: float) -> Self:
        """Sums the pairs of `train`, which must be the train part alone; time and memory are linear in its length.

        Args:
            settings: fields of `ItemKNNConfig`.
        """
        config = ItemKNNConfig(**settings)
        follows = _sum_pairs(train, config.window)
        weights = (follows + config.backward_weight * follows.T).tocsr()
        counts = np.maximum(train.counts(), 1)
        weights.data /= np.repeat(counts**config.popularity_exponent, np.diff(weights.indptr))
        return cls.from_weights(weights, train, **settings)

    def refit(self, sequences: Sequences) -> "ItemKNNRetriever":
        """See `Retriever.refit`."""
        names = ("max_history", "recency", "window", "backward_weight", "popularity_exponent")
        return self.fit(sequences, **{name: getattr(self.config, name) for name in names})


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
