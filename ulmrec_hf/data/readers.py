"""Readers: every source becomes a stream of Arrow batches of interactions, and one of items.

Interactions have the columns of `INTERACTIONS`, in the order of the source; items have `item_id`, `title` and whatever
else their source holds, as strings. Nothing is left out or re-ordered here.
"""

import ast
import contextlib
import csv
import datetime
import gzip
import html
import io
import itertools
import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .arguments import DataArguments

CHUNK = 2**15  # rows held as Python objects at a time
INTERACTIONS = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("timestamp", pa.int64()),
        ("rating", pa.float32()),
        ("summary", pa.string()),
        ("review", pa.string()),
    ]
)
# Our name -> the spellings it is read from, best first.
ALIASES = {
    "user_id": ("user_id", "reviewerID"),
    "item_id": ("item_id", "parent_asin", "asin"),
    "timestamp": ("timestamp", "unixReviewTime"),
    "rating": ("rating", "overall"),
    "summary": ("summary",),
    "review": ("review", "reviewText", "text"),
    "items": ("items", "asins"),
    "timestamps": ("timestamps", "unixReviewTimes"),
    "ratings": ("ratings", "overall"),
    "title": ("title",),
}
REQUIRED = ("user_id", "item_id", "timestamp")
AMAZON_RATINGS = (1.0, 5.0)
MILLISECONDS = 10**11  # as seconds this is the year 5138, as milliseconds 1973

_ELEMENTS = (
    "a|abbr|b|big|blockquote|body|br|center|code|div|dd|dl|dt|em|font|h[1-6]|head|hr|html|i|img|input|li|link|meta|nobr|ol|p|pre|"
    "small|span|strike|strong|sub|sup|table|tbody|td|th|thead|title|tr|tt|u|ul|wbr"
)
# Names of elements only: `<a_3>` or `</s>` in a title is a stranger's text, which prompts neutralise, not formatting.
# The bounds keep a hostile title from costing quadratic time.
_TAG = re.compile(
    rf"<(script|style)\b.{{0,1000}}?</\1\s*>|<!--.{{0,1000}}?-->|</?(?:{_ELEMENTS}|script|style)(?:\s[^<>]*)?/?>",
    re.IGNORECASE | re.DOTALL,
)

Columns = dict[str, Sequence[Any] | pa.Array]


def read_interactions(args: DataArguments) -> Iterator[pa.RecordBatch]:
    """Streams the interactions of a source that is not synthetic, with the schema `INTERACTIONS`, in source order.

    A timestamp is in seconds since 1970 (0 where `sequences` has none); milliseconds and ISO 8601 dates are taken for
    what they are, dates without a zone as UTC. A value that is missing or cannot be used is null. Ratings of the amazon
    format are 1 to 5, others any finite number.

    Raises:
        ValueError: the source is missing, damaged or not what `data_format` says; the message names file and line.
    """
    if args.data_format == "sequences":
        return _sequences(_file(args.interactions, "interactions"))
    chunks = _columns(args.interactions, "interactions", args.data_format)
    return _interactions(chunks, args.interactions, amazon=args.data_format == "amazon")


def read_items(args: DataArguments) -> Iterator[pa.Table]:
    """Streams the items of `args.items` as tables of strings; a `title` is plain text, null where there is none.

    The file's name says what it is (.parquet, .csv, .json, .jsonl, each also with .gz); any other name is read as
    `data_format` says.

    Raises:
        ValueError: as for `read_interactions`.
    """
    return _items(_columns(args.items, "items", _items_format(args)), args.items)


def clean_title(title: str | None) -> str | None:
    """Plain text of a title: HTML entities resolved, HTML tags removed, white space collapsed; None if nothing is left.

    Text in angle brackets that is not an HTML element stays.
    """
    if not title:
        return None
    title = html.unescape(html.unescape(title))  # some releases escape twice
    return " ".join(_TAG.sub(" ", title).split()) or None


def check_source(args: DataArguments) -> None:
    """Checks that the files are there, so that a wrong path is told before anything is read.

    Raises:
        ValueError: one is missing; the message names the setting.
    """
    if args.interactions is not None and args.data_format != "hub":
        _file(args.interactions, "interactions")
    if args.items is not None and _items_format(args) != "hub":
        _file(args.items, "items")


def _items_format(args: DataArguments) -> str:
    suffixes = [suffix.lower() for suffix in Path(args.items).suffixes]
    known = {".parquet": "parquet", ".csv": "csv", ".json": "jsonl", ".jsonl": "jsonl"}
    return next((known[suffix] for suffix in suffixes if suffix in known), args.data_format)


def _file(path: str, setting: str) -> Path:
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "does not exist"
        raise ValueError(f"{setting}: {path} {what}. Set {setting} to a file.")
    return Path(path)


def _columns(source: str, setting: str, kind: str) -> Iterator[Columns]:
    if kind == "hub":
        return _hub_columns(source, setting)
    path = _file(source, setting)
    if kind == "csv":
        return _csv_columns(path)
    if kind == "parquet":
        return _parquet_columns(path)
    return _json_columns(path)


def _open(path: Path) -> BinaryIO:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"  # the content decides: downloads are often renamed
    return io.BufferedReader(gzip.open(path), 2**20) if packed else open(path, "rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields each line's number, from 1, and its text."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: not UTF-8 text ({error.reason}). Convert the file to UTF-8.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}: the gzip file is cut short or damaged after about line {number} ({error}). Download it again."
        ) from error


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        line = line.strip()
        if not line:
            continue
        try:
            # the 2014 metadata release is written as Python literals
            row = ast.literal_eval(line) if line.startswith("{'") else json.loads(line)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"{path}:{number}: not JSON ({error}): {_short(line)}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: not a JSON object: {_short(line)}")
        yield number, row


def _json_columns(path: Path) -> Iterator[Columns]:
    rows = (row for _, row in _json_rows(path))
    while chunk := list(itertools.islice(rows, CHUNK)):
        names = dict.fromkeys(itertools.chain.from_iterable(chunk))
        yield {name: [row.get(name) for row in chunk] for name in names}


def _csv_columns(path: Path) -> Iterator[Columns]:
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        names = next(reader, None)
        if names is None:
            raise ValueError(f"{path}: the file is empty; its first line must name the columns.")
        rows = _csv_rows(reader, [name.strip() for name in names], path)
        while chunk := list(itertools.islice(rows, CHUNK)):
            yield dict(zip((name.strip() for name in names), zip(*chunk, strict=True), strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not CSV ({error}).") from error


def _csv_rows(reader: Iterator[list[str]], names: list[str], path: Path) -> Iterator[list[str]]:
    for row in reader:
        if row and len(row) != len(names):
            raise ValueError(
                f"{path}:{reader.line_num}: {len(row)} fields, but the first line names {len(names)} columns: "
                f"{', '.join(names)}."
            )
        if row:
            yield row


def _parquet_columns(path: Path) -> Iterator[Columns]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=CHUNK):
                yield dict(zip(batch.schema.names, batch.columns, strict=True))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole Parquet file ({error}).") from error


def _hub_columns(source: str, setting: str) -> Iterator[Columns]:
    import datasets

    try:
        splits = datasets.load_dataset(source, streaming=True)
    except (OSError, ValueError) as error:  # not found, offline, or no data files in it
        raise ValueError(f"{setting}: the dataset {source!r} cannot be loaded: {error}") from error
    if "train" not in splits and len(splits) > 1:
        raise ValueError(f"{setting}: the dataset {source!r} has no split 'train', but {', '.join(splits)}.")
    yield from splits.get("train", next(iter(splits.values()))).iter(batch_size=CHUNK)


def _interactions(chunks: Iterator[Columns], source: str, amazon: bool) -> Iterator[pa.RecordBatch]:
    low, high = AMAZON_RATINGS if amazon else (-math.inf, math.inf)
    for number, columns in enumerate(chunks):
        if number == 0:
            _require(columns, REQUIRED, source)
        # the 2023 release calls a review's title "title"; elsewhere that would be the item's
        summary = ("summary", "title") if amazon or "parent_asin" in columns else ("summary",)
        rows = max(map(len, columns.values()), default=0)
        yield pa.record_batch(
            [
                _first([_ids(values) for values in _found(columns, ALIASES["user_id"])], pa.string(), rows),
                _first([_ids(values) for values in _found(columns, ALIASES["item_id"])], pa.string(), rows),
                _first(
                    [
                        _seconds(columns[name], milliseconds=amazon and name == "timestamp")
                        for name in ALIASES["timestamp"]
                        if name in columns
                    ],
                    pa.int64(),
                    rows,
                ),
                _first(
                    [_ratings(values, low, high) for values in _found(columns, ALIASES["rating"])], pa.float32(), rows
                ),
                _first([_texts(values) for values in _found(columns, summary)], pa.string(), rows),
                _first([_texts(values) for values in _found(columns, ALIASES["review"])], pa.string(), rows),
            ],
            schema=INTERACTIONS,
        )


def _items(chunks: Iterator[Columns], source: str) -> Iterator[pa.Table]:
    for number, columns in enumerate(chunks):
        if number == 0:
            _require(columns, ("item_id", "title"), source)
        rows = max(map(len, columns.values()), default=0)
        title = _first([_texts(values) for values in _found(columns, ALIASES["title"])], pa.string(), rows)
        table = {
            "item_id": _first([_ids(values) for values in _found(columns, ALIASES["item_id"])], pa.string(), rows),
            "title": pa.array([clean_title(text) for text in title.to_pylist()], pa.string()),
        }
        for name, values in columns.items():
            if name not in ("item", "item_id", "title"):
                table[name] = _texts(values)
        yield pa.table(table)


def _sequences(path: Path) -> Iterator[pa.RecordBatch]:
    seen = set()
    flat: dict[str, list] = {"user_id": [], "item_id": [], "timestamp": [], "rating": []}
    for number, row in _json_rows(path):
        if not seen:
            _require(row, ("user_id", "items"), path)
        user = _text(next(_found(row, ALIASES["user_id"]), None))
        items = next(_found(row, ALIASES["items"]), None)
        if not user or not isinstance(items, list):
            raise ValueError(f"{path}:{number}: a row needs a user_id (or reviewerID) and a list of items (or asins).")
        if user in seen:
            raise ValueError(f"{path}:{number}: user {user!r} has had a row before; a user's items belong in one row.")
        seen.add(user)
        for name, values in (
            ("timestamp", next(_found(row, ALIASES["timestamps"]), None) or [0] * len(items)),
            ("rating", next(_found(row, ALIASES["ratings"]), None) or [None] * len(items)),
        ):
            if not isinstance(values, list) or len(values) != len(items):
                raise ValueError(
                    f"{path}:{number}: user {user!r} has {len(items)} items, but not as many {name}s: "
                    f"{_short(repr(values))}."
                )
            flat[name] += values
        flat["user_id"] += [user] * len(items)
        flat["item_id"] += items
        if len(flat["user_id"]) >= CHUNK:
            yield _sequence_batch(flat)
            flat = {name: [] for name in flat}
    if flat["user_id"]:
        yield _sequence_batch(flat)


def _sequence_batch(flat: dict[str, list]) -> pa.RecordBatch:
    nothing = pa.nulls(len(flat["user_id"]), pa.string())
    return pa.record_batch(
        [
            pa.array(flat["user_id"], pa.string()),
            _ids(flat["item_id"]),
            pc.fill_null(_seconds(flat["timestamp"], milliseconds=False), 0),
            _ratings(flat["rating"], -math.inf, math.inf),
            nothing,
            nothing,
        ],
        schema=INTERACTIONS,
    )


def _require(columns: Columns, fields: Sequence[str], source: Any) -> None:
    for name in fields:
        if not any(alias in columns for alias in ALIASES[name]):
            raise ValueError(
                f"{source}: no column {' or '.join(ALIASES[name])}; found: {', '.join(map(str, columns))}. "
                "Rename the column, or set data_format to what the file is."
            )


def _found(columns: Columns, names: Sequence[str]) -> Iterator[Any]:
    return (columns[name] for name in names if name in columns)


def _first(arrays: list[pa.Array], kind: pa.DataType, rows: int) -> pa.Array:
    """The first value that is not null in each row."""
    if len(arrays) == 1:
        return arrays[0]
    return pc.coalesce(*arrays) if arrays else pa.nulls(rows, kind)


def _texts(values: Sequence[Any] | pa.Array) -> pa.Array:
    if isinstance(values, pa.Array):
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            return values.cast(pa.string())
        values = values.to_pylist()
    try:
        return pa.array(values, pa.string())
    except (pa.ArrowException, UnicodeEncodeError):
        return pa.array([_text(value) for value in values], pa.string())


def _text(value: Any) -> str | None:
    if value is None or value != value:
        return None
    if isinstance(value, list | tuple) and not any(isinstance(part, list | tuple | dict) for part in value):
        value = " ".join(str(part) for part in value if part is not None)
    elif isinstance(value, list | tuple | dict):
        value = json.dumps(value, ensure_ascii=False, default=str)
    elif isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of whole ids with gaps arrives as floats
    # JSON may spell half of a surrogate pair, which is no character
    return str(value).encode("utf-8", "replace").decode("utf-8")


def _ids(values: Sequence[Any] | pa.Array) -> pa.Array:
    texts = _texts(values)
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)


def _ratings(values: Sequence[Any] | pa.Array, low: float, high: float) -> pa.Array:
    values = values.to_pylist() if isinstance(values, pa.Array) else values
    # one by one: Arrow would take true for 1
    exact = pa.array([_number(value) for value in values], pa.float64())
    numbers = exact.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    return pa.array(numbers, mask=~(np.isfinite(numbers) & (numbers >= low) & (numbers <= high)))


def _seconds(values: Sequence[Any] | pa.Array, milliseconds: bool) -> pa.Array:
    values = values.to_pylist() if isinstance(values, pa.Array) else values
    try:
        times = pa.array(values, pa.int64())
    except (pa.ArrowException, OverflowError):
        times = pa.array([_time(value) for value in values], pa.int64())
    if milliseconds:
        return pc.divide(times, 1000)
    return pc.if_else(pc.greater_equal(times, MILLISECONDS), pc.divide(times, 1000), times)


def _time(value: Any) -> int | None:
    number = _number(value)
    if number is None and isinstance(value, str | datetime.date):
        with contextlib.suppress(ValueError):
            time = datetime.datetime.fromisoformat(str(value).strip())
            number = time.replace(tzinfo=time.tzinfo or datetime.UTC).timestamp()
    return int(number) if number is not None and abs(number) < 2**62 else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _short(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[:length] + "..."
