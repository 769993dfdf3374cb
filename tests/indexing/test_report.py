import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data_stage import write_data_stage
from ulmrec_hf.files import write_table
from ulmrec_hf.indexing.assignment import Assignment
from ulmrec_hf.indexing.report import PLOTS, index_quality, quality_markdown, write_quality_report
from ulmrec_hf.tables import LeaveOneOut
from ulmrec_hf.user_index import UserIndex


def small_index(users, size=8, seed=0):
    codes = np.random.default_rng(seed).permutation(size * size)[:users]
    return UserIndex([f"user{user:04d}" for user in range(users)], np.stack([codes // size, codes % size], 1), size)


def assigned(index, latents=None):
    """The assignment of an index of two levels; the first four users had one prefix before it."""
    nearest = index.codes.astype(np.int64)
    nearest[:4] = nearest[:1]
    latents = np.eye(len(index)) if latents is None else latents
    return Assignment(index.codes, nearest, np.asarray(latents, np.float32), [0.5, 0.25], 0)


def small_quality(folder, index=None, **settings):
    data = LeaveOneOut.load(folder)
    index = index or small_index(len(data))
    latents = np.random.default_rng(1).standard_normal((len(data), 4))
    return index_quality(index, assigned(index, latents), data, data.texts(), **settings), index, latents


def hand_made(items, ratings=None, silent=False):
    """Data of these sequences, and its texts."""
    users = len(items)
    sequences = {
        "user": pa.array(range(users), pa.int32()),
        "user_id": [f"user{user:04d}" for user in range(users)],
        "items": pa.array(items, pa.list_(pa.int32())),
    }
    if ratings is not None:
        sequences["ratings"] = ratings
    catalogue = {
        "item": pa.array(range(1, 10), pa.int32()),
        "item_id": [f"item{item}" for item in range(1, 10)],
        "title": ["" if silent else "red lamp"] * 9,
    }
    data = LeaveOneOut({"sequences": pa.table(sequences), "items": pa.table(catalogue)})
    return data, data.texts("titles")


def test_quality_of_a_data_stage(tmp_path):
    data = write_data_stage(tmp_path / "data")
    result, index, _ = small_quality(data, extra={"text": "reviews", "encoder": "tfidf"}, cases=3)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert index.report().items() <= result.items()
    assert (result["collisions_before"], result["collisions_after"]) == (4, 0)
    assert result["reconstruction_error"] == [0.5, 0.25]
    assert (result["text"], result["encoder"], result["lift_users"]) == ("reviews", "tfidf", 60)
    for name in ("lift_train", "lift_heldout", "lift_heldout_interval", "lift_words", "pairs_heldout", "shared_train",
                 "shared_heldout", "shared_words", "rating_agreement", "rated_pairs"):  # fmt: skip
        assert len(result[name]) == index.levels, name
    assert result["lift_train"][0] is not None and result["lift_train"][1] is None  # nobody shares a whole index
    assert result["rating_agreement"] == [None, None] and result["rated_pairs"] == [0, 0]
    assert [case["user_id"] for case in result["cases"]] == ["user0000", "user0029", "user0059"]


def test_what_is_train_and_what_is_held_out():
    # User 1 shares a train item with user 0 and held-out items with user 2.
    data, texts = hand_made([[1, 2, 3], [1, 8, 9], [4, 9, 8], [5, 6, 7]])
    index = UserIndex(data.user_ids, np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), 2)
    result = index_quality(index, assigned(index), data, texts)
    assert result["lift_train"] == [3.0, None] and result["lift_heldout"] == [0.0, None]
    other = UserIndex(data.user_ids, np.array([[1, 0], [0, 1], [0, 0], [1, 1]]), 2)
    result = index_quality(other, assigned(other), data, texts)
    assert result["lift_train"] == [0.0, None] and result["lift_heldout"] == [3.0, None]
    assert result["pairs_heldout"] == [2, 0] and result["shared_heldout"] == [1, 0]


def test_held_out_items_reach_only_their_own_lift(tmp_path):
    first, second = (
        small_quality(write_data_stage(tmp_path / str(other), other_held_out=other))[0] for other in (False, True)
    )
    differ = {name for name in first if first[name] != second[name]}
    assert differ <= {"lift_heldout", "lift_heldout_interval", "shared_heldout"}
    assert first["lift_train"][0] and first["lift_words"][0]


def test_users_of_one_prefix_show_what_it_stands_for(tmp_path):
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
    data, texts = hand_made(items, silent=silent)
    rows = np.arange(len(items))
    index = UserIndex(data.user_ids, np.stack([rows, rows], 1), 4)
    latents = np.zeros((len(items), 1), np.float32)
    result = index_quality(index, assigned(index, latents), data, texts)
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
def test_ratings_may_be_missing(ratings):
    data, texts = hand_made([[1, 2, 3], [1, 2, 3], [1, 2, 3]], ratings)
    index = UserIndex(data.user_ids, np.array([[0, 0], [0, 1], [1, 0]]), 2)
    result = index_quality(index, assigned(index), data, texts)
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
    text = quality_markdown(small_quality(data, index)[0])
    assert "`a\\|b'0 # user`" in text and "\n# user" not in text


def test_other_users_are_refused():
    data, texts = hand_made([[1, 2, 3], [1, 2, 3]])
    index = UserIndex(data.user_ids[::-1], np.array([[0, 0], [0, 1]]), 2)
    with pytest.raises(ValueError, match="must be the same, in the same order"):
        index_quality(index, assigned(index), data, texts)
