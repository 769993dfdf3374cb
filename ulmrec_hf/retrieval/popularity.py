"""Popularity: every user is offered what most users chose."""

from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np
import torch

from .base import CountingRetriever, RetrieverConfig, Sequences
from .ranking import hide


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
        scores = torch.from_numpy(self.arrays["counts"].astype(np.float32))
        scores[0] = -torch.inf
        return scores.repeat(len(list(histories)), 1)

    def log_scores(self, histories: Iterable[Sequence[int]]) -> torch.Tensor:
        """log(1 + train count); see `Retriever.log_scores`."""
        return hide(self.score(histories).log1p())
