"""What all retrievers share: the sequences they read, the catalogue they belong to, and their common face."""

import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedConfig

from ..tables import Sequences

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
