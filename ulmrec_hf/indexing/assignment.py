"""Unique codes for every user: nearest first, moved as little as possible where users collide."""

from collections import Counter

import numpy as np

_CHUNK = 65_536


def pack_codes(codes: np.ndarray, codebook_size: int) -> np.ndarray:
    """One int64 a row: the codes read as a number in base `codebook_size`, the first level the most significant."""
    keys = np.zeros(len(codes), np.int64)
    for level in np.asarray(codes).T:
        keys = keys * codebook_size + level
    return keys


def nearest_codes(vectors: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
    """The nearest code at each level to what the levels before left over, ignoring other users.

    Args:
        vectors: float32 [users, dim].
        codebooks: float32 [levels, codebook_size, dim].

    Returns:
        int64 [users, levels].
    """
    codes = np.empty((len(vectors), len(codebooks)), np.int64)
    for begin in range(0, len(vectors), _CHUNK):
        residuals = vectors[begin : begin + _CHUNK].copy()
        for level, codebook in enumerate(codebooks):
            nearest = _distances(residuals, codebook).argmin(axis=1)
            codes[begin : begin + _CHUNK, level] = nearest
            residuals -= codebook[nearest]
    return codes


def count_collisions(codes: np.ndarray) -> int:
    """How many users share their codes with another user."""
    counts = np.unique(codes, axis=0, return_counts=True)[1]
    return int(counts[counts > 1].sum())


def assign_unique(vectors: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
    """Codes of which no two users have the same.

    Users take their nearest codes. Where users of one prefix (all levels but the last) collide, the whole prefix group
    is assigned to the last level's codes at the least total squared distance. Only a group with more users than codes
    spills: its farthest users move to the nearest other prefix with room. Equal input gives equal codes.

    Args:
        vectors: float32 [users, dim], the latent vectors of the users.
        codebooks: float32 [levels, codebook_size, dim].

    Returns:
        uint16 [users, levels].

    Raises:
        ValueError: there are more users than codes, or a vector is not finite.
    """
    from scipy.optimize import linear_sum_assignment

    vectors, codebooks = _check(vectors, codebooks)
    levels, size, _ = codebooks.shape
    check_capacity(len(vectors), levels, size)
    codes = nearest_codes(vectors, codebooks)
    _spill(vectors, codebooks, codes)
    prefixes = pack_codes(codes[:, :-1], size)
    keys = prefixes * size + codes[:, -1]
    order = np.argsort(keys, kind="stable")
    collides = keys[order][1:] == keys[order][:-1]
    by_prefix = prefixes[order]
    for prefix in np.unique(by_prefix[1:][collides]):
        begin, end = np.searchsorted(by_prefix, [prefix, prefix + 1])
        group = np.sort(order[begin:end])
        cost = _distances(_residuals(vectors[group], codebooks, codes[group, :-1]), codebooks[-1])
        codes[group, -1] = linear_sum_assignment(cost)[1]
    return codes.astype(np.uint16)


def assign_new(vectors: np.ndarray, codebooks: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Free codes near new users; the codes in use stay as they are.

    Each new user, in the given order, takes its nearest codes if they are free, else the nearest free code under the
    longest prefix of them that has room.

    Args:
        vectors: float32 [new users, dim].
        codebooks: float32 [levels, codebook_size, dim].
        used: integers [users, levels], the codes in use.

    Returns:
        uint16 [new users, levels], different from each other and from `used`.

    Raises:
        ValueError: there is not enough room, or a vector is not finite.
    """
    vectors, codebooks = _check(vectors, codebooks)
    levels, size, _ = codebooks.shape
    check_capacity(len(used) + len(vectors), levels, size)
    tree = _Occupancy(pack_codes(used, size), levels, size, leaf_capacity=1)
    codes = nearest_codes(vectors, codebooks)
    for vector, row in zip(vectors, codes, strict=True):
        if tree.is_full(row):
            row[:] = tree.nearest_room(vector, row, codebooks)
        tree.add(row)
    return codes.astype(np.uint16)


class _Occupancy:
    """How many users stand under each node of the tree of codes; a node at `depth` is a prefix of that many codes."""

    def __init__(self, keys: np.ndarray, depth: int, size: int, leaf_capacity: int):
        self.keys, self.depth, self.size, self.leaf_capacity = np.sort(keys), depth, size, leaf_capacity
        self.added = Counter()  # (depth, node) -> users added since `keys` was sorted

    def capacity(self, depth: int) -> int:
        return self.leaf_capacity * self.size ** (self.depth - depth)

    def counts(self, nodes: np.ndarray, depth: int) -> np.ndarray:
        width = self.size ** (self.depth - depth)
        before = np.searchsorted(self.keys, nodes * width)
        sorted_counts = np.searchsorted(self.keys, (nodes + 1) * width) - before
        return sorted_counts + np.array([self.added[depth, int(node)] for node in nodes])

    def is_full(self, codes: np.ndarray) -> bool:
        node = pack_codes(codes[None], self.size)
        return bool(self.counts(node, len(codes))[0] >= self.capacity(len(codes)))

    def add(self, codes: np.ndarray) -> None:
        for depth in range(len(codes) + 1):
            self.added[depth, int(pack_codes(codes[None, :depth], self.size)[0])] += 1

    def nearest_room(self, vector: np.ndarray, codes: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
        """Up from `codes` to the first node with room, then down, each time to the nearest child with room."""
        codes = codes.copy()
        depth = self.depth - 1
        while self.is_full(codes[:depth]):
            depth -= 1
        residual = _residuals(vector[None], codebooks, codes[None, :depth])
        for level in range(depth, self.depth):
            children = pack_codes(codes[None, :level], self.size) * self.size + np.arange(self.size)
            distances = _distances(residual, codebooks[level])[0]
            distances[self.counts(children, level + 1) >= self.capacity(level + 1)] = np.inf
            codes[level] = distances.argmin()
            residual = residual - codebooks[level][codes[level]]
        return codes


def _spill(vectors: np.ndarray, codebooks: np.ndarray, codes: np.ndarray) -> None:
    """Moves users out of prefixes that hold more users than the last level has codes; changes `codes` in place."""
    levels, size, _ = codebooks.shape
    prefixes = pack_codes(codes[:, :-1], size)
    groups, counts = np.unique(prefixes, return_counts=True)
    overfull = groups[counts > size]
    if not len(overfull):
        return
    moved = []
    for prefix in overfull:
        members = np.flatnonzero(prefixes == prefix)
        left_over = (_residuals(vectors[members], codebooks, codes[members, :-1]) ** 2).sum(axis=1)
        moved.append(members[np.argsort(left_over, kind="stable")][size:])
    moved = np.concatenate(moved)
    tree = _Occupancy(np.delete(prefixes, moved), levels - 1, size, leaf_capacity=size)
    for user in moved:
        codes[user, :-1] = tree.nearest_room(vectors[user], codes[user, :-1], codebooks)
        tree.add(codes[user, :-1])
    residuals = _residuals(vectors[moved], codebooks, codes[moved, :-1])
    codes[moved, -1] = _distances(residuals, codebooks[-1]).argmin(axis=1)


def _distances(residuals: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Squared distances [rows, codes], less each row's own squared norm, which changes no assignment."""
    return (codebook**2).sum(axis=1) - 2 * residuals @ codebook.T


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
    if size**levels > 2**62:
        raise ValueError(f"{levels} levels of {size} codes are more than 2^62 indices: lower levels or codebook_size.")
    if users > size**levels:
        needed = size
        while needed**levels < users:
            needed += 1
        raise ValueError(
            f"{users} users do not fit into {levels} levels of {size} codes ({size**levels} indices): "
            f"codebook_size must be at least {needed}."
        )
