"""Sequential item-kNN: what followed or shortly preceded the items of the history in other users' sequences."""

from collections.abc import Sequence
from typing import Self

import numpy as np
from scipy import sparse

from ..tables import Sequences
from .arguments import RetrieverArguments
from .neighbours import NeighbourConfig, NeighbourRetriever

_FOLD = 1 << 22  # at least so many pairs are held before they are summed


class ItemKNNConfig(NeighbourConfig):
    """The config of `ItemKNN`: the settings `knn_...` of `RetrieverArguments`."""

    model_type = "item_knn"

    window: int = 50
    backward_weight: float = 0.5
    popularity_exponent: float = 0.3


class ItemKNN(NeighbourRetriever):
    """Neighbours are items of the same user.

    W[i, j] sums 1 / distance over the pairs where j follows i within the window in a train sequence, plus
    backward_weight / distance where j comes before i, divided by count(i)^popularity_exponent, since an item that
    everybody has carries little information.
    """

    config_class = ItemKNNConfig
    settings_prefix = "knn_"

    @classmethod
    def fit_sequences(cls, sequences: Sequences, titles: Sequence[str], args: RetrieverArguments) -> Self:
        """See `Retriever.fit_sequences`; time and memory are linear in the number of interactions."""
        return cls.count(sequences.train_part(), cls.make_config(sequences, args))

    @classmethod
    def count(cls, sequences: Sequences, config: ItemKNNConfig) -> Self:
        """Sums the pairs of these sequences, all of whose items are read."""
        follows = _sum_pairs(sequences, config.window)
        weights = (follows + config.backward_weight * follows.T).tocsr()
        counts = np.maximum(sequences.counts(), 1)
        weights.data /= np.repeat(counts**config.popularity_exponent, np.diff(weights.indptr))
        return cls.from_weights(config, weights, sequences.counts())

    def refit(self, sequences: Sequences) -> "ItemKNN":
        """See `Retriever.refit`."""
        return self.count(sequences, self.config)


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
        # summing only once the pending pairs outnumber the sum keeps the total cost linear
        if held >= max(_FOLD, total.nnz):
            total, pending, held = total + _to_csr(pending, size), [], 0
    return total + _to_csr(pending, size)


def _to_csr(pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]], size: int) -> sparse.csr_array:
    if not pairs:
        return sparse.csr_array((size, size), dtype=np.float64)
    rows, columns, values = (np.concatenate(part) for part in zip(*pairs, strict=True))
    return sparse.csr_array((values, (rows, columns)), shape=(size, size))
