"""A small world for the tests of the alignment tasks, written by hand."""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from ulmrec_hf.tables import LeaveOneOut
from ulmrec_hf.tasks.arguments import TaskArguments
from ulmrec_hf.tasks.rows import TaskRows
from ulmrec_hf.user_index import UserIndex

USERS, ITEMS, K = 6, 40, 6


@dataclass
class World:
    """What rows are made from."""

    data: LeaveOneOut
    candidates: pa.Table
    preferences: pa.Table
    users: UserIndex | None

    def items(self, user: int) -> list[int]:
        return self.data.sequences[user].tolist()

    def rows(self, tokenizer, **settings) -> TaskRows:
        return TaskRows(task_args(**settings), self.data, self.candidates, self.preferences, self.users, tokenizer)

    def of_kind(self, kind: str) -> "World":
        """The same, users spelled otherwise."""
        return replace(self, users=UserIndex(self.users.user_ids, self.users.codes, 8, kind))

    def with_preferences(self, text: str, user: int | None = None) -> "World":
        """The same, with other preferences for one user or all."""
        rows = self.preferences.to_pylist()
        changed = [{**row, "preference": text} if user in (None, row["user"]) else row for row in rows]
        return replace(self, preferences=pa.Table.from_pylist(changed))


def task_args(**settings) -> TaskArguments:
    fixed = {"num_candidates": K, "train_positions": 2, "max_history": 4, "task_seed": 1, "anonymous_share": 0.0}
    return TaskArguments(**fixed | settings)


def make_world(users=USERS, held_out=(0, 0), titles=None, ratings=None, user_ids=None) -> World:
    """Makes the world.

    Args:
        held_out: shifts every user's validation and test item, and what follows from them.
        titles, ratings: other than "thing 7", and a number that follows from the item.
        user_ids: other than u0, u1, ...
    """
    rng = np.random.default_rng(7)
    user_ids = user_ids or [f"u{user}" for user in range(users)]
    sequences, candidates, preferences = [], [], []
    for user, user_id in enumerate(user_ids):
        items = (rng.permutation(ITEMS)[: 7 + user % 3] + 1).tolist()
        others = [item for item in range(1, ITEMS + 1) if item not in items]
        for place, shift in zip((-2, -1), held_out, strict=True):
            if shift:
                items[place] = others[-shift]
        sequences.append({"user": user, "user_id": user_id, "items": items, "ratings": [i % 5 + 1 for i in items]})
        train = len(items) - 2
        for position in range(1, len(items)):
            split = "train" if position < train else "validation" if position == train else "test"
            near = [item for item in range(1, ITEMS + 1) if item not in items[:position]]
            ranked = sorted(near, key=lambda item: (item * 7 + user + position) % ITEMS)[:K]
            if user % 2 and items[position] not in ranked:  # every second user's target is found
                ranked[2] = items[position]
            candidates.append({"user": user, "split": split, "position": position, "items": ranked})
        for position in range(1, train + 1):
            preferences.append({"user": user, "position": position, "preference": f"likes thing {items[position - 1]}"})
    numbers = range(1, ITEMS + 1)
    tables = {
        "sequences": pa.table(
            {
                "user": pa.array(range(users), pa.int32()),
                "user_id": user_ids,
                "items": pa.array([row["items"] for row in sequences], pa.list_(pa.int32())),
                "ratings": pa.array(ratings or [row["ratings"] for row in sequences], pa.list_(pa.float32())),
            }
        ),
        "items": pa.table(
            {
                "item": pa.array(numbers, pa.int32()),
                "item_id": [f"i{item}" for item in numbers],
                "title": [(titles or {}).get(item, f"thing {item}") for item in numbers],
            }
        ),
    }
    codes = np.array([[user // 8, user % 8, 3, 7] for user in range(users)], np.uint16)
    return World(
        LeaveOneOut(tables),
        pa.Table.from_pylist(candidates),
        pa.Table.from_pylist(preferences),
        UserIndex(user_ids, codes, 8),
    )


def only(rows: TaskRows, task: str, split: str, user: int) -> dict:
    """The first row of a user."""
    return next(row for row in rows.rows(task, split) if row["user"] == user)


def section(prompt: str, name: str) -> str:
    """What stands under a header of a prompt."""
    return prompt.split(f"### {name}:\n")[1].split("\n### ")[0]
