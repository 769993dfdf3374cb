"""A small world with an obvious sequential pattern, as sequences and as a finished data stage."""

import numpy as np
import pyarrow as pa

from ulmrec_hf.files import hash_value, write_json, write_table

NUM_ITEMS = 30


def make_lists(users: int = 120, seed: int = 0) -> list[list[int]]:
    """Walks around a circle of items in steps of 1, sometimes 2: what comes next follows from the last item."""
    random = np.random.default_rng(seed)
    lists = []
    for _ in range(users):
        steps = np.cumsum(1 + (random.random(random.integers(5, 12)) < 0.1))
        lists.append(((random.integers(NUM_ITEMS) + steps) % NUM_ITEMS + 1).tolist())
    return lists


def item_ids(count: int = NUM_ITEMS) -> list[str]:
    return [f"item{number:03d}" for number in range(count)]


def titles(count: int = NUM_ITEMS) -> list[str]:
    """Two words each, both shared with other items."""
    return [f"{['red', 'green', 'blue'][item % 3]} thing{item // 3}" for item in range(count)]


def write_data_stage(folder, lists, ids):
    """Writes the tables of a data stage that the retrieval stage reads."""
    folder.mkdir(parents=True)
    write_table(
        folder / "sequences.parquet",
        pa.table(
            {
                "user": pa.array(range(len(lists)), pa.int32()),
                "user_id": [f"user{number:05d}" for number in range(len(lists))],
                "items": pa.array(lists, pa.list_(pa.int32())),
            }
        ),
    )
    write_table(
        folder / "items.parquet",
        pa.table({"item": pa.array(range(1, len(ids) + 1), pa.int32()), "item_id": ids, "title": titles(len(ids))}),
    )
    write_json(folder / "stage.json", {"settings": {}, "inputs": {}, "fingerprint": hash_value(lists)})
    return folder
