"""Writing files so that a kill or a full disk leaves either the old or the new, never a half."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a path beside `path` to write to; it is renamed to `path` when the block ends well, removed otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yields `<folder>.partial` to fill; it becomes `folder` when the block ends well, else it is removed."""
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        publish_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish_folder(partial: Path, folder: Path) -> None:
    """Renames `partial` to `folder`; what stood there is moved aside first and removed last."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON atomically, indented, ending in a newline. NaN is an error."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """What a UTF-8 file of JSON holds."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_table(path: str | os.PathLike, table: pa.Table) -> None:
    """Writes a Parquet file atomically; equal tables give equal bytes."""
    with atomic_path(path) as partial:
        pq.write_table(table, partial, compression="zstd")


def hash_value(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value, the same for equal values on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def hash_file(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
