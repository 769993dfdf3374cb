"""A small world with an obvious sequential pattern, in memory and as a finished data stage."""

import numpy as np
import pyarrow as pa

from tests.data_stage import write_stage
from ulmrec_hf.files import hash_value
from ulmrec_hf.tables import INTERACTIONS, LeaveOneOut

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


def make_tables(lists: list[list[int]], ids: list[str]) -> dict[str, pa.Table]:
    """The tables of these users' items; they have no texts."""
    sequences = {
        "user": pa.array(range(len(lists)), pa.int32()),
        "user_id": [f"user{number:05d}" for number in range(len(lists))],
        "items": pa.array(lists, pa.list_(pa.int32())),
    }
    items = {"item": pa.array(range(1, len(ids) + 1), pa.int32()), "item_id": ids, "title": titles(len(ids))}
    return {
        "sequences": pa.table(sequences),
        "items": pa.table(items),
        "interactions": INTERACTIONS.empty_table(),
    }


def make_data(lists: list[list[int]], count: int = NUM_ITEMS) -> LeaveOneOut:
    """Users' items in memory, of a catalogue of `count` items."""
    return LeaveOneOut(make_tables(lists, item_ids(count)))


def with_targets(lists: list[list[int]], count: int = NUM_ITEMS) -> LeaveOneOut:
    """Data of which these lists are the train part: every user has item 1 as both targets."""
    return make_data([[*items, 1, 1] for items in lists], count)


def write_data_stage(folder, lists) -> LeaveOneOut:
    """Writes the tables to a finished data stage, and opens it."""
    return LeaveOneOut.load(write_stage(folder, make_tables(lists, item_ids()), hash_value(lists)))
