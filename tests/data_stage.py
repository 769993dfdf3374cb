"""A finished data stage of users with a plain taste, written by hand: what the later stages read."""

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


def write_data_stage(
    folder: Path, users: int = 60, *, reviews: bool = True, other_held_out: bool = False, silent: tuple = ()
) -> Path:
    """Writes interactions, items and sequences.

    Args:
        reviews: give every interaction a review that tells of its user's taste; without, there are titles only.
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
            told = reviews and user not in silent
            values = (
                user,
                f"user{user:04d}",
                item,
                f"item{item:04d}",
                "Fine" if taste and told else None,
                said if told else None,
            )
            for column, value in zip(rows.values(), values, strict=True):
                column.append(value)
        lists.append(items)
    types = [pa.int32(), pa.string(), pa.int32(), pa.string(), pa.string(), pa.string()]
    columns = {name: pa.array(column, kind) for (name, column), kind in zip(rows.items(), types, strict=True)}
    write_table(folder / "interactions.parquet", pa.table(columns))
    numbers = range(1, len(titles) + 1)
    items = {"item": pa.array(numbers, pa.int32()), "item_id": [f"item{item:04d}" for item in numbers], "title": titles}
    write_table(folder / "items.parquet", pa.table(items))
    sequences = {
        "user": pa.array(range(users), pa.int32()),
        "user_id": [f"user{user:04d}" for user in range(users)],
        "items": pa.array(lists, pa.list_(pa.int32())),
    }
    write_table(folder / "sequences.parquet", pa.table(sequences))
    write_json(folder / "stage.json", {"settings": {}, "inputs": {}, "fingerprint": f"made by hand {other_held_out}"})
    return folder
