"""Readers: every source becomes a stream of Arrow batches of raw interactions, and one of items."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from .arguments import READERS, DataArguments
from .columns import Columns, raw_interactions, raw_items, table_columns


@dataclass(frozen=True)
class Reader:
    """How a format is read.

    Attributes:
        columns: from a path to chunks of the file's columns, by name, in the order of the file; interactions have
            their names and types as `columns.raw_interactions` takes them.
        item_columns: the same for a file of items; `columns` by default.
        is_file: whether a source is a file, which must exist; False for what `columns` finds itself.
        amazon: whether the columns are those of the Amazon releases (see `columns.raw_interactions`).
        ordered: whether the order of the rows is each user's order in time, regardless of timestamps.
        generate: from a number of users and a seed to the tables of interactions and items, for a format that reads
            nothing.
    """

    columns: Callable[[str], Iterator[Columns]] | None = None
    item_columns: Callable[[str], Iterator[Columns]] | None = None
    is_file: bool = True
    amazon: bool = False
    ordered: bool = False
    generate: Callable[[int, int], tuple[pa.Table, pa.Table]] | None = None


def read_source(args: DataArguments) -> tuple[Iterator[pa.RecordBatch], Iterator[pa.Table] | None]:
    """Streams a source's interactions and, unless `args.items` is unset, its items.

    Raises:
        ValueError: the source is missing, damaged or not what `data_format` says; the message names file and line.
    """
    reader = READERS[args.data_format]
    if reader.generate is None:
        return read_interactions(args), read_items(args) if args.items else None
    interactions, items = reader.generate(args.synthetic_users, args.synthetic_seed)
    name = _name(args)
    return raw_interactions(table_columns(interactions), name), raw_items(table_columns(items), name)


def read_interactions(args: DataArguments) -> Iterator[pa.RecordBatch]:
    """Streams the interactions of a file or dataset: see `columns.raw_interactions` and `read_source`."""
    reader = READERS[args.data_format]
    _check(reader, args.interactions, "interactions")
    chunks = reader.columns(args.interactions)
    return raw_interactions(chunks, args.interactions, amazon=reader.amazon, ordered=reader.ordered)


def read_items(args: DataArguments) -> Iterator[pa.Table]:
    """Streams the items of `args.items`: see `columns.raw_items` and `read_source`.

    The file's name says what it is (.parquet, .csv, .json, .jsonl, each also with .gz); any other name is read as
    `data_format` says.
    """
    reader = _item_reader(args)
    _check(reader, args.items, "items")
    return raw_items((reader.item_columns or reader.columns)(args.items), args.items)


def check_source(args: DataArguments) -> None:
    """Checks that the files exist, so that a wrong path is reported before anything is read.

    Raises:
        ValueError: one is missing; the message names the setting.
    """
    if args.interactions is not None:
        _check(READERS[args.data_format], args.interactions, "interactions")
    if args.items is not None:
        _check(_item_reader(args), args.items, "items")


def source_settings(args: DataArguments) -> dict[str, Any]:
    """The keyword arguments of `selection.read_selection` for this source."""
    return {"name": _name(args), "titles": args.items, "ordered": READERS[args.data_format].ordered}


def _name(args: DataArguments) -> str:
    return args.interactions or f"the {args.data_format} data"


def _item_reader(args: DataArguments) -> Reader:
    suffixes = [suffix.lower() for suffix in Path(args.items).suffixes]
    known = {".parquet": "parquet", ".csv": "csv", ".json": "jsonl", ".jsonl": "jsonl"}
    return READERS[next((known[suffix] for suffix in suffixes if suffix in known), args.data_format)]


def _check(reader: Reader, path: str, setting: str) -> None:
    if reader.is_file and not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "does not exist"
        raise ValueError(f"{setting}: {path} {what}. Set {setting} to a file.")
