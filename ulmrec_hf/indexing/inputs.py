"""What a user index is made from: a vector for each train interaction, of what was written, chosen, rated, and when."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file
from scipy import sparse

from ..files import write_json
from ..tables import LeaveOneOut, UserTexts
from .encoder import TextEncoder, TfidfEncoder, load_encoder

_HASHED_DIM = 64
_LARGEST = 1e300
_DAY = 86_400
_YEAR = 365.2425


class Table(Protocol):
    """Vectors by number, in memory or on disk."""

    dim: int

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """float32 [n, dim] of the numbers, int [n]."""


@dataclass(frozen=True)
class ArrayTable:
    """A `Table` in memory: float32 [rows, dim]."""

    array: np.ndarray

    @property
    def dim(self) -> int:
        return self.array.shape[1]

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """See `Table`."""
        return self.array[ids]


@dataclass(frozen=True)
class Input:
    """One kind of vectors of the interactions.

    Attributes:
        table: the different vectors; they count at length 1, but where they are 0.
        ids: int32 [interactions], the row in `table`, -1 where an interaction has none.
        weight: what the vectors are multiplied by.
    """

    table: Table
    ids: np.ndarray
    weight: float = 1.0


@dataclass(frozen=True)
class TrainPart:
    """The train interactions of all users, oldest first within a user.

    Attributes:
        user_ids: the users, in ascending dense order.
        offsets: int64 [users + 1]; user u has the interactions `offsets[u]` to `offsets[u + 1]`.
        items: int32 [interactions], dense item ids from 1.
        item_ids: raw ids of the items 1..n.
        ratings: float32 [interactions], NaN where unknown.
        times: float64 [interactions], seconds since 1970, NaN where unknown.
    """

    user_ids: list[str]
    offsets: np.ndarray
    items: np.ndarray
    item_ids: list[str]
    ratings: np.ndarray
    times: np.ndarray

    @classmethod
    def load(cls, data_folder: str | os.PathLike, offsets: np.ndarray) -> Self:
        """Reads a data stage; `offsets` are those of `UserTexts` of its train part."""
        folder = Path(data_folder)
        table = pq.read_table(folder / "sequences.parquet").combine_chunks()
        lengths = np.diff(_lists(table, "items").offsets.to_numpy())
        place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        kept = place < np.repeat(np.diff(offsets), lengths)

        def column(name: str) -> np.ndarray:
            if name not in table.column_names or table[name].null_count:
                return np.full(kept.sum(), np.nan)
            return _lists(table, name).flatten().to_numpy(zero_copy_only=False).astype(np.float64)[kept]

        return cls(
            table["user_id"].to_pylist(),
            offsets,
            column("items").astype(np.int32),
            pq.read_table(folder / "items.parquet", columns=["item_id"])["item_id"].to_pylist(),
            column("ratings").astype(np.float32),
            column("timestamps"),
        )


def _lists(table: pa.Table, name: str) -> pa.ListArray:
    return pa.chunked_array(table[name]).combine_chunks()


class InputEncoder:
    """Turns interactions into vectors, for the users that it was fitted on and for new ones.

    Args:
        weights: the weight of each input, by its name, in the order in which vectors are joined.
        encoder: of reviews and titles; None where neither is an input.
        items: raw item id -> row in `item_vectors`.
        item_vectors: float32 [items, dim], of the input `cooccurrence`.
        ranges: the lowest and highest rating and time of the train part.
        max_reviews: how many of a user's newest interactions count.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        encoder: TextEncoder | None = None,
        item_ids: Sequence[str] = (),
        item_vectors: np.ndarray | None = None,
        ranges: Mapping[str, Sequence[float]] | None = None,
        max_reviews: int = 50,
    ):
        self.weights, self.encoder, self.ranges = dict(weights), encoder, dict(ranges or {})
        self.max_reviews = max_reviews
        self.item_ids, self.item_vectors = list(item_ids), item_vectors
        self._rows = {item_id: row for row, item_id in enumerate(self.item_ids)}

    @property
    def dim(self) -> int:
        """Length of an interaction's vector: those of its inputs, joined."""
        items = 0 if self.item_vectors is None else self.item_vectors.shape[1]
        dims = {"cooccurrence": items, "ratings": 2, "times": 4}
        return sum(dims.get(name, self.encoder.dim if self.encoder else 0) for name in self.weights)

    def encode(self, **values: Sequence[Any]) -> np.ndarray:
        """The vectors of one user's newest `max_reviews` interactions that hold anything, oldest first.

        Args:
            values: by input, one value for each interaction: `reviews` and `titles` (text), `cooccurrence` (raw item
                ids; an unknown one counts as none), `ratings`, `times` (seconds since 1970); None and NaN where one is
                missing. Inputs that are not given are zeros.

        Returns:
            float32 [interactions, dim].

        Raises:
            ValueError: an input that the index was not made from, inputs of different lengths, or values that are no
                numbers or no strings.
        """
        unknown = sorted(set(values) - set(self.weights))
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: this index was made from {', '.join(self.weights)}.")
        for name, part in values.items():
            if isinstance(part, str):
                raise ValueError(f"{name} is one string; give a list, with one value for each interaction.")
        values = {name: self._read(name, part) for name, part in values.items()}
        lengths = {len(part) for part in values.values()}
        if len(lengths) > 1:
            raise ValueError(
                "Each input needs one value for each interaction; got "
                + ", ".join(f"{len(part)} {name}" for name, part in values.items())
                + "."
            )
        told = np.any([self._told(name, part) for name, part in values.items()], axis=0) if values else np.zeros(0)
        newest = np.flatnonzero(told)[-self.max_reviews :]
        kept = {name: [part[place] for place in newest] for name, part in values.items()}
        blocks = [weight * self._vectors(name, kept.get(name), len(newest)) for name, weight in self.weights.items()]
        return np.concatenate(blocks, axis=1, dtype=np.float32)

    def encode_user_ids(self, user_ids: Sequence[str]) -> np.ndarray:
        """`e_ou` of eq. (1), float32 [users, user_dim]: by the text encoder, or hashed where there is none."""
        return (self.encoder or TfidfEncoder(_HASHED_DIM)).encode_user_ids(user_ids)

    def _read(self, name: str, values: Iterable[Any]) -> list[Any]:
        """The values as a list, NaN in place of a missing number and None of a missing string."""
        values = [None if isinstance(value, float) and np.isnan(value) else value for value in values]
        numbers = name in ("ratings", "times")
        expected = int | float | np.integer | np.floating | None if numbers else str | None
        wrong = [value for value in values if not isinstance(value, expected)]
        if wrong:
            kind = "numbers" if numbers else "strings"
            raise ValueError(f"{name} must be {kind}, or None where one is missing; got {wrong[0]!r}.")
        if numbers:  # Python's whole numbers have no bound
            return [np.nan if value is None or abs(value) > _LARGEST else value for value in values]
        # half of a surrogate pair is no character; the readers replace it as well
        return [value and value.encode("utf-8", "replace").decode() for value in values]

    def _told(self, name: str, values: Sequence[Any]) -> list[bool]:
        """Which of the values are there."""
        if name in ("ratings", "times"):
            return [bool(np.isfinite(value)) for value in values]
        if name == "cooccurrence":
            return [value in self._rows for value in values]
        return [bool(text and text.strip()) for text in values]

    def _vectors(self, name: str, values: Sequence[Any] | None, count: int) -> np.ndarray:
        if name in ("ratings", "times"):
            return self.scale(name, np.full(count, np.nan) if values is None else np.asarray(values, np.float64))
        if name == "cooccurrence":
            rows = np.array([self._rows.get(value, -1) for value in values or [None] * count], np.int64)
            return np.where(rows[:, None] < 0, 0, self.item_vectors[rows])
        vectors = np.zeros((count, self.encoder.dim), np.float32)
        told = np.flatnonzero(self._told(name, values or []))
        if len(told):
            vectors[told] = unit(self.encoder.encode([values[place] for place in told]))
        return vectors

    def scale(self, name: str, values: np.ndarray) -> np.ndarray:
        """Ratings or times, float64 [n], as vectors of length 1 that are near where they are; NaN as zeros.

        A rating is a point on a quarter circle from the lowest to the highest, float32 [n, 2]; a time the same, and its
        day on the circle of the year, float32 [n, 4].
        """
        low, high = self.ranges[name]
        angle = np.pi / 2 * np.clip((values - low) / ((high - low) or 1), 0, 1)
        angles = [angle] if name == "ratings" else [angle, 2 * np.pi * values / (_DAY * _YEAR)]
        circles = [part(angle) / np.sqrt(len(angles)) for angle in angles for part in (np.cos, np.sin)]
        return np.nan_to_num(np.stack(circles, axis=1)).astype(np.float32)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes inputs.json and, where they are, items.json, item_vectors.safetensors and encoder/ into `folder`."""
        folder = Path(folder)
        record = {"weights": self.weights, "ranges": self.ranges, "max_reviews": self.max_reviews}
        write_json(folder / "inputs.json", record)
        if self.item_vectors is not None:
            write_json(folder / "items.json", self.item_ids)
            save_file({"item_vectors": np.ascontiguousarray(self.item_vectors)}, folder / "item_vectors.safetensors")
        if self.encoder is not None:
            (folder / "encoder").mkdir(exist_ok=True)
            self.encoder.save(folder / "encoder")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Self:
        """Reads what `save` wrote.

        Raises:
            ValueError: it is not there.
        """
        folder = Path(folder)
        if not (folder / "inputs.json").is_file():
            raise ValueError(f"{folder} does not tell what the index is made from: inputs.json is missing.")
        saved = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))
        items, vectors = [], None
        if (folder / "items.json").is_file():
            items = json.loads((folder / "items.json").read_text(encoding="utf-8"))
            vectors = load_file(folder / "item_vectors.safetensors")["item_vectors"]
        encoder = load_encoder(folder / "encoder") if (folder / "encoder").is_dir() else None
        return cls(saved["weights"], encoder, items, vectors, saved["ranges"], saved["max_reviews"])


def read_inputs(
    names: Sequence[str], weights: Sequence[float], data_folder: str | os.PathLike
) -> tuple[dict[str, float], dict[str, UserTexts], TrainPart]:
    """The train part of a data stage, and its texts by the inputs that have any.

    Args:
        names: of `arguments.INPUTS`; "auto" is reviews where the train part has any, else titles.
        weights: one for each name; none at all for 1 each.
        data_folder: a finished data stage.

    Returns:
        The weights by input; for reviews and titles the texts; the train part.

    Raises:
        ValueError: an input that the data does not have.
    """
    by_name = dict(zip(names, weights or [1.0] * len(names), strict=True))
    if "auto" in by_name:
        texts = {"auto": LeaveOneOut.load(data_folder).texts("auto")}
        kind = texts["auto"].kind
        texts = {kind: texts["auto"]}
        by_name = {kind if name == "auto" else name: weight for name, weight in by_name.items()}
    else:
        texts = {}
    for name in ("reviews", "titles"):
        if name in by_name and name not in texts:
            texts[name] = LeaveOneOut.load(data_folder).texts(name)
    any_texts = next(iter(texts.values())) if texts else LeaveOneOut.load(data_folder).texts("titles")
    train = TrainPart.load(data_folder, any_texts.offsets)
    for name in ("ratings", "times"):
        if name in by_name and not np.nan_to_num(getattr(train, name)).any():  # a source without times has zeros
            raise ValueError(f"inputs holds {name}, but {data_folder} has none in its train part: leave it out.")
    return by_name, texts, train


def fit_inputs(
    weights: Mapping[str, float],
    texts: Mapping[str, UserTexts],
    train: TrainPart,
    encoder: TextEncoder | None,
    embed: Callable[[str, Sequence[str]], Table],
    *,
    cooccurrence_dim: int,
    max_reviews: int,
) -> tuple[InputEncoder, list[Input]]:
    """Fits what turns interactions into vectors, and gives those of the train part.

    Args:
        weights, texts, train: see `read_inputs`.
        encoder: of reviews and titles, fitted; None without either.
        embed: gives a table of the vectors of texts, by the input's name and the texts.
        cooccurrence_dim: length of an item's vector by co-occurrence, at most.
        max_reviews: newest interactions of a user that count.
    """
    ranges = {
        name: [float(np.nanmin(values)), float(np.nanmax(values))]
        for name, values in (("ratings", train.ratings), ("times", train.times))
        if name in weights
    }
    vectors = item_vectors(train, cooccurrence_dim, max_reviews) if "cooccurrence" in weights else None
    fitted = InputEncoder(weights, encoder, train.item_ids if vectors is not None else (), vectors, ranges, max_reviews)
    inputs = []
    for name, weight in weights.items():
        if name in texts:
            inputs.append(Input(embed(name, texts[name].texts), texts[name].text_ids, weight))
        elif name == "cooccurrence":
            inputs.append(Input(ArrayTable(vectors), train.items - 1, weight))
        else:
            different, ids = np.unique(getattr(train, name).astype(np.float64), return_inverse=True)
            ids = np.where(np.isnan(different[ids]), -1, ids).astype(np.int32)
            inputs.append(Input(ArrayTable(fitted.scale(name, different)), ids, weight))
    return fitted, inputs


def item_vectors(train: TrainPart, dim: int, max_reviews: int) -> np.ndarray:
    """Items that the same users chose are near: float32 [items, at most dim], of length 1 or 0.

    The main directions of the items' cosines of co-occurrence among the users' newest `max_reviews` train items.
    """
    from sklearn.decomposition import TruncatedSVD

    lengths = np.diff(train.offsets)
    users = np.repeat(np.arange(len(lengths)), lengths)
    newest = np.repeat(train.offsets[1:], lengths) - np.arange(len(users)) <= max_reviews
    shape = (len(lengths), len(train.item_ids))
    chosen = sparse.csr_array((np.ones(newest.sum(), np.float32), (users[newest], train.items[newest] - 1)), shape)
    chosen.data[:] = 1  # an item that was chosen twice counts once
    counts = np.maximum(chosen.sum(axis=0), 1)
    scaled = chosen @ sparse.diags_array((1 / np.sqrt(counts)).astype(np.float32))
    cosines = sparse.csr_array(scaled.T @ scaled)
    dim = min(dim, shape[1] - 1)
    if dim < 1:
        return np.ones((shape[1], 1), np.float32)
    svd = TruncatedSVD(dim, random_state=0)
    return unit(svd.fit_transform(cosines) / np.maximum(svd.singular_values_, 1e-6))


def unit(vectors: np.ndarray) -> np.ndarray:
    """The rows at length 1, float32; zeros stay."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)
