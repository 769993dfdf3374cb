"""Which interactions are kept, in which order and under which numbers; the folder stage and `Interactions` share it.

Texts have no part in it, so that they may lie on disk: 20 bytes an interaction are held, and every id once.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..protocol import MIN_ITEMS
from ..tables import INTERACTIONS
from .columns import RAW_INTERACTIONS

logger = logging.getLogger(__name__)
TEXTS = pa.schema([RAW_INTERACTIONS.field("summary"), RAW_INTERACTIONS.field("review")])
_NOT_FILTERED = dict.fromkeys(
    ("user_minimum", "item_minimum", "users_below_minimum", "items_below_minimum", "below_minimum_interactions"), 0
)


@dataclass(frozen=True)
class Selection:
    """The interactions of a source, and which of them are kept.

    Attributes:
        name: what errors call the source.
        users, items: int32 [interactions], places in `user_ids` and `item_ids`; incomplete interactions are not there.
        times: int64 [interactions], seconds since 1970.
        ratings: float32 [interactions], NaN where unknown.
        user_ids, item_ids: raw ids in the order of their first appearance, string.
        catalogue: the items with a title, each once: `code` (place in `item_ids`), item_id, title, and what else.
        ordered: whether the order of the source is the order in time.
        rows: int64 [kept], ascending places in the arrays above.
        left_out: how many interactions were read, and how many were left out for which reason.
    """

    name: str
    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    ratings: np.ndarray
    user_ids: pa.Array
    item_ids: pa.Array
    catalogue: pa.Table
    ordered: bool
    rows: np.ndarray
    left_out: dict[str, int]

    def k_core(self, k: int) -> Self:
        """Keeps users and items with at least `k` interactions, and users with at least `MIN_ITEMS`.

        Raises:
            ValueError: `k` is negative, or none are left.
        """
        if k < 0:
            raise ValueError(f"k_core is {k}; it must be at least 0.")
        user_minimum = max(k, MIN_ITEMS)
        users, items = self.users[self.rows], self.items[self.rows]
        kept = k_core(users, items, user_minimum, k)
        if not len(kept):
            raise ValueError(
                f"No users and no items are left of {len(self.rows):,} interactions in {self.name}: no set of users "
                f"with at least {user_minimum} interactions and items with at least {k} exists. "
                + (
                    f"Lower k_core (now {k})."
                    if k > MIN_ITEMS
                    else "A user's last item is the test target and the one before the validation target."
                )
            )
        removed = {
            "users_below_minimum": len(np.unique(users)) - len(np.unique(users[kept])),
            "items_below_minimum": len(np.unique(items)) - len(np.unique(items[kept])),
            "below_minimum_interactions": len(users) - len(kept),
        }
        counts = {name: self.left_out[name] + count for name, count in removed.items()}
        minimums = {"user_minimum": user_minimum, "item_minimum": k}
        return replace(self, rows=self.rows[kept], left_out={**self.left_out, **minimums, **counts})

    def number(self) -> "Numbered":
        """Gives users and items dense numbers by sorted raw id, and puts the interactions in their final order."""
        user_codes, users = _dense(self.users[self.rows], self.user_ids)
        item_codes, items = _dense(self.items[self.rows], self.item_ids)
        # stable sorts, so that ties stay in the order of the source
        order = np.argsort(users, kind="stable") if self.ordered else np.lexsort((self.times[self.rows], users))
        rows = self.rows[order]
        return Numbered(
            source_rows=len(self.users),
            rows=rows,
            users=users[order].astype(np.int32),
            items=(items[order] + 1).astype(np.int32),  # 0 is padding
            times=self.times[rows],
            ratings=self.ratings[rows],
            user_ids=self.user_ids.take(pa.array(user_codes)),
            catalogue=_number_items(self.catalogue, item_codes),
        )


@dataclass(frozen=True)
class Numbered:
    """Interactions under dense numbers, sorted by user, then time, then place in the source.

    Attributes:
        source_rows: how many complete interactions the source has.
        rows: int64 [interactions], their places among those.
        users, items: int32 [interactions], from 0 and from 1.
        times, ratings: as in `Selection`.
        user_ids: raw ids of the users 0, 1, ...
        catalogue: one row an item: item int32 from 1, item_id, title, and what else the source has.
    """

    source_rows: int
    rows: np.ndarray
    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    ratings: np.ndarray
    user_ids: pa.Array
    catalogue: pa.Table

    def interactions(self, texts: pa.Table, part: slice) -> pa.Table:
        """A part of the table of schema `INTERACTIONS`; `texts` holds that part's summaries and reviews."""
        users, items, ratings = (pa.array(each) for each in (self.users[part], self.items[part], self._ratings(part)))
        columns = [
            users,
            self.user_ids.take(users),
            items,
            self.catalogue["item_id"].take(pc.subtract(items, 1)),
            pa.array(self.times[part]),
            ratings,
            texts["summary"],
            texts["review"],
        ]
        return pa.table(columns, schema=INTERACTIONS)

    def sequences(self) -> pa.Table:
        """One row a user: user int32, user_id, items list<int32>, ratings list<float32>, timestamps list<int64>."""
        offsets = pa.array(np.searchsorted(self.users, np.arange(len(self.user_ids) + 1)), pa.int32())
        columns = {
            "user": pa.array(np.arange(len(self.user_ids)), pa.int32()),
            "user_id": self.user_ids,
            "items": pa.ListArray.from_arrays(offsets, pa.array(self.items)),
            "ratings": pa.ListArray.from_arrays(offsets, self._ratings()),
            "timestamps": pa.ListArray.from_arrays(offsets, pa.array(self.times)),
        }
        return pa.table(columns)

    def counts(self) -> dict[str, int]:
        """How much there is."""
        return {
            "users": len(self.user_ids),
            "items": len(self.catalogue),
            "interactions": len(self.rows),
            "unknown_ratings": int(np.isnan(self.ratings).sum()),
        }

    def _ratings(self, part: slice = slice(None)) -> pa.Array:
        return pa.array(self.ratings[part], mask=np.isnan(self.ratings[part]))


def read_selection(
    batches: Iterator[pa.RecordBatch],
    catalogues: Iterator[pa.Table] | None,
    keep_texts: Callable[[pa.RecordBatch], Any],
    *,
    name: str,
    titles: str | None = None,
    ordered: bool = False,
) -> Selection:
    """Reads a source and leaves out what `Interactions` says; of equally early repeated pairs the first stays.

    Args:
        batches: raw interactions, in the order of the source.
        catalogues: tables of items; without them, an item's id is its title.
        keep_texts: takes batches of schema `TEXTS`, one for each of `batches`, with its complete interactions.
        name, titles: what errors call the sources of interactions and items.
        ordered: whether the order of the source is the order in time.

    Raises:
        ValueError: nothing is left; the message says why.
    """
    users, items, times, ratings, user_ids, item_ids, incomplete = _read(batches, keep_texts)
    if not len(users):
        raise ValueError(f"{name}: no usable interaction in it ({incomplete:,} rows, none with user, item and time).")
    catalogue = _catalogue(catalogues, item_ids)
    if not len(catalogue):
        raise ValueError(
            f"No items are left: none of the {len(item_ids):,} items in {name} has a title in {titles}. Check that "
            "both are of the same category and release, or leave the titles out."
        )
    titled = np.zeros(len(item_ids), bool)
    titled[catalogue["code"].to_numpy()] = True
    kept = np.flatnonzero(titled[items])
    rows = kept[_firsts(users[kept], items[kept], None if ordered else times[kept])]
    left_out = {
        "read_interactions": len(users) + incomplete,
        "incomplete_interactions": incomplete,
        "untitled_items": int(len(titled) - titled.sum()),
        "untitled_interactions": len(users) - len(kept),
        "repeated_interactions": len(kept) - len(rows),
        **_NOT_FILTERED,
    }
    return Selection(name, users, items, times, ratings, user_ids, item_ids, catalogue, ordered, rows, left_out)


def k_core(users: np.ndarray, items: np.ndarray, user_minimum: int, item_minimum: int) -> np.ndarray:
    """The largest subset of interactions in which every user and every item has its minimum.

    Args:
        users, items: int [n], numbers from 0.
        user_minimum, item_minimum: how many interactions each of the subset's users and items has at least.

    Returns:
        Ascending int64 positions in `users`.
    """
    kept = np.arange(len(users))
    while True:
        enough = (np.bincount(users)[users] >= user_minimum) & (np.bincount(items)[items] >= item_minimum)
        if enough.all():
            return kept
        users, items, kept = users[enough], items[enough], kept[enough]
        if not len(kept):
            return kept


def log_summary(summary: dict[str, int]) -> None:
    """Logs `Numbered.counts` and, as a warning, what was left out and why."""
    logger.info("%(users)s users, %(items)s items, %(interactions)s interactions", summary)
    reasons = {
        "incomplete_interactions": "%(incomplete_interactions)s rows without user, item or time",
        "untitled_interactions": "%(untitled_interactions)s interactions of %(untitled_items)s items without a title",
        "repeated_interactions": "%(repeated_interactions)s repeated (user, item) pairs",
        "below_minimum_interactions": "%(below_minimum_interactions)s interactions of %(users_below_minimum)s users "
        "with fewer than %(user_minimum)s and %(items_below_minimum)s items with fewer than %(item_minimum)s",
    }
    parts = [text % summary for name, text in reasons.items() if summary[name]]
    if parts:
        logger.warning("Left out: %s.", "; ".join(parts))
    if summary["unknown_ratings"]:
        logger.warning("%(unknown_ratings)s of %(interactions)s ratings are missing or unusable: left empty.", summary)


def _read(batches: Iterator[pa.RecordBatch], keep_texts: Callable[[pa.RecordBatch], Any]) -> tuple[Any, ...]:
    """Users, items, times and ratings of the complete interactions, the raw ids, and how many are not complete."""
    user_codes: dict[str, int] = {}
    item_codes: dict[str, int] = {}
    kinds = (np.int32, np.int32, np.int64, np.float32)
    parts = [tuple(np.zeros(0, kind) for kind in kinds)]
    incomplete = 0
    for batch in batches:
        rows = len(batch)
        usable = pc.and_(pc.is_valid(batch["user_id"]), pc.is_valid(batch["item_id"]))
        batch = batch.filter(pc.and_(usable, pc.is_valid(batch["timestamp"])))
        incomplete += rows - len(batch)
        keep_texts(batch.select(TEXTS.names))
        parts.append(
            (
                _codes(batch["user_id"], user_codes),
                _codes(batch["item_id"], item_codes),
                batch["timestamp"].to_numpy(),
                batch["rating"].to_numpy(zero_copy_only=False),
            )
        )
    columns = (np.concatenate(column, dtype=kind) for column, kind in zip(zip(*parts, strict=True), kinds, strict=True))
    return *columns, *(pa.array(list(codes), pa.string()) for codes in (user_codes, item_codes)), incomplete


def _codes(ids: pa.Array, codes: dict[str, int]) -> np.ndarray:
    """Numbers ids in the order in which they first appear."""
    encoded = ids.dictionary_encode()
    numbers = [codes.setdefault(name, len(codes)) for name in encoded.dictionary.to_pylist()]
    return np.array(numbers, np.int32)[encoded.indices.to_numpy()]


def _catalogue(catalogues: Iterator[pa.Table] | None, item_ids: pa.Array) -> pa.Table:
    """The titled items among `item_ids`, each once, as first met; `code` is its place in `item_ids`."""
    if catalogues is None:
        logger.warning("No titles are given: an item's id serves as its title.")
        return pa.table({"code": pa.array(np.arange(len(item_ids))), "item_id": item_ids, "title": item_ids})
    codes = {name: code for code, name in enumerate(item_ids.to_pylist())}
    tables = [pa.table({"code": pa.array([], pa.int64())})]
    for table in catalogues:
        rows, found = [], []
        for row, (name, title) in enumerate(zip(table["item_id"].to_pylist(), table["title"].to_pylist(), strict=True)):
            if title and (code := codes.pop(name, None)) is not None:  # the first of several entries counts
                rows.append(row)
                found.append(code)
        tables.append(table.take(pa.array(rows, pa.int64())).add_column(0, "code", pa.array(found, pa.int64())))
    return pa.concat_tables(tables, promote_options="default")


def _number_items(catalogue: pa.Table, codes: np.ndarray) -> pa.Table:
    """Items 1..n in the order of `codes`."""
    by_code = catalogue["code"].to_numpy()
    order = np.argsort(by_code)
    place = order[np.searchsorted(by_code[order], codes)]
    table = catalogue.drop_columns("code").take(place)
    first = ["item_id", "title"]
    table = table.select(first + [name for name in table.column_names if name not in first])
    return table.add_column(0, "item", pa.array(np.arange(1, len(codes) + 1), pa.int32()))


def _firsts(users: np.ndarray, items: np.ndarray, times: np.ndarray | None) -> np.ndarray:
    """Ascending positions of each (user, item) pair's first interaction in time, then in the source."""
    order = np.lexsort((items, users) if times is None else (times, items, users))
    users, items = users[order], items[order]
    first = np.ones(len(order), bool)
    first[1:] = (users[1:] != users[:-1]) | (items[1:] != items[:-1])
    return np.sort(order[first])


def _dense(codes: np.ndarray, ids: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Codes in use, by sorted id, and each interaction's place among them."""
    used = np.unique(codes)
    used = used[pc.sort_indices(ids.take(pa.array(used))).to_numpy()]
    place = np.zeros(len(ids), np.int64)
    place[used] = np.arange(len(used))
    return used, place[codes]
