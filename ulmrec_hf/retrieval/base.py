"""What all retrievers share: how they are fitted, scored, ranked, saved and loaded."""

import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import torch
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedConfig

from ..protocol import EVALUATED, SPLITS, target_positions
from ..stages import with_settings
from ..tables import CANDIDATES, LeaveOneOut, Sequences
from .arguments import RETRIEVERS, STAGE_SETTINGS, RetrieverArguments
from .candidates import candidate_tables, rank_table, retrieve, search

logger = logging.getLogger(__name__)


class RetrieverConfig(PreTrainedConfig):
    """What every retriever's config.json holds.

    Attributes:
        num_items, catalogue: see `Sequences`; a retriever of another catalogue is refused.
        max_history: how many of the newest history items are read.
    """

    num_items: int = 1
    catalogue: str = ""
    max_history: int = 50


class Retriever(ABC):
    """Scores the whole catalogue for given histories.

    A subclass sets `config_class`, whose `model_type` is its name in `RETRIEVERS`, and implements `fit_sequences`,
    `score`, `save_pretrained` and `from_pretrained`; of a `CountingRetriever` the first two, of a `NeuralRetriever`
    only `encode`.

    Attributes:
        components: the retrievers that this one combines.
        training_history: for each epoch of each neural retriever `retriever`, `epoch`, `loss` and, with validation,
            `ndcg@10`, `recall@10`, `recall@20`; empty where nothing was trained, and after loading.
    """

    config_class: ClassVar[type[RetrieverConfig]]
    settings_prefix: ClassVar[str] = ""  # of this retriever's own fields in `RetrieverArguments`
    config: RetrieverConfig
    components: Sequence["Retriever"] = ()
    training_history: Sequence[dict[str, float | str]] = ()

    @classmethod
    def fit(cls, data: LeaveOneOut, args: RetrieverArguments | None = None, **settings: Any) -> Self:
        """Fits a retriever on the train part; validation targets only choose the epoch or a hybrid's combiner.

        Args:
            data: test targets are never read.
            args: the settings; the defaults if not given.
            settings: fields of `RetrieverArguments` that replace those of `args`.

        Raises:
            ValueError: a setting that cannot be used, or too little data to fit on.
        """
        if unread := sorted(STAGE_SETTINGS & set(settings)):
            raise ValueError(f"{', '.join(unread)}: a setting of the retrieval stage that fit does not read; omit it.")
        args = with_settings(args or RetrieverArguments(), settings)
        return cls.fit_sequences(data.sequences, data.titles, args)

    @classmethod
    @abstractmethod
    def fit_sequences(cls, sequences: Sequences, titles: Sequence[str], args: RetrieverArguments) -> Self:
        """What `fit` does, from decoded data.

        Args:
            sequences: whole sequences; fit on `sequences.train_part()` alone.
            titles: of the items 1..num_items, in that order.
        """

    @classmethod
    def make_config(cls, sequences: Sequences, args: RetrieverArguments) -> RetrieverConfig:
        """The config for this catalogue, with the fields that `args` has by that name or with `settings_prefix`."""
        names = {item.name for item in fields(cls.config_class)}
        settings = {name.removeprefix(cls.settings_prefix): value for name, value in asdict(args).items()}
        settings = {name: value for name, value in settings.items() if name in names}
        return cls.config_class(num_items=sequences.num_items, catalogue=sequences.catalogue, **settings)

    @property
    def name(self) -> str:
        """The retriever's name in reports, in `RETRIEVERS` and in config.json."""
        return self.config.model_type

    @abstractmethod
    def score(self, histories: Iterable[Sequence[int]]) -> torch.Tensor:
        """Scores every item as the next one of each history.

        Args:
            histories: dense item ids in time order, oldest first; a history may be empty. Ids outside the catalogue
                are skipped with a warning, and of the rest the newest `max_history` are read.

        Returns:
            float32 [batch, num_items + 1], higher is better, on the retriever's device; column 0 (padding) is -inf.
            Items of the history are scored too, though a hybrid puts them below its pool.
        """

    def log_scores(self, histories: Iterable[Sequence[int]]) -> torch.Tensor:
        """Like `score`, but log-probabilities up to a constant per history, so that retrievers can be added up."""
        return self.score(histories)

    def refit(self, sequences: Sequences) -> "Retriever":
        """The same retriever with its item statistics recounted over these sequences; learned weights stay."""
        return self

    def top(self, histories: Iterable[Sequence[int]], k: int = 20) -> tuple[np.ndarray, np.ndarray]:
        """The k best items for each history, none of which is in it; of tied items the lower id comes first.

        Histories are scored in batches of similar length, and what shares a batch may change the last bits of a neural
        retriever's scores: all rows of a split, in order, give exactly its candidates, a selection up to rounding.

        Args:
            histories: as for `score`, except that all known items are excluded, not just the newest `max_history`.

        Returns:
            Items, int64 [histories, k], and scores, float32 [histories, k], descending; k is at most num_items. Where
            a score is -inf the catalogue has no more items, and the item there means nothing.

        Raises:
            ValueError: k is below 1, or the scores are NaN.
        """
        _check_at_least("k", k, 1)
        return search(self, self.known_items(histories), k)[:2]

    def candidates(self, data: LeaveOneOut, k: int = 20, train_positions: int = 5) -> pa.Table:
        """The top k of the train positions, validation and test, with the schema `tables.CANDIDATES`.

        Only the history before a row's position is read, but the retriever was trained on the targets of the training
        positions, so that their lists are better than those of unseen users (`cross_fit` of the stage avoids that).

        Args:
            data: of the same catalogue as the data it was fitted on.
            k: candidates per row; a row gets fewer where the catalogue without its history has fewer.
            train_positions: how many of the newest train positions of each user; 0 = all.

        Returns:
            user, split, position, items (best first, none from the history), scores, target, and its places in the
            whole catalogue without the history (1 = best; 0 = the target is in the history): target_rank, of tied items
            the lower id first; target_first, the first place of the tie; target_tied, how many items tie.

        Raises:
            ValueError: k below 1, train_positions below 0, data of another catalogue, or scores that are NaN.
        """
        _check_at_least("k", k, 1)
        _check_at_least("train_positions", train_positions, 0)
        tables = candidate_tables({split: [self] for split in SPLITS}, data.sequences, k, train_positions)
        return pa.concat_tables([CANDIDATES.empty_table(), *tables])

    def ranks(self, data: LeaveOneOut, splits: Sequence[str] = EVALUATED, *, system: str | None = None) -> pa.Table:
        """The rank of every target in the catalogue without its history, with the schema `tables.RANKS`.

        Args:
            data: of the same catalogue as the data it was fitted on.
            splits: whose targets.
            system: what the table calls this retriever, by default its name.

        Returns:
            user, split, system, rank and tied: the target stands at any of `tied` ranks from `rank` on, since so many
            items have its score. Ranks start at 1 = best; 0 = it is in the history, and so cannot be retrieved.
        """
        sequences = data.sequences
        places = [(split, *target_positions(sequences.lengths, split)) for split in splits]
        tables = [table for place in places for table in retrieve(self, sequences, *place, 0)]
        return rank_table(pa.concat_tables([CANDIDATES.empty_table(), *tables]), system or self.name)

    def check_catalogue(self, catalogue: str) -> None:
        """Raises ValueError unless this retriever was fitted on the catalogue with that hash."""
        if self.config.catalogue != catalogue:
            raise ValueError(
                f"this {self.name} retriever belongs to another catalogue: it was fitted on catalogue "
                f"{self.config.catalogue[:12] or 'unknown'} with {self.config.num_items} items, the data is catalogue "
                f"{catalogue[:12]}. Fit it again on this data."
            )

    def known_items(self, histories: Iterable[Sequence[int]]) -> list[np.ndarray]:
        """Each history as int64, without ids that are not in the catalogue, which are counted in a warning."""
        arrays, unknown = [], 0
        for history in histories:
            array = np.asarray(history, dtype=np.int64)
            known = (array >= 1) & (array <= self.config.num_items)
            if not known.all():
                unknown += int((~known).sum())
                array = array[known]
            arrays.append(array)
        if unknown:
            catalogue = f"the catalogue 1..{self.config.num_items} of this {self.name} retriever"
            logger.warning("skipped %d history items outside %s", unknown, catalogue)
        return arrays

    def newest_items(self, histories: Iterable[Sequence[int]]) -> list[np.ndarray]:
        """The newest `max_history` of the `known_items` of each history."""
        return [items[-self.config.max_history :] for items in self.known_items(histories)]


class CountingRetriever(Retriever):
    """A retriever without training: a config and a few arrays, saved as config.json and model.safetensors.

    A subclass sets `config_class` and `array_names`, and implements `fit_sequences` and `score`.
    """

    array_names: ClassVar[tuple[str, ...]]

    def __init__(self, config: RetrieverConfig, arrays: dict[str, np.ndarray]):
        self.config = config
        self.arrays = {name: arrays[name] for name in self.array_names}

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes config.json and model.safetensors."""
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)
        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        save_file(arrays, Path(folder) / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> Self:
        """Reads what `save_pretrained` wrote."""
        return cls(cls.config_class.from_pretrained(folder), load_file(Path(folder) / "model.safetensors"))


def load_retriever(folder: str | os.PathLike, *, catalogue: str | None = None) -> Retriever:
    """Loads what `save_pretrained` or the retrieval stage wrote.

    Args:
        catalogue: the hash of the catalogue it must belong to (`Sequences.catalogue`); None does not check.

    Raises:
        ValueError: no retriever is there, its type is unknown, or it belongs to another catalogue.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no retriever: {path.name} is missing there.")
    model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    retriever = RETRIEVERS[RETRIEVERS.check(model_type, f"{path}: model_type")].from_pretrained(folder)
    if catalogue is not None:
        retriever.check_catalogue(catalogue)
    return retriever


def _check_at_least(name: str, value: int, lowest: int) -> None:
    if value < lowest:
        raise ValueError(f"{name} must be at least {lowest}; got {value}.")
