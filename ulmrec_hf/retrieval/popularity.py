"""Popularity: every user is offered what most users chose."""

from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np
import torch

from ..tables import Sequences
from .arguments import RetrieverArguments
from .base import CountingRetriever, RetrieverConfig


class PopularityConfig(RetrieverConfig):
    """The config of `Popularity`."""

    model_type = "popularity"


class Popularity(CountingRetriever):
    """Scores an item by how often it occurs in the train part, whatever the history."""

    config_class = PopularityConfig
    array_names = ("counts",)

    @classmethod
    def fit_sequences(cls, sequences: Sequences, titles: Sequence[str], args: RetrieverArguments) -> Self:
        """See `Retriever.fit_sequences`."""
        return cls(cls.make_config(sequences, args), {"counts": sequences.train_part().counts()})

    def refit(self, sequences: Sequences) -> "Popularity":
        """See `Retriever.refit`."""
        return Popularity(self.config, {"counts": sequences.counts()})

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
