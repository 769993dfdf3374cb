"""From a source of interactions to the three tables that every later stage reads: interactions, items, sequences.

One pass over the source puts texts aside on disk and keeps 20 bytes an interaction; filters and order are then computed
on arrays, and a second pass, over what was put aside, brings the texts into their final order bucket by bucket. Memory
thus grows with the number of ids and interactions, never with the texts.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from ..files import hash_file, write_json, write_table
from ..stages import run_stage
from .arguments import DataArguments
from .readers import INTERACTIONS, check_source, read_interactions, read_items

logger = logging.getLogger(__name__)
MIN_USER_INTERACTIONS = 3  # one each for train, validation and test
BUCKET_ROWS = 2**17  # interactions sorted in memory at a time
MAX_BUCKETS = 256  # all are open at once
TABLE = pa.schema(
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


def prepare_data(args: DataArguments, output_dir: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """Reads, filters, numbers and writes a source of interactions; returns the stage's folder, `output_dir/data`.

    It holds `interactions.parquet`, `items.parquet`, `sequences.parquet` and `summary.json`. In this order are left
    out, and counted: rows without user, item or time; interactions of items without a title; repeated (user, item)
    pairs, of which the earliest stays; what the k-core filter removes, and users with fewer than 3 interactions. Equal
    sources and settings give equal bytes.

    Raises:
        ValueError: the source cannot be used, or nothing of it is left; the message says why and what to change.
        OSError: the disk refuses the write. In either case what stood in the folder before is untouched.
    """
    check_source(args)
    output_dir = Path(output_dir)
    settings: dict[str, Any] = {"data_format": args.data_format, "k_core": args.k_core}
    if args.data_format == "synthetic":
        settings |= {"synthetic_users": args.synthetic_users, "synthetic_seed": args.synthetic_seed}
    inputs = {
        name: hash_file(source) if Path(source).is_file() else source
        for name, source in (("interactions", args.interactions), ("items", args.items))
        if source is not None
    }
    try:
        return run_stage(
            output_dir / "data", settings, inputs, lambda folder: _build(args, folder), overwrite=overwrite
        )
    except OSError as error:
        if error.filename is not None:
            raise
        # Arrow's errors do not say which file was being written
        raise OSError(error.errno, f"could not write ({error})", str(output_dir / "data")) from error


def load_sequences(folder: str | os.PathLike) -> pa.Table:
    """One row a user: user int32, user_id, items list<int32>, ratings list<float32>, timestamps list<int64>."""
    return pq.read_table(Path(folder) / "sequences.parquet")


def load_items(folder: str | os.PathLike) -> pa.Table:
    """One row an item: item int32 from 1, item_id, title, and what else the source has."""
    return pq.read_table(Path(folder) / "items.parquet")


def k_core(users: np.ndarray, items: np.ndarray, user_minimum: int, item_minimum: int) -> np.ndarray:
    """The interactions of the largest subset in which every user and every item has its minimum.

    Args:
        users: int array [n] of user numbers from 0.
        items: int array [n] of item numbers from 0.

    Returns:
        Ascending int64 array of positions in `users`.
    """
    kept = np.arange(len(users))
    while True:
        enough = (np.bincount(users)[users] >= user_minimum) & (np.bincount(items)[items] >= item_minimum)
        if enough.all():
            return kept
        users, items, kept = users[enough], items[enough], kept[enough]
        if not len(kept):
            return kept


@dataclass
class _Source:
    """All interactions of a source, in its order, with numbers for ids; the texts lie on disk."""

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    ratings: np.ndarray  # NaN = unknown
    user_ids: pa.Array
    item_ids: pa.Array
    incomplete: int


def _build(args: DataArguments, folder: Path) -> None:
    if args.data_format == "synthetic":
        from .synthetic import synthetic_interactions

        interactions, items = synthetic_interactions(args.synthetic_users, args.synthetic_seed)
        batches = iter(interactions.select(INTERACTIONS.names).cast(INTERACTIONS).to_batches(max_chunksize=BUCKET_ROWS))
        catalogues = iter([items])
    else:
        batches = read_interactions(args)
        catalogues = read_items(args) if args.items else None

    work = folder / "work"
    work.mkdir()
    source = _read(batches, work / "texts.arrow")
    name = args.interactions or "the toy world"
    if not len(source.users):
        raise ValueError(
            f"{name}: no usable interaction in it ({source.incomplete:,} rows, none with user, item and time)."
        )

    catalogue = _catalogue(catalogues, source.item_ids)
    if not len(catalogue):
        raise ValueError(
            f"No items are left: none of the {len(source.item_ids):,} items in {name} has a title in {args.items}. "
            "Check that both files are of the same category and release, or leave items unset."
        )
    titled = np.zeros(len(source.item_ids), bool)
    titled[catalogue["code"].to_numpy()] = True

    kept = np.flatnonzero(titled[source.items])
    untitled = len(source.items) - len(kept)
    in_order = args.data_format == "sequences"  # the order of its rows is the order in time
    kept = kept[_firsts(source.users[kept], source.items[kept], None if in_order else source.times[kept])]
    repeated = len(source.items) - untitled - len(kept)
    user_minimum = max(args.k_core, MIN_USER_INTERACTIONS)
    candidates = kept
    kept = candidates[k_core(source.users[candidates], source.items[candidates], user_minimum, args.k_core)]
    if not len(kept):
        raise ValueError(
            f"No users and no items are left of {len(candidates):,} interactions in {name}: no set of users with at "
            f"least {user_minimum} interactions and items with at least {args.k_core} exists. "
            + (
                f"Lower k_core (now {args.k_core})."
                if args.k_core > MIN_USER_INTERACTIONS
                else "A user's last item is the test target and the one before the validation target."
            )
        )

    user_codes, users = _dense(source.users[kept], source.user_ids)
    item_codes, items = _dense(source.items[kept], source.item_ids)
    items = items + 1  # 0 is padding
    # stable sorts, so that ties stay in the order of the source
    order = np.argsort(users, kind="stable") if in_order else np.lexsort((source.times[kept], users))
    rows = kept[order]
    users, items = users[order].astype(np.int32), items[order].astype(np.int32)
    user_ids, item_ids = source.user_ids.take(pa.array(user_codes)), source.item_ids.take(pa.array(item_codes))

    empty = _write_interactions(folder / "interactions.parquet", work, source, rows, users, items, user_ids, item_ids)
    shutil.rmtree(work)
    ratings = source.ratings[rows]
    offsets = pa.array(np.searchsorted(users, np.arange(len(user_ids) + 1)), pa.int32())
    columns = {
        "user": pa.array(np.arange(len(user_ids)), pa.int32()),
        "user_id": user_ids,
        "items": pa.ListArray.from_arrays(offsets, pa.array(items)),
        "ratings": pa.ListArray.from_arrays(offsets, pa.array(ratings, mask=np.isnan(ratings))),
        "timestamps": pa.ListArray.from_arrays(offsets, pa.array(source.times[rows])),
    }
    write_table(folder / "sequences.parquet", pa.table(columns))
    write_table(folder / "items.parquet", _number_items(catalogue, item_codes))

    summary = {
        "users": len(user_ids),
        "items": len(item_ids),
        "interactions": len(rows),
        "unknown_ratings": int(np.isnan(ratings).sum()),
        "empty_reviews": empty,
        "read_interactions": len(source.users) + source.incomplete,
        "incomplete_interactions": source.incomplete,
        "untitled_items": int(len(titled) - titled.sum()),
        "untitled_interactions": untitled,
        "repeated_interactions": repeated,
        "user_minimum": user_minimum,
        "item_minimum": args.k_core,
        "users_below_minimum": len(np.unique(source.users[candidates])) - len(user_ids),
        "items_below_minimum": len(np.unique(source.items[candidates])) - len(item_ids),
        "below_minimum_interactions": len(candidates) - len(rows),
    }
    write_json(folder / "summary.json", summary)
    _tell(summary)


def _read(batches: Iterator[pa.RecordBatch], texts: Path) -> _Source:
    """Pass 1: ids, times and ratings into arrays, texts into a file."""
    user_codes: dict[str, int] = {}
    item_codes: dict[str, int] = {}
    parts: list[tuple[np.ndarray, ...]] = []
    incomplete = 0
    schema = pa.schema([INTERACTIONS.field("summary"), INTERACTIONS.field("review")])
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with (
        pa.OSFile(str(texts), "wb") as file,
        pa.ipc.new_stream(file, schema, options=options) as writer,
        tqdm(desc="Reading interactions", unit=" rows", unit_scale=True) as progress,
    ):
        for batch in batches:
            progress.update(len(batch))
            usable = pc.and_(pc.is_valid(batch["user_id"]), pc.is_valid(batch["item_id"]))
            usable = pc.and_(usable, pc.is_valid(batch["timestamp"]))
            rows = len(batch)
            batch = batch.filter(usable)
            incomplete += rows - len(batch)
            writer.write_batch(batch.select(schema.names))
            parts.append(
                (
                    _codes(batch["user_id"], user_codes),
                    _codes(batch["item_id"], item_codes),
                    batch["timestamp"].to_numpy(),
                    batch["rating"].to_numpy(zero_copy_only=False),
                )
            )
    kinds = (np.int32, np.int32, np.int64, np.float32)
    empty = tuple(np.zeros(0, kind) for kind in kinds)
    users, items, times, ratings = (
        np.concatenate(columns, dtype=kind)
        for columns, kind in zip(zip(empty, *parts, strict=True), kinds, strict=True)
    )
    return _Source(
        users,
        items,
        times,
        ratings,
        pa.array(list(user_codes), pa.string()),
        pa.array(list(item_codes), pa.string()),
        incomplete,
    )


def _codes(ids: pa.Array, codes: dict[str, int]) -> np.ndarray:
    """Numbers ids in the order in which they first appear."""
    encoded = ids.dictionary_encode()
    numbers = [codes.setdefault(name, len(codes)) for name in encoded.dictionary.to_pylist()]
    return np.array(numbers, np.int32)[encoded.indices.to_numpy()]


def _catalogue(catalogues: Iterator[pa.Table] | None, item_ids: pa.Array) -> pa.Table:
    """The titled items among `item_ids`, each once, as first met; `code` is its place in `item_ids`."""
    if catalogues is None:
        logger.warning("No items file is given: an item's id serves as its title.")
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


def _write_interactions(
    path: Path,
    work: Path,
    source: _Source,
    rows: np.ndarray,
    users: np.ndarray,
    items: np.ndarray,
    user_ids: pa.Array,
    item_ids: pa.Array,
) -> int:
    """Pass 2: deals the texts out to buckets of final places, then sorts and appends bucket by bucket.

    Returns:
        How many of the interactions have an empty review.
    """
    size = max(BUCKET_ROWS, -(-len(rows) // MAX_BUCKETS))
    count = -(-len(rows) // size)
    place = np.full(len(source.users), -1, np.int64)
    place[rows] = np.arange(len(rows))
    empty = 0
    with tqdm(total=2 * len(rows), desc="Writing interactions", unit=" rows", unit_scale=True) as progress:
        buckets = [work / f"{bucket}.arrow" for bucket in range(count)]
        _deal(work / "texts.arrow", buckets, place, size, progress)
        with pq.ParquetWriter(path, TABLE, compression="zstd") as writer:
            for number, bucket in enumerate(buckets):
                part = slice(number * size, (number + 1) * size)
                with pa.OSFile(str(bucket)) as file:
                    texts = pa.ipc.open_stream(file).read_all().sort_by("place")
                bucket.unlink()
                ratings = source.ratings[rows[part]]
                writer.write_table(
                    pa.table(
                        [
                            pa.array(users[part]),
                            user_ids.take(pa.array(users[part])),
                            pa.array(items[part]),
                            item_ids.take(pa.array(items[part] - 1)),
                            pa.array(source.times[rows[part]]),
                            pa.array(ratings, mask=np.isnan(ratings)),
                            texts["summary"],
                            texts["review"],
                        ],
                        schema=TABLE,
                    )
                )
                trimmed = pc.fill_null(pc.utf8_trim_whitespace(texts["review"]), "")
                empty += pc.sum(pc.equal(trimmed, "")).as_py()
                progress.update(len(texts))
    return empty


def _deal(texts: Path, buckets: list[Path], place: np.ndarray, size: int, progress: tqdm) -> None:
    schema = pa.schema([("place", pa.int64()), INTERACTIONS.field("summary"), INTERACTIONS.field("review")])
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with contextlib.ExitStack() as stack:
        writers = []
        for bucket in buckets:
            file = stack.enter_context(pa.OSFile(str(bucket), "wb"))
            writers.append(stack.enter_context(pa.ipc.new_stream(file, schema, options=options)))
        start = 0
        for batch in pa.ipc.open_stream(stack.enter_context(pa.OSFile(str(texts)))):
            places = place[start : start + len(batch)]
            start += len(batch)
            order = np.argsort(places)
            order = order[np.searchsorted(places[order], 0) :]  # -1 = left out
            batch = batch.take(pa.array(order)).add_column(0, "place", pa.array(places[order]))
            edges = np.searchsorted(places[order], np.arange(len(writers) + 1) * size)
            for bucket in np.flatnonzero(np.diff(edges)):
                writers[bucket].write_batch(batch.slice(edges[bucket], edges[bucket + 1] - edges[bucket]))
            progress.update(len(order))
    texts.unlink()


def _tell(summary: dict[str, int]) -> None:
    logger.info("%(users)s users, %(items)s items, %(interactions)s interactions", summary)
    told = {
        "incomplete_interactions": "%(incomplete_interactions)s rows without user, item or time",
        "untitled_interactions": "%(untitled_interactions)s interactions of %(untitled_items)s items without a title",
        "repeated_interactions": "%(repeated_interactions)s repeated (user, item) pairs",
        "below_minimum_interactions": "%(below_minimum_interactions)s interactions of %(users_below_minimum)s users "
        "with fewer than %(user_minimum)s and %(items_below_minimum)s items with fewer than %(item_minimum)s",
    }
    parts = [text % summary for name, text in told.items() if summary[name]]
    if parts:
        logger.warning("Left out: %s.", "; ".join(parts))
    if summary["unknown_ratings"]:
        logger.warning("%(unknown_ratings)s of %(interactions)s ratings are missing or unusable: left empty.", summary)
