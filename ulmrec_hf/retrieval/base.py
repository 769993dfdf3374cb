"""What all retrievers share: the sequences they read, the catalogue they belong to, and their common face."""

import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedConfig

from ..files import hash_value

logger = logging.getLogger(__name__)

# where the class of each saved retriever lives, by the `model_type` in its config.json
RETRIEVERS = {
    "popularity": ("popularity", "PopularityRetriever"),
    "item_knn": ("item_knn", "ItemKNNRetriever"),
    "lrurec": ("lrurec", "LRURecModel"),
    "narm": ("narm", "NARMModel"),
    "bert4rec": ("bert4rec", "BERT4RecModel"),
    "sasrec": ("sasrec", "SASRecModel"),
    "text": ("text", "TextRetriever"),
    "hybrid": ("hybrid", "HybridRetriever"),
}


def catalogue_hash(item_ids: Sequence[str]) -> str:
    """The hash of a catalogue: its raw item ids in the order of their dense ids 1..n."""
    return hash_value(list(item_ids))


@dataclass(frozen=True)
class Sequences:
    """Every user's items in time order, as one flat array: 4 bytes an interaction, 8 a user.

    Attributes:
        items: int32 [interactions], dense item ids in 1..num_items.
        offsets: int64 [users + 1]; user u has `items[offsets[u]:offsets[u + 1]]`.
        num_items: how many items the catalogue holds.
        catalogue: hash of the catalogue (see `catalogue_hash`).
    """

    items: np.ndarray
    offsets: np.ndarray
    num_items: int
    catalogue: str

    def __post_init__(self):
        if not self.num_items:
            raise ValueError("the catalogue has no items: nothing can be retrieved.")
        if len(self.items) and not 1 <= self.items.min() <= self.items.max() <= self.num_items:
            raise ValueError(
                f"sequences hold items {self.items.min()}..{self.items.max()}, but the catalogue has items "
                f"1..{self.num_items}: the two tables do not belong together."
            )

    @classmethod
    def load(cls, data_folder: str | os.PathLike) -> Self:
        """Reads `sequences.parquet` and `items.parquet` of a data stage.

        Raises:
            ValueError: a table is missing, or its dense ids are not in order.
        """
        folder = Path(data_folder)
        for name in ("sequences.parquet", "items.parquet"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name} is missing: prepare the data first.")
        catalogue = pq.read_table(folder / "items.parquet", columns=["item", "item_id"])
        table = pq.read_table(folder / "sequences.parquet", columns=["user", "items"]).combine_chunks()
        for column, first, file in ((catalogue["item"], 1, "items"), (table["user"], 0, "sequences")):
            if not np.array_equal(column.to_numpy(), np.arange(first, first + len(column))):
                raise ValueError(
                    f"{folder / file}.parquet: {file[:-1]} ids must be {first}, {first + 1}, ... in order."
                )
        lists = pa.chunked_array(table["items"]).combine_chunks()
        offsets = np.concatenate([[0], np.cumsum(lists.value_lengths().to_numpy(), dtype=np.int64)])
        return cls(
            lists.flatten().to_numpy().astype(np.int32),
            offsets.astype(np.int64),
            len(catalogue),
            catalogue_hash(catalogue["item_id"].to_pylist()),
        )

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[int]], item_ids: Sequence[str]) -> Self:
        """Builds sequences from one list of dense item ids per user, and the catalogue's raw item ids."""
        offsets = np.cumsum([0, *(len(items) for items in lists)], dtype=np.int64)
        flat = np.array([item for items in lists for item in items], dtype=np.int32)
        return cls(flat, offsets, len(item_ids), catalogue_hash(item_ids))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, user: int) -> np.ndarray:
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [users], how many items every user has."""
        return np.diff(self.offsets)

    def train_part(self) -> Self:
        """The same users without their last two items, which are the validation and the test target."""
        return self.select(np.maximum(self.lengths - 2, 0))

    def select(self, kept: np.ndarray) -> Self:
        """The same users with their `kept` oldest items alone, int64 [users]; a user may be left with none."""
        place = np.arange(len(self.items)) - np.repeat(self.offsets[:-1], self.lengths)
        return type(self)(
            self.items[place < np.repeat(kept, self.lengths)],
            np.concatenate([[0], np.cumsum(kept, dtype=np.int64)]),
            self.num_items,
            self.catalogue,
        )

    def counts(self) -> np.ndarray:
        """int64 [num_items + 1], how often every item occurs; place 0 is padding."""
        return np.bincount(self.items, minlength=self.num_items + 1)


class RetrieverConfig(PreTrainedConfig):
    """What every retriever's config.json holds.

    Attributes:
        num_items: how many items the catalogue holds.
        catalogue: hash of the catalogue, so that a retriever of another one is refused.
        max_history: how many of the newest history items are read.
    """

    num_items: int = 1
    catalogue: str = ""
    max_history: int = 50


class Retriever(ABC):
    """The common face: scores for the whole catalogue from histories, `save_pretrained` and `from_pretrained`."""

    config: RetrieverConfig

    @property
    def name(self) -> str:
        """The retriever's name in reports and in config.json."""
        return self.config.model_type

    @abstractmethod
    def score(self, histories: Iterable[Sequence[int]]) -> torch.Tensor:
        """Scores every item as the next one of each history.

        Args:
            histories: dense item ids in time order, oldest first; a history may be empty. Ids that the catalogue does
                not have are skipped with a warning, and of the rest the newest `max_history` are read.

        Returns:
            float32 [batch, num_items + 1], higher is better, on the retriever's device; column 0 (padding) is -inf.
            Items of the history are scored too, though a hybrid puts them below its pool.
        """

    def log_scores(self, histories: Iterable[Sequence[int]]) -> torch.Tensor:
        """Like `score`, on the scale of log-probabilities up to a constant for each history, so that they add up."""
        return self.score(histories)

    def refit(self, sequences: Sequences) -> "Retriever":
        """The same retriever with its item statistics counted anew in these sequences; what was learned stays."""
        return self

    def check_catalogue(self, catalogue: str) -> None:
        """Raises ValueError unless this retriever was fitted on the catalogue of that hash."""
        if self.config.catalogue != catalogue:
            raise ValueError(
                f"this {self.name} retriever belongs to another catalogue: it was fitted on catalogue "
                f"{self.config.catalogue[:12] or 'unknown'} with {self.config.num_items} items, the data is catalogue "
                f"{catalogue[:12]}. Fit it again on this data."
            )

    def newest_items(self, histories: Iterable[Sequence[int]]) -> list[np.ndarray]:
        """The newest `max_history` items of each history, without ids that are not in the catalogue."""
        arrays, unknown = [], 0
        for history in histories:
            array = np.asarray(history, dtype=np.int64)
            known = (array >= 1) & (array <= self.config.num_items)
            if not known.all():
                unknown += int((~known).sum())
                array = array[known]
            arrays.append(array[-self.config.max_history :])
        if unknown:
            logger.warning(
                "skipped %d history items outside the catalogue 1..%d of this %s retriever",
                unknown,
                self.config.num_items,
                self.name,
            )
        return arrays


class CountingRetriever(Retriever):
    """A retriever without training: a config and a few arrays, saved as config.json and model.safetensors.

    A subclass sets `config_class` and `array_names`, and implements `fit` and `score`.
    """

    config_class: ClassVar[type[RetrieverConfig]]
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


def retriever_class(model_type: str) -> type[Retriever]:
    """The class of the retriever of that name; its module is imported only now, since not every one needs the same."""
    module, name = RETRIEVERS[model_type]
    return getattr(import_module(f"{__package__}.{module}"), name)


def load_retriever(folder: str | os.PathLike, *, catalogue: str | None = None) -> Retriever:
    """Loads a saved retriever; its class is told by the `model_type` in its config.json.

    Args:
        catalogue: the hash of the catalogue it must belong to (`Sequences.catalogue`); None does not check.

    Raises:
        ValueError: no retriever is there, its type is unknown, or it belongs to another catalogue.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no retriever: {path.name} is missing there.")
    model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    if model_type not in RETRIEVERS:
        raise ValueError(f"{path}: model_type {model_type!r} is not a retriever; known are {', '.join(RETRIEVERS)}.")
    retriever = retriever_class(model_type).from_pretrained(folder)
    if catalogue is not None:
        retriever.check_catalogue(catalogue)
    return retriever
