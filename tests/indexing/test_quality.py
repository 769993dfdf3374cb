import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from tests.data_stage import write_data_stage
from ulmrec_hf.files import write_table
from ulmrec_hf.indexing import quality
from ulmrec_hf.indexing.quality import (
    PLOTS,
    index_quality,
    lift,
    neighbour_lift,
    rating_agreement,
    share_rate,
    write_quality_report,
)
from ulmrec_hf.tables import LeaveOneOut, UserTexts
from ulmrec_hf.user_index import UserIndex

ASSIGNMENT = {"collisions_before": 4, "collisions_after": 0, "reconstruction_error": [0.5, 0.25]}


def random_world(seed, users, items, levels=3, size=3, density=0.1):
    random = np.random.default_rng(seed)
    return random.integers(0, size, (users, levels)), sparse.csr_matrix(random.random((users, items)) < density)


def pairs_of(users):
    return [(a, b) for a in range(users) for b in range(a)]


def small_index(users, size=8, seed=0):
    codes = np.random.default_rng(seed).permutation(size * size)[:users]
    return UserIndex([f"user{user:04d}" for user in range(users)], np.stack([codes // size, codes % size], 1), size)


def small_quality(data, index=None, **settings):
    users = LeaveOneOut.load(data).texts()
    index = index or small_index(len(users))
    latents = np.random.default_rng(1).standard_normal((len(users), 4)).astype(np.float32)
    return index_quality(index, users, latents, data, **ASSIGNMENT, **settings), index, latents


def write_sequences(folder, items, ratings=None, silent=False):
    """A data stage of hand-made sequences: its sequences.parquet and texts."""
    columns = {
        "user_id": [f"user{user:04d}" for user in range(len(items))],
        "items": pa.array(items, pa.list_(pa.int32())),
    }
    if ratings is not None:
        columns["ratings"] = ratings
    write_table(folder / "sequences.parquet", pa.table(columns))
    offsets = np.concatenate([[0], np.cumsum([max(0, len(row) - 2) for row in items])])
    text_ids = np.full(offsets[-1], -1 if silent else 0, np.int32)
    return UserTexts(columns["user_id"], offsets, text_ids, ["red lamp"], "reviews")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 25), st.integers(0, 12), st.sampled_from([1, 40, 2**24]))
def test_lift_is_that_of_all_pairs(seed, users, items, block):
    codes, things = random_world(seed, users, items, density=0.2)
    dense = things.toarray()
    shares = {(a, b): (dense[a] & dense[b]).any() for a, b in pairs_of(users)}
    base = np.mean(list(shares.values())) if shares else 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "_BLOCK", block)
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
    monkeypatch.setattr(quality, "_BLOCK", block)
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


def test_quality_of_a_data_stage(tmp_path):
    data = write_data_stage(tmp_path / "data")
    result, index, _ = small_quality(data, extra={"text": "reviews", "encoder": "tfidf"}, cases=3)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert index.report().items() <= result.items() and ASSIGNMENT.items() <= result.items()
    assert (result["text"], result["encoder"], result["lift_users"]) == ("reviews", "tfidf", 60)
    for name in ("lift_train", "lift_heldout", "lift_heldout_interval", "lift_words", "pairs_heldout", "shared_train",
                 "shared_heldout", "shared_words", "rating_agreement", "rated_pairs"):  # fmt: skip
        assert len(result[name]) == index.levels, name
    assert result["lift_train"][0] is not None and result["lift_train"][1] is None  # nobody shares a whole index
    assert result["rating_agreement"] == [None, None] and result["rated_pairs"] == [0, 0]
    assert [case["user_id"] for case in result["cases"]] == ["user0000", "user0029", "user0059"]


def test_what_is_train_and_what_is_held_out(tmp_path):
    # User 1 shares a train item with user 0 and held-out items with user 2.
    users = write_sequences(tmp_path, [[1, 2, 3], [1, 8, 9], [4, 9, 8], [5, 6, 7]])
    index = UserIndex(users.user_ids, np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), 2)
    result = index_quality(index, users, np.eye(4), tmp_path, **ASSIGNMENT)
    assert result["lift_train"] == [3.0, None] and result["lift_heldout"] == [0.0, None]
    other = UserIndex(users.user_ids, np.array([[1, 0], [0, 1], [0, 0], [1, 1]]), 2)
    result = index_quality(other, users, np.eye(4), tmp_path, **ASSIGNMENT)
    assert result["lift_train"] == [0.0, None] and result["lift_heldout"] == [3.0, None]
    assert result["pairs_heldout"] == [2, 0] and result["shared_heldout"] == [1, 0]


def test_held_out_items_reach_only_their_own_lift(tmp_path):
    first, second = (
        small_quality(write_data_stage(tmp_path / str(other), other_held_out=other))[0] for other in (False, True)
    )
    differ = {name for name in first if first[name] != second[name]}
    assert differ <= {"lift_heldout", "lift_heldout_interval", "shared_heldout"}
    assert first["lift_train"][0] and first["lift_words"][0]


def test_users_of_one_prefix_tell_what_it_stands_for(tmp_path):
    data = write_data_stage(tmp_path / "data")  # the taste of a user is its number modulo 4
    users = np.arange(60)
    index = UserIndex([f"user{user:04d}" for user in users], np.stack([users % 4, users // 4], 1), 16)
    result, _, _ = small_quality(data, index)
    assert result["lift_words"][0] > 1.3 and result["shared_words"][0] == result["pairs_heldout"][0]
    case = result["cases"][0]
    assert (case["index"], len(case["nearest"])) == ("<a_0><b_0>", 5)
    assert [(prefix["prefix"], prefix["users"]) for prefix in case["prefixes"]] == [("<a_0>", 15), ("<a_0><b_0>", 1)]
    assert {"sturdy", "camping", "tent"} <= set(case["prefixes"][0]["words"])
    assert all(user["codes_shared"] == 1 and user["index"].startswith("<a_0>") for user in case["nearest"])
    distances = [user["distance"] for user in case["nearest"]]
    assert distances == sorted(distances)


@pytest.mark.parametrize(
    "items",
    [[[1, 2, 3, 4]], [[1], [1, 2], []], [[1, 2, 3]] * 3, [[1]]],
    ids=["one user", "fewer than 3 items", "all alone", "one item"],
)
@pytest.mark.parametrize("silent", [True, False])
def test_what_is_not_to_be_had_is_null(items, silent, tmp_path):
    users = write_sequences(tmp_path, items, silent=silent)
    rows = np.arange(len(items))
    index = UserIndex(users.user_ids, np.stack([rows, rows], 1), 4)
    latents = np.zeros((len(items), 1), np.float32)
    result = index_quality(index, users, latents, tmp_path, **ASSIGNMENT)
    for name in ("lift_train", "lift_heldout", "lift_words", "lift_heldout_interval", "rating_agreement"):
        assert result[name] == [None, None], name
    if silent:
        write_quality_report(tmp_path / "report", result, index, latents)
        assert "n/a" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    "ratings",
    [
        pa.array([[4, 1, 1], [2, None, 1], None], pa.list_(pa.float32())),
        pa.array([[4.0, None, None], [2.0, 1.0, 1.0], [None] * 3], pa.list_(pa.float64())),
        pa.nulls(3),
        None,
    ],
    ids=["a user without", "ratings without", "no type", "no column"],
)
def test_ratings_may_be_missing(ratings, tmp_path):
    users = write_sequences(tmp_path, [[1, 2, 3], [1, 2, 3], [1, 2, 3]], ratings)
    index = UserIndex(users.user_ids, np.array([[0, 0], [0, 1], [1, 0]]), 2)
    result = index_quality(index, users, np.eye(3), tmp_path, **ASSIGNMENT)
    known = ratings is not None and ratings.null_count < 3
    assert result["rating_agreement"] == [1.0 if known else None, None]
    assert result["rated_pairs"] == [int(known), 0]


def test_the_report_is_written_the_same_again(tmp_path):
    data = write_data_stage(tmp_path / "data")
    for name in ("one", "two"):
        result, index, latents = small_quality(data, extra={"text": "reviews"})
        write_quality_report(tmp_path / name, result, index, latents)
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {"report.json", "report.md", *PLOTS}
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert json.loads((tmp_path / "one" / "report.json").read_text()) == result
    text = (tmp_path / "one" / "report.md").read_text()
    assert "- text: reviews" in text and "| 1 | " in text and all(f"({name})" in text for name in PLOTS)
    assert result["cases"][0]["index"] in text


def test_a_user_id_does_not_break_the_tables(tmp_path):
    data = write_data_stage(tmp_path / "data")
    table = pq.read_table(data / "sequences.parquet")
    ids = [f"a|b`{row}\n# user" for row in range(len(table))]
    write_table(data / "sequences.parquet", table.set_column(1, "user_id", pa.array(ids)))
    index = UserIndex(ids, small_index(len(ids)).codes, 8)
    text = quality.quality_markdown(small_quality(data, index)[0])
    assert "`a\\|b'0 # user`" in text and "\n# user" not in text


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
    users = write_sequences(tmp_path, [[1, 2, 3], [1, 2, 3]])
    with pytest.raises(ValueError, match="must be the same, in the same order"):
        index_quality(UserIndex(users.user_ids[::-1], np.array([[0, 0], [0, 1]]), 2), users, np.eye(2), tmp_path,
                      **ASSIGNMENT)  # fmt: skip
    with pytest.raises(ValueError, match=r"sequences\.parquet is missing"):
        index_quality(small_index(2), users, np.eye(2), tmp_path / "none", **ASSIGNMENT)
