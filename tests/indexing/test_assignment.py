import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from ulmrec_hf.indexing import assignment
from ulmrec_hf.indexing.assignment import assign_new, assign_unique, count_collisions, nearest_codes
from ulmrec_hf.user_index import pack_codes


def make_codebooks(levels: int, size: int, dim: int = 4, seed: int = 0) -> np.ndarray:
    scale = 0.5 ** np.arange(levels)[:, None, None]
    return (np.random.default_rng(seed).normal(size=(levels, size, dim)) * scale).astype(np.float32)


def check_unique(codes: np.ndarray, users: int, levels: int, size: int) -> None:
    assert codes.shape == (users, levels) and codes.dtype == np.uint16
    assert codes.max(initial=0) < size and count_collisions(codes) == 0


def test_users_without_collision_keep_their_nearest_codes():
    codebooks = make_codebooks(3, 8)
    wanted = np.array(list(itertools.product(range(8), repeat=3)))[::7]
    vectors = sum(codebook[level] for codebook, level in zip(codebooks, wanted.T, strict=True))
    nearest = nearest_codes(vectors, codebooks)
    apart = np.unique(nearest, axis=0, return_index=True)[1]
    assert 40 < len(apart) < len(vectors)  # some collide
    np.testing.assert_array_equal(assign_unique(vectors[apart], codebooks), nearest[apart])
    single = np.unique(nearest[:, :-1], axis=0, return_index=True, return_counts=True)
    lone = single[1][single[2] == 1]
    np.testing.assert_array_equal(assign_unique(vectors, codebooks)[lone], nearest[lone])


def test_collisions_are_settled_at_the_least_total_distance():
    # one prefix; the last level's codes lie at 0, 1, 2 and 5; both users are nearest to 0
    codebooks = np.zeros((2, 4, 1), np.float32)
    codebooks[0, :, 0] = [0, 100, 200, 300]
    codebooks[1, :, 0] = [0, 1, 2, 5]
    np.testing.assert_array_equal(assign_unique(np.array([[0.4], [-1.0]]), codebooks), [[0, 1], [0, 0]])
    users = np.array([[0.1], [0.2], [0.9]], np.float32)
    assigned = assign_unique(users, codebooks)[:, 1]
    cost = np.abs(users - codebooks[1].T) ** 2
    best = min(cost[range(3), list(choice)].sum() for choice in itertools.permutations(range(4), 3))
    assert cost[range(3), assigned].sum() == pytest.approx(best)


def test_every_group_has_the_least_total_distance(monkeypatch):
    codebooks = make_codebooks(3, 6)
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(30, 4))[rng.integers(30, size=120)] + rng.normal(size=(120, 4)) / 5
    vectors = vectors.astype(np.float32)
    codes, nearest = assign_unique(vectors, codebooks).astype(int), nearest_codes(vectors, codebooks)
    prefixes, groups = np.unique(codes[:, :2], axis=0, return_inverse=True)
    settled = 0
    for group, prefix in enumerate(prefixes):
        users = np.flatnonzero(groups == group)
        rest = vectors[users] - sum(codebook[code] for codebook, code in zip(codebooks, prefix, strict=False))
        cost = ((rest[:, None] - codebooks[2]) ** 2).sum(axis=2)
        assert cost[range(len(users)), codes[users, 2]].sum() == pytest.approx(
            cost[linear_sum_assignment(cost)].sum(), rel=1e-5
        )
        settled += len(np.unique(nearest[users], axis=0)) < len(users)
    assert settled > 5
    monkeypatch.setattr(assignment, "_DISTANCES", 1)  # one group after the other
    np.testing.assert_array_equal(assign_unique(vectors, codebooks), codes)


def test_counts_that_were_forgotten_change_nothing(monkeypatch):
    vectors, codebooks = np.ones((400, 4), np.float32), make_codebooks(4, 5)
    codes = assign_unique(vectors, codebooks)
    monkeypatch.setattr(assignment, "_CACHED_NODES", 1)
    np.testing.assert_array_equal(assign_unique(vectors, codebooks), codes)


@pytest.mark.parametrize(
    ("users", "levels", "size"), [(1, 4, 256), (1000, 4, 32), (257, 2, 256), (64, 2, 8), (8, 1, 8)]
)
def test_all_users_identical(users, levels, size):
    codes = assign_unique(np.ones((users, 4), np.float32), make_codebooks(levels, size))
    check_unique(codes, users, levels, size)
    # no more prefixes than needed: a group spills only when it is full
    assert len(np.unique(codes[:, :-1], axis=0)) == -(-users // size)


def test_one_user_too_many_for_a_group():
    codebooks = make_codebooks(2, 256)
    rng = np.random.default_rng(0)
    vectors = codebooks[0][7] + rng.normal(size=(257, 4)).astype(np.float32) * 1e-3
    codes = assign_unique(vectors, codebooks)
    check_unique(codes, 257, 2, 256)
    prefixes, counts = np.unique(codes[:, 0], return_counts=True)
    assert sorted(counts.tolist()) == [1, 256] and prefixes[counts.argmax()] == nearest_codes(vectors, codebooks)[0, 0]
    left_over = ((vectors - codebooks[0][prefixes[counts.argmax()]]) ** 2).sum(axis=1)
    assert codes[left_over.argmax(), 0] == prefixes[counts.argmin()]  # the farthest one moves


@settings(max_examples=60, deadline=None)
@given(
    users=st.integers(1, 80),
    levels=st.integers(1, 4),
    size=st.integers(1, 9),
    clusters=st.integers(1, 80),
    seed=st.integers(0, 2**16),
)
def test_unique_whatever_comes(users, levels, size, clusters, seed):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(clusters, 4)).astype(np.float32)[rng.integers(clusters, size=users)]
    codebooks = make_codebooks(levels, size, seed=seed)
    if users > size**levels:
        with pytest.raises(ValueError, match="do not fit"):
            assign_unique(vectors, codebooks)
        return
    codes = assign_unique(vectors, codebooks)
    check_unique(codes, users, levels, size)
    np.testing.assert_array_equal(codes, assign_unique(vectors, codebooks))
    full = np.unique(codes[:, :-1], axis=0, return_counts=True)[1] if levels > 1 else np.array([users])
    assert full.max() <= size


@settings(max_examples=40, deadline=None)
@given(old=st.integers(0, 40), new=st.integers(1, 24), size=st.integers(2, 8), seed=st.integers(0, 2**16))
def test_new_users_get_free_codes_and_leave_the_others_alone(old, new, size, seed):
    rng = np.random.default_rng(seed)
    codebooks = make_codebooks(2, size, seed=seed)
    vectors = rng.normal(size=(4, 4)).astype(np.float32)[rng.integers(4, size=old + new)]
    old = min(old, size**2)
    used = assign_unique(vectors[:old], codebooks)
    if old + new > size**2:
        with pytest.raises(ValueError, match="indices are in use, which leaves no room for"):
            assign_new(vectors[-new:], codebooks, np.sort(pack_codes(used, size)))
        return
    codes = assign_new(vectors[-new:], codebooks, np.sort(pack_codes(used, size)))
    check_unique(np.concatenate([used, codes]), old + new, 2, size)


def test_new_user_takes_the_nearest_codes_if_free():
    codebooks = make_codebooks(4, 16)
    vectors = np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32)
    used = assign_unique(vectors[:40], codebooks)
    nearest = nearest_codes(vectors[40:], codebooks)
    free = [tuple(row) not in {tuple(code) for code in used.tolist()} for row in nearest.tolist()]
    assert any(free)
    for vector, row, is_free in zip(vectors[40:], nearest, free, strict=True):
        if is_free:
            np.testing.assert_array_equal(assign_new(vector[None], codebooks, np.sort(pack_codes(used, 16)))[0], row)
    # its own codes are in use: another last code, same prefix
    taken = assign_new(vectors[:1], codebooks, np.sort(pack_codes(used, 16)))[0]
    np.testing.assert_array_equal(taken[:3], used[0, :3])
    assert taken[3] != used[0, 3]


def test_bad_input():
    with pytest.raises(ValueError, match=re.escape("codebook_size must be at least 3")):
        assign_unique(np.zeros((9, 4)), make_codebooks(2, 2))
    with pytest.raises(ValueError, match="NaN"):
        assign_unique(np.full((2, 4), np.nan), make_codebooks(2, 2))
    with pytest.raises(ValueError, match="lower levels or codebook_size"):
        assign_unique(np.zeros((9, 4)), np.zeros((8, 256, 4)))
