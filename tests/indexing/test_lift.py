import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from ulmrec_hf.indexing import lift as measures
from ulmrec_hf.indexing.lift import lift, neighbour_lift, rating_agreement, share_rate


def random_world(seed, users, items, levels=3, size=3, density=0.1):
    random = np.random.default_rng(seed)
    return random.integers(0, size, (users, levels)), sparse.csr_matrix(random.random((users, items)) < density)


def pairs_of(users):
    return [(a, b) for a in range(users) for b in range(a)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 25), st.integers(0, 12), st.sampled_from([1, 40, 2**24]))
def test_lift_is_that_of_all_pairs(seed, users, items, block):
    codes, things = random_world(seed, users, items, density=0.2)
    dense = things.toarray()
    shares = {(a, b): (dense[a] & dense[b]).any() for a, b in pairs_of(users)}
    base = np.mean(list(shares.values())) if shares else 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "_BLOCK", block)
        result = lift(codes, things)
        assert share_rate(things) == pytest.approx(base)
    for length in range(1, 4):
        same = [shared for (a, b), shared in shares.items() if (codes[a, :length] == codes[b, :length]).all()]
        assert (result["pairs"][length - 1], result["shared"][length - 1]) == (len(same), sum(same))
        expected = pytest.approx(np.mean(same) / base) if same and base else None
        assert result["lift"][length - 1] == expected


def test_stored_zeros_and_repeated_items_do_not_count():
    things = sparse.csr_matrix((np.array([1, 1, 0, 1]), np.array([0, 0, 0, 1]), np.array([0, 2, 3, 4])), shape=(3, 2))
    assert share_rate(things) == 0
    assert things.nnz == 4  # the caller's matrix is left alone


def test_a_perfect_index_has_a_large_lift_and_a_random_one_none():
    users, tastes = 2000, 20
    random = np.random.default_rng(0)
    taste = random.integers(0, tastes, users)
    items = random.integers(0, 30, (users, 3)) + 30 * taste[:, None]
    things = sparse.csr_matrix((np.ones(3 * users, bool), (np.repeat(np.arange(users), 3), items.ravel())))
    perfect = lift(taste[:, None], things)
    assert perfect["lift"][0] == pytest.approx(tastes, rel=0.1)
    low, high = perfect["interval"][0]
    assert low < perfect["lift"][0] < high
    chance = lift(random.permutation(taste)[:, None], things)
    assert chance["lift"][0] == pytest.approx(1, abs=0.1)
    assert chance["interval"][0][0] < 1 < chance["interval"][0][1]


def test_a_sample_of_the_users_gives_about_the_same_base_rate():
    codes, things = random_world(0, 600, 40, density=0.05)
    exact = share_rate(things)
    assert share_rate(things, max_users=300, seed=1) == pytest.approx(exact, rel=0.1)
    assert share_rate(things, max_users=300, seed=1) == share_rate(things, max_users=300, seed=1) != exact
    assert lift(codes, things, max_users=300)["shared"] == lift(codes, things)["shared"]


@pytest.mark.parametrize("k", [1, 4, 100])
@pytest.mark.parametrize("block", [1, 2**24])
def test_neighbour_lift_is_that_of_the_nearest_pairs(k, block, monkeypatch):
    monkeypatch.setattr(measures, "_BLOCK", block)
    users = 30
    _, things = random_world(3, users, 20)
    vectors = np.random.default_rng(3).standard_normal((users, 5))
    vectors[7] = 0  # nobody's neighbour, and without any
    dense, unit = things.toarray(), vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    shares = []
    for user in set(range(users)) - {7}:
        others = sorted(set(range(users)) - {7, user}, key=lambda other: -unit[user] @ unit[other])
        shares += [(dense[user] & dense[other]).any() for other in others[:k]]
    result = neighbour_lift(vectors, things, k)
    assert (result["pairs"], result["shared"]) == (len(shares), sum(shares))
    assert result["lift"] == pytest.approx(np.mean(shares) / share_rate(things))


def test_neighbour_lift_of_nobody_is_unknown():
    assert neighbour_lift(np.zeros((3, 2)), sparse.csr_matrix(np.eye(3)), 2) == {"lift": None, "pairs": 0, "shared": 0}
    assert neighbour_lift(np.ones((1, 2)), sparse.csr_matrix(np.eye(1)), 2)["lift"] is None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 15))
def test_rating_agreement_is_that_of_all_pairs(seed, users):
    random = np.random.default_rng(seed)
    codes = random.integers(0, 2, (users, 2))
    table = np.where(random.random((users, 6)) < 0.6, random.integers(1, 6, (users, 6)), np.nan)
    rows, items = np.divmod(np.arange(table.size), 6)
    result = rating_agreement(codes, rows, items, table.ravel())

    def differences(chosen):
        gaps = np.array([abs(table[a] - table[b]) for a, b in chosen])
        return gaps[~np.isnan(gaps)]

    base = differences(pairs_of(users))
    for length in (1, 2):
        gaps = differences([(a, b) for a, b in pairs_of(users) if (codes[a, :length] == codes[b, :length]).all()])
        expected = gaps.mean() / base.mean() if len(gaps) and base.any() else None
        assert result["pairs"][length - 1] == len(gaps)
        assert result["ratio"][length - 1] == (expected if expected is None else pytest.approx(expected))


def test_the_later_rating_of_an_item_counts():
    users, items, ratings = np.array([0, 0, 1, 2, 2]), np.array([5, 5, 5, 5, 5]), np.array([1.0, 4, 4, 2, 4])
    result = rating_agreement(np.array([[0], [0], [1]]), users, items, ratings)
    assert result == {"ratio": [None], "pairs": [1]}  # all three say 4: nobody differs from anybody


def test_bad_input_is_refused(tmp_path):
    codes, things = random_world(0, 10, 5)
    with pytest.raises(ValueError, match="codes has 9 users but things has 10"):
        lift(codes[1:], things)
    for bad in (codes[:, 0], codes.astype(float), codes - 1):
        with pytest.raises(ValueError, match="codes must be integers of 0 or more"):
            lift(bad, things)
    with pytest.raises(ValueError, match="k at least 1"):
        neighbour_lift(np.ones((10, 2)), things, 0)
    with pytest.raises(ValueError, match="vectors must be"):
        neighbour_lift(np.ones((9, 2)), things, 1)
