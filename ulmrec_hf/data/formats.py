"""The formats that the package reads, a record each; every file may be packed with gzip."""

import ast
import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from .columns import ALIASES, CHUNK, Columns, found, require, to_text
from .readers import Reader
from .synthetic import synthetic_interactions


def _open(path: str) -> BinaryIO:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"  # the content decides: downloads are often renamed
    return io.BufferedReader(gzip.open(path), 2**20) if packed else open(path, "rb")


def _lines(path: str) -> Iterator[tuple[int, str]]:
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


def _json_rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
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


def _json_columns(path: str) -> Iterator[Columns]:
    rows = (row for _, row in _json_rows(path))
    while chunk := list(itertools.islice(rows, CHUNK)):
        names = dict.fromkeys(itertools.chain.from_iterable(chunk))
        yield {name: [row.get(name) for row in chunk] for name in names}


def _csv_columns(path: str) -> Iterator[Columns]:
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        names = next(reader, None)
        if names is None:
            raise ValueError(f"{path}: the file is empty; its first line must name the columns.")
        names = [name.strip() for name in names]
        rows = _csv_rows(reader, names, path)
        while chunk := list(itertools.islice(rows, CHUNK)):
            yield dict(zip(names, zip(*chunk, strict=True), strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not CSV ({error}).") from error


def _csv_rows(reader: Iterator[list[str]], names: list[str], path: str) -> Iterator[list[str]]:
    for row in reader:
        if row and len(row) != len(names):
            raise ValueError(
                f"{path}:{reader.line_num}: {len(row)} fields, but the first line names {len(names)} columns: "
                f"{', '.join(names)}."
            )
        if row:
            yield row


def _parquet_columns(path: str) -> Iterator[Columns]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=CHUNK):
                yield dict(zip(batch.schema.names, batch.columns, strict=True))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole Parquet file ({error}).") from error


def _hub_columns(source: str) -> Iterator[Columns]:
    import datasets

    try:
        splits = datasets.load_dataset(source, streaming=True)
    except (OSError, ValueError) as error:  # not found, offline, or no data files in it
        raise ValueError(f"the dataset {source!r} cannot be loaded: {error}") from error
    if "train" not in splits and len(splits) > 1:
        raise ValueError(f"the dataset {source!r} has no split 'train', but {', '.join(splits)}.")
    yield from splits.get("train", next(iter(splits.values()))).iter(batch_size=CHUNK)


def _sequence_columns(path: str) -> Iterator[Columns]:
    """A row for each item of each user, in the order of the lists."""
    seen = set()
    flat: dict[str, list] = {"user_id": [], "item_id": [], "timestamp": [], "rating": []}
    for number, row in _json_rows(path):
        if not seen:
            require(row, ("user_id", "items"), path)
        user = to_text(next(found(row, ALIASES["user_id"]), None))
        items = next(found(row, ALIASES["items"]), None)
        if not user or not isinstance(items, list):
            raise ValueError(f"{path}:{number}: a row needs a user_id (or reviewerID) and a list of items (or asins).")
        if user in seen:
            raise ValueError(f"{path}:{number}: user {user!r} has had a row before; a user's items belong in one row.")
        seen.add(user)
        for name, values in (
            ("timestamp", next(found(row, ALIASES["timestamps"]), None) or [None] * len(items)),
            ("rating", next(found(row, ALIASES["ratings"]), None) or [None] * len(items)),
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
            yield flat
            flat = {name: [] for name in flat}
    if flat["user_id"]:
        yield flat


def _short(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[:length] + "..."


AMAZON = Reader(_json_columns, amazon=True)
CSV = Reader(_csv_columns)
JSONL = Reader(_json_columns)
PARQUET = Reader(_parquet_columns)
HUB = Reader(_hub_columns, is_file=False)
SEQUENCES = Reader(_sequence_columns, item_columns=_json_columns, ordered=True)
SYNTHETIC = Reader(generate=synthetic_interactions)
