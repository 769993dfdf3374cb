"""Data of users with a plain taste, made by hand, in memory or as a finished data stage."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from ulmrec_hf.files import write_json, write_table

TASTES = (
    ("sturdy", "camping", "tent"),
    ("cheap", "kitchen", "pan"),
    ("elegant", "garden", "lamp"),
    ("quiet", "office", "fan"),
)
WORDS = ("works", "arrived", "box", "today", "nice", "really", "thing", "again", "price", "colour")


def write_data_stage(folder: Path, users: int = 60, *, other_held_out: bool = False, **settings) -> Path:
    """Writes `data_tables` of these settings as a data stage."""
    tables = data_tables(users, other_held_out=other_held_out, **settings)
    return write_stage(folder, tables, f"made by hand {other_held_out}")


def write_stage(folder: Path, tables: Mapping[str, pa.Table], fingerprint: str) -> Path:
    """Writes tables as a finished data stage."""
    for name, table in tables.items():
        write_table(folder / f"{name}.parquet", table)
    write_json(folder / "stage.json", {"settings": {}, "inputs": {}, "fingerprint": fingerprint})
    return folder


def data_tables(
    users: int = 60, *, reviews: bool = True, other_held_out: bool = False, silent: tuple = ()
) -> dict[str, pa.Table]:
    """Interactions, items and sequences, as `LeaveOneOut` takes them.

    Args:
        reviews: give every interaction a review that expresses its user's taste; without, there are titles only.
        other_held_out: other items and texts for the last two interactions of every user; all else is the same.
        silent: users whose reviews are empty.
    """
    random = np.random.default_rng(0)
    titles = [f"{word} {taste[0]} {taste[2]}" for taste in TASTES for word in WORDS]
    lists, rows = [], {"user": [], "user_id": [], "item": [], "item_id": [], "summary": [], "review": []}
    for user in range(users):
        taste = user % len(TASTES)
        items = (random.permutation(len(WORDS))[: 5 + user % 4] + taste * len(WORDS) + 1).tolist()
        if other_held_out:
            items[-2:] = [(item + len(WORDS)) % len(titles) + 1 for item in items[-2:]]
        for position, item in enumerate(items):
            said = (
                f"{WORDS[random.integers(len(WORDS))]} {' '.join(TASTES[taste])} {WORDS[random.integers(len(WORDS))]}"
            )
            if other_held_out and position >= len(items) - 2:
                said = "zebra xylophone secret"
            speaks = reviews and user not in silent
            values = (
                user,
                f"user{user:04d}",
                item,
                f"item{item:04d}",
                "Fine" if taste and speaks else None,
                said if speaks else None,
            )
            for column, value in zip(rows.values(), values, strict=True):
                column.append(value)
        lists.append(items)
    types = [pa.int32(), pa.string(), pa.int32(), pa.string(), pa.string(), pa.string()]
    columns = {name: pa.array(column, kind) for (name, column), kind in zip(rows.items(), types, strict=True)}
    items = {
        "item": pa.array(range(1, len(titles) + 1), pa.int32()),
        "item_id": [f"item{item:04d}" for item in range(1, len(titles) + 1)],
        "title": titles,
    }
    sequences = {
        "user": pa.array(range(users), pa.int32()),
        "user_id": [f"user{user:04d}" for user in range(users)],
        "items": pa.array(lists, pa.list_(pa.int32())),
    }
    return {"interactions": pa.table(columns), "items": pa.table(items), "sequences": pa.table(sequences)}
