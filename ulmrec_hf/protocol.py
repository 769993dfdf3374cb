"""Leave-one-out in one place: what the splits are, and which item of which user is the target of each row."""

import numpy as np

SPLITS = ("train", "validation", "test")
EVALUATED = SPLITS[1:]
EVIDENCE = ("train", "all")  # what describes a user: the train part, or what its target is among too
HELD_OUT = 2  # a user's last item is the test target, the one before it the validation target
MIN_ITEMS = HELD_OUT + 1  # fewer leave nothing to train on
MISS = -1  # the label of a row whose candidates do not hold the target, or whose task ranks nothing


def train_lengths(lengths: np.ndarray) -> np.ndarray:
    """How many of each user's items are the train part, int64 [users], from how many there are in all."""
    return np.maximum(np.asarray(lengths, np.int64) - HELD_OUT, 0)


def target_positions(lengths: np.ndarray, split: str, train_positions: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a split, by user and then position: (users, positions), int64 [rows] each.

    A position is the place of the row's target in its user's items.

    Args:
        lengths: int [users], how many items every user has.
        split: "test" has every user's last position, "validation" the second last, "train" those of the train part but
            the first, which has no history.
        train_positions: how many of the newest train positions of each user; 0 = all.
    """
    lengths = np.asarray(lengths, np.int64)
    if split != "train":
        back = HELD_OUT + 1 - SPLITS.index(split)
        users = np.flatnonzero(lengths >= back)
        return users, lengths[users] - back
    counts = np.maximum(lengths - MIN_ITEMS, 0)
    if train_positions:
        counts = np.minimum(counts, train_positions)
    users = np.repeat(np.arange(len(lengths)), counts)
    after_last = np.repeat(np.cumsum(counts), counts)
    return users, lengths[users] - HELD_OUT - after_last + np.arange(len(users))
