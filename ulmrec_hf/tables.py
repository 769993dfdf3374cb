"""The tables that pass between the stages, and the one reader of them, which decodes each column once."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .files import hash_value
from .protocol import train_lengths

INTERACTIONS = pa.schema(
    [
        ("user", pa.int32()),
        ("user_id", pa.string()),
        ("item", pa.int32()),
        ("item_id", pa.string()),
        ("timestamp", pa.int64()),
        ("rating", pa.float32()),
        ("summary", pa.string()),
        ("review", pa.string()),
    ]
)
CANDIDATES = pa.schema(
    [
        ("user", pa.int32()),
        ("split", pa.string()),
        ("position", pa.int32()),
        ("items", pa.list_(pa.int32())),
        ("scores", pa.list_(pa.float32())),
        ("target", pa.int32()),
        ("target_rank", pa.int32()),
        ("target_first", pa.int32()),
        ("target_tied", pa.int32()),
    ]
)
RANKS = pa.schema(
    [
        ("user", pa.int32()),
        ("split", pa.string()),
        ("system", pa.string()),
        ("rank", pa.int32()),
        ("tied", pa.int32()),
    ]
)
PREFERENCES = pa.schema(
    [
        ("user", pa.int32()),
        ("user_id", pa.string()),
        ("position", pa.int32()),
        ("preference", pa.string()),
        ("evidence", pa.string()),
        ("extractor", pa.string()),
        ("model", pa.string()),
        ("prompt_hash", pa.string()),
    ]
)
PREDICTIONS = pa.schema(
    [
        ("system", pa.string()),
        ("split", pa.string()),
        ("user", pa.int32()),
        ("scores", pa.list_(pa.float32())),
        ("label", pa.int8()),
    ]
)
TEXT_KINDS = ("auto", "reviews", "titles")


def read_table(path: str | os.PathLike, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet table, or some of its columns, those that are not there left out.

    Raises:
        ValueError: the file is missing; the message says which script writes such a file.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path} is missing: run recipes/{_MADE_BY.get(Path(path).stem, 'prepare_data')}.py first.")
    with pq.ParquetFile(path, memory_map=True) as file:
        names = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
        return file.read(names)


_MADE_BY = {
    "candidates": "train_retriever",
    "ranks": "train_retriever",
    "preferences": "extract_preferences",
    "user_index": "index_users",
    "predictions": "finetune",
}


@dataclass(frozen=True)
class Sequences:
    """Every user's items in time order, as one flat array: 4 bytes an interaction, 8 a user.

    Attributes:
        items: int32 [interactions], dense item ids in 1..num_items.
        offsets: int64 [users + 1]; user u has `items[offsets[u]:offsets[u + 1]]`.
        num_items: of the catalogue.
        catalogue: its `catalogue_hash`.
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
    def from_lists(cls, lists: Sequence[Sequence[int]], item_ids: Sequence[str]) -> Self:
        """Makes sequences of one list of dense item ids per user, and the catalogue's raw item ids."""
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
        return self.select(train_lengths(self.lengths))

    def select(self, kept: np.ndarray) -> Self:
        """The same users with their `kept` oldest items alone, int64 [users]; a user may be left with none."""
        return type(self)(
            self.items[self.oldest(kept)],
            np.concatenate([[0], np.cumsum(kept, dtype=np.int64)]),
            self.num_items,
            self.catalogue,
        )

    def oldest(self, kept: np.ndarray) -> np.ndarray:
        """bool [interactions]: whether each is among its user's `kept` oldest, int64 [users]."""
        place = np.arange(len(self.items)) - np.repeat(self.offsets[:-1], self.lengths)
        return place < np.repeat(kept, self.lengths)

    def counts(self) -> np.ndarray:
        """int64 [num_items + 1], how often every item occurs; place 0 is padding."""
        return np.bincount(self.items, minlength=self.num_items + 1)


def catalogue_hash(item_ids: Sequence[str]) -> str:
    """The hash of a catalogue: its raw item ids in the order of their dense ids 1..n."""
    return hash_value(list(item_ids))


@dataclass(frozen=True)
class UserTexts:
    """One text per interaction; equal texts are held once.

    Attributes:
        user_ids: the users, in ascending dense order.
        offsets: int64 [users + 1]; user u has the interactions `offsets[u]` to `offsets[u + 1]`, oldest first.
        text_ids: int32 [interactions]; the row in `texts`, or -1 where an interaction has no text.
        texts: the different texts, in the order of their first use.
        kind: "reviews" or "titles".
    """

    user_ids: Sequence[str]
    offsets: np.ndarray
    text_ids: np.ndarray
    texts: list[str]
    kind: str

    def __len__(self) -> int:
        return len(self.user_ids)

    def of_user(self, user: int, stop: int | None = None) -> np.ndarray:
        """Ids of the texts of a user's interactions before position `stop` (all by default), oldest first."""
        begin, end = self.offsets[user], self.offsets[user + 1]
        ids = self.text_ids[begin : end if stop is None else min(begin + stop, end)]
        return ids[ids >= 0]


class LeaveOneOut:
    """Users' interactions in time order, with the catalogue: what all else is made from.

    The last item of each user is the test target, the one before it the validation target, all others the train part
    (`ulmrec_hf.protocol`); whatever is fitted reads the train part alone. `Interactions.leave_one_out` makes one in
    memory, `load` opens a data stage; nothing is decoded before it is asked for, nor twice.

    Args:
        tables: `sequences` (user int32 from 0, user_id, items list<int32>, and where known ratings list<float32>,
            timestamps list<int64>), `items` (item int32 from 1, item_id, title) and, for reviews, `interactions` (one
            row for each item of `sequences`, in that order: summary, review).
        folder: the data stage where they lie as Parquet, instead of `tables`.
    """

    def __init__(self, tables: Mapping[str, pa.Table] | None = None, *, folder: str | os.PathLike | None = None):
        self.folder = None if folder is None else Path(folder)
        self._tables = tables
        self._last_texts: tuple[tuple[str, bool], UserTexts] | None = None

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Self:
        """Opens a data stage.

        Raises:
            ValueError: a table is missing there.
        """
        for name in ("interactions", "items", "sequences"):
            if not (Path(folder) / f"{name}.parquet").is_file():
                raise ValueError(f"{Path(folder) / name}.parquet is missing: run recipes/prepare_data.py first.")
        return cls(folder=folder)

    def __len__(self) -> int:
        return len(self.sequences)

    def __repr__(self) -> str:
        sequences = self.sequences
        return f"LeaveOneOut(users={len(self)}, items={sequences.num_items}, interactions={len(sequences.items)})"

    @cached_property
    def sequences(self) -> Sequences:
        """The items of every user.

        Raises:
            ValueError: dense ids are not in order, or items are not in the catalogue.
        """
        table = self._columns("sequences", ["user", "items"])
        self._check_order("sequences", table["user"], 0)
        lists = pa.chunked_array(table["items"]).combine_chunks()
        offsets = np.concatenate([[0], np.cumsum(lists.value_lengths().to_numpy(), dtype=np.int64)])
        catalogue = catalogue_hash(self.item_ids)
        return Sequences(lists.flatten().to_numpy().astype(np.int32), offsets, len(self.item_ids), catalogue)

    @cached_property
    def user_ids(self) -> list[str]:
        """Raw ids, in the order of the users 0, 1, ..."""
        return self._columns("sequences", ["user_id"])["user_id"].to_pylist()

    @cached_property
    def item_ids(self) -> list[str]:
        """Raw ids of the items 1..n, in that order."""
        return self.catalogue["item_id"].to_pylist()

    @cached_property
    def titles(self) -> list[str]:
        """Titles of the items 1..n, in that order."""
        return self.catalogue["title"].to_pylist()

    @cached_property
    def ratings(self) -> np.ndarray:
        """float32 [interactions], NaN where unknown."""
        return self._numbers("ratings").astype(np.float32)

    @cached_property
    def times(self) -> np.ndarray:
        """float64 [interactions], seconds since 1970, NaN where unknown."""
        return self._numbers("timestamps")

    def texts(self, kind: str = "auto", *, train_only: bool = True) -> UserTexts:
        """What describes the interactions.

        Args:
            kind: "reviews" (summary and review), "titles", or "auto": reviews where the train part has any.
            train_only: leave out each user's last two interactions before anything else is looked at.

        Raises:
            ValueError: the kind is unknown or missing, or `interactions` are not those of `sequences`.
        """
        if kind not in TEXT_KINDS:
            raise ValueError(f"text must be auto, reviews or titles; got {kind!r}.")
        if self._last_texts is None or self._last_texts[0] != (kind, train_only):  # held once: texts may be large
            self._last_texts = (kind, train_only), self._read_texts(kind, train_only)
        return self._last_texts[1]

    def _read_texts(self, kind: str, train_only: bool) -> UserTexts:
        sequences = self.sequences
        kept = train_lengths(sequences.lengths) if train_only else sequences.lengths
        chosen = sequences.oldest(kept)
        reviews = None
        if kind != "titles":
            table = self._columns("interactions", ["summary", "review"])
            if len(table) not in (0, len(sequences.items)):
                raise ValueError(f"{self._name}: interactions has {len(table)} rows, sequences {len(sequences.items)}.")
            reviews = _join_reviews(table.filter(pa.array(chosen)) if len(table) else table)
            if reviews.null_count == len(reviews):
                if kind == "reviews":
                    raise ValueError(
                        f"{self._name} has no review text in its train part: ask for titles instead of reviews."
                    )
                reviews = None
        if reviews is None:
            titles = self.catalogue["title"].take(pa.array(sequences.items[chosen] - 1)).combine_chunks()
            texts = pc.if_else(pc.equal(titles, ""), pa.scalar(None, pa.string()), titles)
        encoded = (texts if reviews is None else reviews).dictionary_encode()
        text_ids = pc.fill_null(encoded.indices, -1).to_numpy().astype(np.int32)
        offsets = np.concatenate([[0], np.cumsum(kept)])
        found = "titles" if reviews is None else "reviews"
        return UserTexts(self.user_ids, offsets, text_ids, encoded.dictionary.to_pylist(), found)

    @cached_property
    def catalogue(self) -> pa.Table:
        """item int32 from 1, item_id, title."""
        table = self._columns("items", ["item", "item_id", "title"])
        self._check_order("items", table["item"], 1)
        return table

    @property
    def _name(self) -> str:
        return "the data" if self.folder is None else str(self.folder)

    def _columns(self, name: str, columns: Sequence[str]) -> pa.Table:
        if self.folder is not None:
            return read_table(self.folder / f"{name}.parquet", columns)
        table = self._tables.get(name, pa.table({}))
        return table.select([column for column in columns if column in table.column_names])

    def _check_order(self, name: str, ids: pa.ChunkedArray, first: int) -> None:
        if not np.array_equal(ids.to_numpy(), np.arange(first, first + len(ids))):
            raise ValueError(
                f"{self._name}/{name}.parquet: {name[:-1]} ids must be {first}, {first + 1}, ... in order; prepare the "
                "data again."
            )

    def _numbers(self, name: str) -> np.ndarray:
        """float64 [interactions] of a column of lists beside `items`; NaN for a null, a null list, a missing column."""
        values = np.full(len(self.sequences.items), np.nan)
        table = self._columns("sequences", [name])
        if name not in table.column_names:
            return values
        lists = pa.chunked_array(table[name]).cast(pa.list_(pa.float64())).combine_chunks()
        known = pc.is_valid(lists).to_numpy(zero_copy_only=False)
        lengths = pc.fill_null(lists.value_lengths(), 0).to_numpy()
        if not np.array_equal(lengths[known], self.sequences.lengths[known]):
            raise ValueError(f"{self._name}: {name} and items of some user differ in number; prepare the data again.")
        values[np.repeat(known, self.sequences.lengths)] = lists.flatten().to_numpy(zero_copy_only=False)
        return values


class RowLookup:
    """A table's `column` by the columns user and position (int); holds 16 bytes a row beside the table.

    Args:
        mask: bool [rows], which of the table's rows count; all by default.
    """

    def __init__(self, table: pa.Table, column: str, mask: np.ndarray | None = None):
        rows = np.arange(table.num_rows) if mask is None else np.flatnonzero(mask)
        keys = (table["user"].to_numpy().astype(np.int64)[rows] << 32) | table["position"].to_numpy()[rows]
        order = np.argsort(keys, kind="stable")
        self._keys, self._rows, self._column = keys[order], rows[order], table[column]

    def get(self, user: int, position: int) -> Any:
        """The value of that row as a Python object, None where there is no such row."""
        key = (user << 32) | position
        place = int(np.searchsorted(self._keys, key))
        if place == len(self._keys) or self._keys[place] != key:
            return None
        return self._column[int(self._rows[place])].as_py()


def _join_reviews(table: pa.Table) -> pa.Array:
    """Summary and review joined by a space; null where both are empty."""
    if not table.num_columns:
        return pa.array([], pa.string())
    parts = [pc.utf8_trim_whitespace(pc.fill_null(table[name].cast(pa.string()), "")) for name in ("summary", "review")]
    joined = pc.utf8_trim_whitespace(pc.binary_join_element_wise(*parts, " ")).combine_chunks()
    return pc.if_else(pc.equal(joined, ""), pa.scalar(None, pa.string()), joined)
