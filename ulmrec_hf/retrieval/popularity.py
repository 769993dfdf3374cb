"""Popularity: every user is offered what most users chose."""

from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np
import torch

from ..tables import Sequences
from .base import CountingRetriever, RetrieverConfig


class PopularityConfig(RetrieverConfig):
    """The config of `PopularityRetriever`."""

    model_type = "popularity"


class PopularityRetriever(CountingRetriever):
    """Scores an item by how often it occurs in the train part, whatever the history."""

    config_class = PopularityConfig
    array_names = ("counts",)

    @classmethod
    def fit(cls, train: Sequences) -> Self:
        """Counts the items of `train`, which must be the train part alone."""
        config = PopularityConfig(num_items=train.num_items, catalogue=train.catalogue)
        return cls(config, {"counts": train.counts()})

    def refit(self, sequences: Sequences) -> "PopularityRetriever":
        """See `Retriever.refit`."""
        return self.fit(sequences)

    def score(self, histories: Iterable[Sequence[int]]) -> torch.Tensor:
        """Train counts, float32 [batch, num_items + 1]; see `Retriever.score`."""
        return _repeat(self.arrays["counts"], histories)

    def log_scores(self, histories: Iterable[Sequence[int]]) -> torch.Tensor:
        """log(1 + train count); see `Retriever.log_scores`."""
        return _repeat(np.log1p(self.arrays["counts"]), histories)


def _repeat(scores: np.ndarray, histories: Iterable[Sequence[int]]) -> torch.Tensor:
    row = torch.from_numpy(scores.astype(np.float32))
    row[0] = -torch.inf
    return row.repeat(len(list(histories)), 1)
