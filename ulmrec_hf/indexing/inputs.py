"""What a user index is made from: a vector for each train interaction, of what was written, chosen, rated, and when."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy import sparse

from ..files import write_json
from ..protocol import train_lengths
from ..tables import LeaveOneOut, Sequences, UserTexts
from .dataset import Input, Table, UserDataset, unit
from .embeddings import embed_in_memory
from .encoder import TextEncoder, TfidfEncoder, load_encoder

Embed = Callable[[TextEncoder, str, Sequence[str]], Table]
_HASHED_DIM = 64
_FOLDS = 5  # of users, each of whom must not see what it chose in the vectors of items
_BLOCK = 65_536  # users at once
_LARGEST = 1e300
_DAY = 86_400
_YEAR = 365.2425


@dataclass(frozen=True)
class TrainPart:
    """What an index reads of the train interactions of users, oldest first within a user.

    Attributes:
        weights: how much each input counts, by its name.
        texts: of the inputs reviews and titles.
        numbers: of the inputs ratings and times (seconds since 1970), float64 [interactions], NaN where unknown.
        user_ids, item_ids, sequences: see `LeaveOneOut`.
    """

    weights: dict[str, float]
    texts: dict[str, UserTexts]
    numbers: dict[str, np.ndarray]
    user_ids: list[str]
    item_ids: list[str]
    sequences: Sequences

    @classmethod
    def read(
        cls, data: LeaveOneOut, names: Sequence[str], weights: Sequence[float] = (), evidence: str = "train"
    ) -> Self:
        """Reads the inputs of these names, see `arguments.INPUTS`; without weights, each counts 1.

        The evidence "all" reads every interaction, the test target included, as if it were the train part.

        Raises:
            ValueError: an input that the data does not have.
        """
        by_name, texts, numbers = {}, {}, {}
        kept = train_lengths(data.sequences.lengths) if evidence == "train" else data.sequences.lengths
        for name, weight in zip(names, weights or [1.0] * len(names), strict=True):
            if name in ("auto", "reviews", "titles"):
                part = data.texts(name, train_only=evidence == "train")
                name = part.kind
                texts[name] = part
            elif name in ("ratings", "times"):
                values = getattr(data, name)[data.sequences.oldest(kept)].astype(np.float64)
                if not np.nan_to_num(values).any():  # a source without times has zeros
                    where = data.folder or "the data"
                    raise ValueError(f"inputs holds {name}, but {where} has none in its train part: leave it out.")
                numbers[name] = values
            by_name[name] = weight
        texts = dict(sorted(texts.items()))  # so that the order of names does not change what an encoder is fitted on
        return cls(by_name, texts, numbers, data.user_ids, data.item_ids, data.sequences.select(kept))


class InputEncoder:
    """Turns interactions into vectors, for the users that it was fitted on and for new ones.

    Args:
        weights: the weight of each input, by its name, in the order in which vectors are joined.
        encoder: of reviews and titles; None where neither is an input.
        item_ids: raw ids of the rows of `item_vectors`.
        item_vectors: float32 [items, dim], of the input `cooccurrence`.
        item_basis: float32 [items, dim], what turns an item's cosines with all items into its vector.
        ranges: the lowest and highest rating and time of the train part.
        max_reviews: how many of a user's newest interactions count.
        user_ids: whether user ids are encoded too, for attention.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        encoder: TextEncoder | None = None,
        item_ids: Sequence[str] = (),
        item_vectors: np.ndarray | None = None,
        ranges: Mapping[str, Sequence[float]] | None = None,
        max_reviews: int = 50,
        user_ids: bool = False,
        item_basis: np.ndarray | None = None,
    ):
        self.weights, self.encoder, self.ranges = dict(weights), encoder, dict(ranges or {})
        self.max_reviews, self.user_ids = max_reviews, user_ids
        self.item_ids, self.item_vectors, self.item_basis = list(item_ids), item_vectors, item_basis
        self._rows = {item_id: row for row, item_id in enumerate(self.item_ids)}

    @classmethod
    def fit(
        cls,
        train: TrainPart,
        encoder: TextEncoder | None,
        *,
        cooccurrence_dim: int = 128,
        max_reviews: int = 50,
        user_ids: bool = False,
    ) -> Self:
        """Fits all but the text encoder on the train part; an item's vector has at most `cooccurrence_dim` numbers."""
        ranges = {name: [float(np.nanmin(part)), float(np.nanmax(part))] for name, part in train.numbers.items()}
        if "cooccurrence" not in train.weights:
            return cls(train.weights, encoder, ranges=ranges, max_reviews=max_reviews, user_ids=user_ids)
        vectors, basis = item_vectors(train.sequences, cooccurrence_dim, max_reviews)
        return cls(train.weights, encoder, train.item_ids, vectors, ranges, max_reviews, user_ids, basis)

    def dataset(self, train: TrainPart, embed: Embed = embed_in_memory) -> UserDataset:
        """The vectors of all users of a train part, which need not be the one that this was fitted on.

        Args:
            embed: from the encoder, what is encoded (an input's name, or "user_ids") and the strings to their vectors.
        """
        inputs = []
        for name, weight in self.weights.items():
            if name in train.texts:
                texts = train.texts[name]
                inputs.append(Input(embed(self.encoder, name, texts.texts), texts.text_ids, weight))
            elif name == "cooccurrence":
                rows = np.array([self._rows.get(item, -1) for item in train.item_ids], np.int32)
                inputs.append(Input(self.item_vectors, rows[train.sequences.items - 1], weight))
            else:
                different, ids = np.unique(train.numbers[name], return_inverse=True)
                ids = np.where(np.isnan(different[ids]), -1, ids).astype(np.int32)
                inputs.append(Input(self.scale(name, different), ids, weight))
        users = None
        if self.user_ids and self.encoder:
            users = embed(self.encoder, "user_ids", train.user_ids)
        elif self.user_ids:
            users = self.encode_user_ids(train.user_ids)
        return UserDataset(inputs, train.sequences.offsets, users, self.max_reviews)

    def without_own_choices(self, dataset: UserDataset, data: LeaveOneOut) -> Iterator[tuple[np.ndarray, UserDataset]]:
        """A dataset for each of some groups of users, int64, whose items' vectors have not seen what they chose.

        An item's vector by co-occurrence says what else those who chose it chose, so that of a history item would hold
        the user's next choices too.

        Args:
            dataset: what `dataset` gave for the train part of `data`.
        """
        users = np.arange(len(dataset))
        if "cooccurrence" not in self.weights:
            yield users, dataset
            return
        columns = np.array([self._rows.get(item, -1) for item in data.item_ids], np.int32)
        chosen = _chosen(data.sequences.train_part(), self.max_reviews, columns, len(self.item_ids))
        for fold in range(_FOLDS):
            own = users % _FOLDS == fold
            scaled, vectors = _scaled(chosen[~own]), np.zeros_like(self.item_basis)
            for begin in range(0, scaled.shape[0], _BLOCK):
                block = scaled[begin : begin + _BLOCK]
                vectors += block.T @ (block @ self.item_basis)
            yield users[own], dataset.with_table([*self.weights].index("cooccurrence"), vectors)

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
        known = np.any([self._known(name, part) for name, part in values.items()], axis=0) if values else np.zeros(0)
        newest = np.flatnonzero(known)[-self.max_reviews :]
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

    def _known(self, name: str, values: Sequence[Any]) -> list[bool]:
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
        known = np.flatnonzero(self._known(name, values or []))
        if len(known):
            vectors[known] = unit(self.encoder.encode([values[place] for place in known]))
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
        record = {name: getattr(self, name) for name in ("weights", "ranges", "max_reviews", "user_ids")}
        write_json(folder / "inputs.json", record)
        if self.item_vectors is not None:
            write_json(folder / "items.json", self.item_ids)
            tables = {"item_vectors": self.item_vectors, "item_basis": self.item_basis}
            tables = {name: np.ascontiguousarray(table) for name, table in tables.items()}
            save_file(tables, folder / "item_vectors.safetensors")
        if self.encoder is not None:
            (folder / "encoder").mkdir(exist_ok=True)
            self.encoder.save(folder / "encoder")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Self:
        """Reads what `save` wrote.

        Raises:
            ValueError: it is not there, or an earlier version wrote it.
        """
        folder = Path(folder)
        if not (folder / "inputs.json").is_file():
            raise ValueError(f"{folder} does not say what the index is made from: inputs.json is missing.")
        saved = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))
        items, tables = [], {}
        if (folder / "items.json").is_file():
            items = json.loads((folder / "items.json").read_text(encoding="utf-8"))
            tables = load_file(folder / "item_vectors.safetensors")
            if "item_basis" not in tables:
                raise ValueError(f"{folder / 'item_vectors.safetensors'} has no item_basis: index the users again.")
        encoder = load_encoder(folder / "encoder") if (folder / "encoder").is_dir() else None
        return cls(encoder=encoder, item_ids=items, **tables, **saved)


def item_vectors(sequences: Sequences, dim: int, max_reviews: int) -> tuple[np.ndarray, np.ndarray]:
    """Items that the same users chose are near: vectors of length 1 or 0 and their basis, float32 [items, <= dim].

    The main directions of the items' cosines of co-occurrence among the users' newest `max_reviews` train items.
    """
    from sklearn.decomposition import TruncatedSVD

    items = sequences.num_items
    scaled = _scaled(_chosen(sequences, max_reviews, np.arange(items), items))
    cosines = sparse.csr_array(scaled.T @ scaled)
    dim = min(dim, items - 1)
    if dim < 1:
        return np.ones((items, 1), np.float32), np.ones((items, 1), np.float32)
    svd = TruncatedSVD(dim, random_state=0)
    vectors, lengths = svd.fit_transform(cosines), np.maximum(svd.singular_values_, 1e-6)
    return unit(vectors / lengths), (svd.components_.T / lengths).astype(np.float32)


def _chosen(sequences: Sequences, max_reviews: int, columns: np.ndarray, width: int) -> sparse.csr_array:
    """1 where a user chose an item among the newest `max_reviews`, float32 [users, width]; column -1 is left out."""
    lengths = sequences.lengths
    users = np.repeat(np.arange(len(lengths)), lengths)
    items = columns[sequences.items - 1]
    kept = (np.repeat(sequences.offsets[1:], lengths) - np.arange(len(users)) <= max_reviews) & (items >= 0)
    shape = (len(lengths), width)
    chosen = sparse.csr_array((np.ones(kept.sum(), np.float32), (users[kept], items[kept])), shape)
    chosen.data[:] = 1  # an item that was chosen twice counts once
    return chosen


def _scaled(chosen: sparse.csr_array) -> sparse.csr_array:
    """The columns at length 1."""
    counts = np.maximum(chosen.sum(axis=0), 1)
    return chosen @ sparse.diags_array((1 / np.sqrt(counts)).astype(np.float32))
