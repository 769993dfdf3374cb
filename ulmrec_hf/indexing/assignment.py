"""Unique codes for every user: nearest first, moved as little as possible where users collide."""

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np

from ..user_index import MAX_CODEBOOK_SIZE, check_indices, pack_codes
from .lift import prefix_groups

_DISTANCES = 2**22  # computed at once, 16 MB
_CACHED_NODES = 65_536


@dataclass(frozen=True)
class Assignment:
    """The codes of users, and what they are from; a row a user.

    Attributes:
        codes: uint16 [users, levels], different for all users.
        nearest: int64 [users, levels], the nearest codes, which several users may share.
        latents: float32 [users, code_dim].
        errors: by level, the mean squared length of `x_u - x_hat_u`, with `x_hat_u` decoded from the nearest codes up
            to that level.
        silent: how many users have nothing to be indexed by.
    """

    codes: np.ndarray
    nearest: np.ndarray
    latents: np.ndarray
    errors: list[float]
    silent: int


def nearest_codes(vectors: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
    """The nearest code at each level to the residual of the levels before, ignoring other users: int64 [users, levels].

    Args:
        vectors: float32 [users, dim].
        codebooks: float32 [levels, codebook_size, dim].
    """
    codes = np.empty((len(vectors), len(codebooks)), np.int64)
    chunk = max(1, _DISTANCES // codebooks.shape[1])
    for begin in range(0, len(vectors), chunk):
        residuals = vectors[begin : begin + chunk].copy()
        for level, codebook in enumerate(codebooks):
            nearest = _distances(residuals, codebook).argmin(axis=1)
            codes[begin : begin + chunk, level] = nearest
            residuals -= codebook[nearest]
    return codes


def count_collisions(codes: np.ndarray) -> int:
    """How many users share their codes with another user."""
    counts = np.bincount(prefix_groups(codes)[-1])
    return int(counts[counts > 1].sum())


def assign_unique(vectors: np.ndarray, codebooks: np.ndarray, nearest: np.ndarray | None = None) -> np.ndarray:
    """Codes of which no two users have the same.

    Users take their nearest codes. Where users of one prefix (all levels but the last) collide, the whole prefix group
    is assigned to the last level's codes at the least total squared distance. Only a group with more users than codes
    spills: its farthest users move to the nearest other prefix with room. Equal input gives equal codes.

    Args:
        vectors, codebooks: see `nearest_codes`.
        nearest: what it gave, where that is known already.

    Returns:
        uint16 [users, levels].

    Raises:
        ValueError: there are more users than codes, or a vector is not finite.
    """
    vectors, codebooks = _check(vectors, codebooks)
    levels, size, _ = codebooks.shape
    check_capacity(len(vectors), levels, size)
    codes = nearest_codes(vectors, codebooks) if nearest is None else nearest.copy()
    _spill(vectors, codebooks, codes)
    _settle(vectors, codebooks, codes)
    return codes.astype(np.uint16)


def assign_new(vectors: np.ndarray, codebooks: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Free codes near new users; the codes in use stay as they are.

    Each new user, in the given order, takes its nearest codes if they are free, else the nearest free code under the
    longest prefix of them that has room.

    Args:
        vectors, codebooks: see `nearest_codes`.
        used: int64 [users], the indices in use, packed by `pack_codes` and sorted (`UserIndex.keys`).

    Returns:
        uint16 [new users, levels], different from each other and from `used`.

    Raises:
        ValueError: there is not enough room, or a vector is not finite.
    """
    vectors, codebooks = _check(vectors, codebooks)
    levels, size, _ = codebooks.shape
    if len(used) + len(vectors) > size**levels:
        raise ValueError(
            f"{len(used)} of {size**levels} indices are in use, which leaves no room for {len(vectors)} more: train an "
            "indexer with more codes or levels."
        )
    tree = _Occupancy(used, levels, size, leaf_capacity=1)
    codes = nearest_codes(vectors, codebooks)
    for vector, row in zip(vectors, codes, strict=True):
        if tree.is_full(row):
            row[:] = tree.nearest_room(vector, row, codebooks)
        tree.add(row)
    return codes.astype(np.uint16)


class _Occupancy:
    """How many users stand under each node of the tree of codes; a node at `depth` is a prefix of that many codes."""

    def __init__(self, keys: np.ndarray, depth: int, size: int, leaf_capacity: int):
        self.keys, self.depth, self.size, self.leaf_capacity = keys, depth, size, leaf_capacity  # keys: sorted
        self.added = Counter()  # (depth, node) -> users added since `keys` was sorted
        self._children: dict[tuple[int, int], np.ndarray] = {}  # of nodes that were asked for, kept up to date

    def capacity(self, depth: int) -> int:
        return self.leaf_capacity * self.size ** (self.depth - depth)

    def is_full(self, codes: np.ndarray) -> bool:
        depth, node = len(codes), self._node(codes)
        width = self.size ** (self.depth - depth)
        before, after = np.searchsorted(self.keys, [node * width, (node + 1) * width])
        return bool(after - before + self.added[depth, node] >= self.capacity(depth))

    def children(self, codes: np.ndarray) -> np.ndarray:
        """int64 [size]: the users under each child of a node."""
        depth, node = len(codes), self._node(codes)
        if (depth, node) not in self._children:
            if len(self._children) == _CACHED_NODES:
                self._children.clear()
            first, width = node * self.size, self.size ** (self.depth - depth - 1)
            counts = np.diff(np.searchsorted(self.keys, (first + np.arange(self.size + 1)) * width))
            counts += [self.added[depth + 1, child] for child in range(first, first + self.size)]
            self._children[depth, node] = counts
        return self._children[depth, node]

    def add(self, codes: np.ndarray) -> None:
        node = 0
        self.added[0, 0] += 1
        for depth, code in enumerate(codes.tolist()):
            if (depth, node) in self._children:
                self._children[depth, node][code] += 1
            node = node * self.size + code
            self.added[depth + 1, node] += 1

    def nearest_room(self, vector: np.ndarray, codes: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
        """Up from `codes` to the first node with room, then down, each time to the nearest child with room."""
        codes = codes.copy()
        depth = self.depth - 1
        while self.is_full(codes[:depth]):
            depth -= 1
        residual = _residuals(vector[None], codebooks, codes[None, :depth])
        for level in range(depth, self.depth):
            distances = _distances(residual, codebooks[level])[0]
            distances[self.children(codes[:level]) >= self.capacity(level + 1)] = np.inf
            codes[level] = distances.argmin()
            residual -= codebooks[level][codes[level]]
        return codes

    def _node(self, codes: np.ndarray) -> int:
        node = 0
        for code in codes.tolist():
            node = node * self.size + code
        return node


def _spill(vectors: np.ndarray, codebooks: np.ndarray, codes: np.ndarray) -> None:
    """Moves users out of prefixes that hold more users than the last level has codes; changes `codes` in place."""
    levels, size, _ = codebooks.shape
    prefixes = pack_codes(codes[:, :-1], size)
    order = prefixes.argsort(kind="stable")
    begins = np.flatnonzero(np.diff(prefixes[order], prepend=-1))
    ends = np.append(begins[1:], len(order))
    overfull = ends - begins > size
    if not overfull.any():
        return
    moved = []
    for begin, end in zip(begins[overfull], ends[overfull], strict=True):
        members = order[begin:end]
        left_over = (_residuals(vectors[members], codebooks, codes[members, :-1]) ** 2).sum(axis=1)
        moved.append(members[np.argsort(left_over, kind="stable")][size:])
    moved = np.concatenate(moved)
    tree = _Occupancy(np.sort(np.delete(prefixes, moved)), levels - 1, size, leaf_capacity=size)
    for user in moved:
        codes[user, :-1] = tree.nearest_room(vectors[user], codes[user, :-1], codebooks)
        tree.add(codes[user, :-1])
    residuals = _residuals(vectors[moved], codebooks, codes[moved, :-1])
    codes[moved, -1] = _distances(residuals, codebooks[-1]).argmin(axis=1)


def _settle(vectors: np.ndarray, codebooks: np.ndarray, codes: np.ndarray) -> None:
    """Gives the users of a prefix where some collide different last codes; changes `codes` in place."""
    from scipy.optimize import linear_sum_assignment

    size = codebooks.shape[1]
    keys = pack_codes(codes, size)
    prefixes = keys // size
    order = prefixes.argsort(kind="stable")
    prefixes = prefixes[order]
    keys.sort()
    collide = np.unique(keys[1:][keys[1:] == keys[:-1]] // size)
    if not len(collide):
        return
    begins, ends = np.searchsorted(prefixes, collide), np.searchsorted(prefixes, collide, side="right")
    # the distances of many small groups at once: one by one they would cost more than the assignment
    blocks = np.cumsum(ends - begins) // max(1, _DISTANCES // size)
    for begin, end in itertools.pairwise([0, *(np.flatnonzero(np.diff(blocks)) + 1), len(blocks)]):
        groups = [order[first:last] for first, last in zip(begins[begin:end], ends[begin:end], strict=True)]
        users = np.concatenate(groups)
        distances = _distances(_residuals(vectors[users], codebooks, codes[users, :-1]), codebooks[-1])
        first = 0
        for group in groups:
            codes[group, -1] = linear_sum_assignment(distances[first : first + len(group)])[1]
            first += len(group)


def _distances(residuals: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Squared distances [rows, codes], less each row's own squared norm, which changes no assignment."""
    distances = residuals @ codebook.T
    distances *= -2
    distances += (codebook**2).sum(axis=1)
    return distances


def _residuals(vectors: np.ndarray, codebooks: np.ndarray, codes: np.ndarray) -> np.ndarray:
    residuals = vectors.copy()
    for codebook, level in zip(codebooks, codes.T, strict=False):
        residuals -= codebook[level]
    return residuals


def _check(vectors: np.ndarray, codebooks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    vectors, codebooks = np.asarray(vectors, np.float32), np.asarray(codebooks, np.float32)
    if not (np.isfinite(vectors).all() and np.isfinite(codebooks).all()):
        raise ValueError("Users cannot be assigned: their vectors or the codebooks hold NaN or infinite values.")
    return vectors, codebooks


def check_capacity(users: int, levels: int, size: int) -> None:
    """Raises a ValueError where there are more users than indices; it says which setting to raise."""
    check_indices(levels, size)
    if users > size**levels:
        needed = size
        while needed**levels < users:
            needed += 1
        larger = f"codebook_size must be at least {needed}" if needed <= MAX_CODEBOOK_SIZE else "raise levels"
        raise ValueError(
            f"{users} users do not fit into {levels} levels of {size} codes ({size**levels} indices): {larger}."
        )
