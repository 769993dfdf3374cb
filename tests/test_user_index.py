import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ulmrec_hf.user_index import UserIndex, parse_codes, spell_codes


@pytest.fixture
def index() -> UserIndex:
    codes = np.array([[219, 2, 95, 238], [219, 2, 95, 239], [0, 0, 0, 0], [219, 3, 0, 0]])
    return UserIndex(["ann", "bob", "cy", "dee"], codes, 256)


def test_looks_up_and_spells(index):
    assert index["ann"] == (219, 2, 95, 238)
    assert index.spell("ann") == "<a_219><b_2><c_95><d_238>"
    assert "bob" in index and "zoe" not in index
    assert (len(index), index.levels, index.codebook_size) == (4, 4, 256)
    assert list(index) == ["ann", "bob", "cy", "dee"]
    with pytest.raises(KeyError, match="'zoe' is not among the 4 users"):
        index["zoe"]


@given(st.lists(st.integers(0, 65_535), min_size=1, max_size=26))
def test_spelling_round_trip(codes):
    assert parse_codes(spell_codes(codes)) == tuple(codes)


@pytest.mark.parametrize("text", ["", "a_1", "<b_1>", "<a_1><c_2>", "<a_1> <b_2>", "<a_01>", "<a_1><b_2>x", "<a_-1>"])
def test_parse_refuses_what_is_no_index(text):
    with pytest.raises(ValueError, match="is not a user index"):
        parse_codes(text)


def test_collision_names_the_first_pair():
    codes = np.array([[1, 1], [2, 2], [3, 3], [2, 2], [1, 1]])
    with pytest.raises(ValueError, match=r"'b' and 'd' share the index <a_2><b_2> \(2 such rows\)"):
        UserIndex(list("abcde"), codes, 4)


def test_repeated_user_id_is_refused():
    with pytest.raises(ValueError, match="'a' occurs twice, in rows 0 and 2"):
        UserIndex(["a", "b", "a"], np.array([[1], [2], [3]]), 4)


@pytest.mark.parametrize(
    ("codes", "size", "message"),
    [
        (np.array([[1], [4]]), 4, "'b' has the code 4 at level 1, outside of 0..3"),
        (np.array([[1], [-1]]), 4, "'b' has the code -1"),
        (np.array([1, 2]), 4, "shape"),
        (np.array([[1.0], [2.0]]), 4, "integers"),
        (np.array([[1]]), 4, "2 user ids but 1 rows"),
        (np.array([[1], [2]]), 70_000, "codebook_size must be between"),
    ],
)
def test_bad_codes(codes, size, message):
    with pytest.raises(ValueError, match=message):
        UserIndex(["a", "b"], codes, size)


def test_parquet_round_trip(index, tmp_path):
    path = tmp_path / "user_index.parquet"
    index.to_parquet(path)
    again = UserIndex.from_parquet(path)
    assert again.user_ids == index.user_ids and again.codebook_size == 256
    np.testing.assert_array_equal(again.codes, index.codes)
    schema = pq.read_schema(path)
    assert schema.field("codes").type.value_type == pa.uint16() and schema.metadata[b"codebook_size"] == b"256"
    first = path.read_bytes()
    again.to_parquet(path)
    assert path.read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == ["user_index.parquet"]


def test_from_parquet_refuses_other_files(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        UserIndex.from_parquet(tmp_path / "none.parquet")
    pq.write_table(pa.table({"user_id": ["a"], "codes": [[1]]}), tmp_path / "plain.parquet")
    with pytest.raises(ValueError, match="codebook_size in its schema metadata"):
        UserIndex.from_parquet(tmp_path / "plain.parquet")
    ragged = pa.table({"user_id": ["a", "b"], "codes": [[1], [1, 2]]}).replace_schema_metadata({"codebook_size": "4"})
    pq.write_table(ragged, tmp_path / "ragged.parquet")
    with pytest.raises(ValueError, match="same number of codes"):
        UserIndex.from_parquet(tmp_path / "ragged.parquet")


def test_shuffled_keeps_users_and_codes():
    codes = np.stack(np.divmod(np.arange(100), 10), axis=1)
    index = UserIndex([f"u{user}" for user in range(100)], codes, 10)
    shuffled = index.shuffled(1)
    assert shuffled.user_ids == index.user_ids
    assert {shuffled[user] for user in shuffled} == {index[user] for user in index}
    assert sum(shuffled[user] == index[user] for user in index) < 20
    np.testing.assert_array_equal(shuffled.codes, index.shuffled(1).codes)
    assert (shuffled.codes != index.shuffled(2).codes).any()


def test_report(index):
    report = index.report()
    assert report["users"] == 4
    assert report["codes_used"] == [2, 3, 2, 3]
    assert report["users_alone"] == [1, 2]
    assert report["perplexity"][2] == pytest.approx(2.0)  # two codes, used alike
    assert report["perplexity"][0] == pytest.approx(4 / 3**0.75, abs=1e-3)
