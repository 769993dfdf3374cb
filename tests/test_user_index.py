import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ulmrec_hf.user_index import (
    KINDS,
    USER_INDEX_PATTERN,
    EarlierCodes,
    IndexKind,
    UserIndex,
    parse_codes,
    spell_codes,
    user_tokens,
)


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


def test_every_user_token():
    tokens = user_tokens(3, 12)
    assert [len(level) for level in tokens] == [12] * 3 and (tokens[0][0], tokens[2][11]) == ("<a_0>", "<c_11>")
    assert all(USER_INDEX_PATTERN.fullmatch(token) for level in tokens for token in level)


def test_indices_are_found_in_text():
    text = "### User:\n<a_219><b_2>\nlike <a_0>, not < a_1> or <a_01> or </s>"
    assert USER_INDEX_PATTERN.findall(text) == ["<a_219><b_2>", "<a_0>"]


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
    nobody = pa.array([], pa.list_(pa.uint16()))
    for users, codes in ((["a", "b"], [[1], [1, 2]]), (["a", "b"], [1, 2]), (pa.array([], pa.string()), nobody)):
        table = pa.table({"user_id": users, "codes": codes}).replace_schema_metadata({"codebook_size": "4"})
        pq.write_table(table, tmp_path / "other.parquet")
        with pytest.raises(ValueError, match="it needs users, and a list of as many codes for each"):
            UserIndex.from_parquet(tmp_path / "other.parquet")


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


# ---------------------------------------------------------------- kinds

SPELLED = {
    "codes": ["<a_2><b_0>", "<a_0><b_31>", "<a_0><b_1>"],
    "text": ["2-0", "0-31", "0-1"],
    "number": ["0", "1", "2"],
    "id": ["ann", "</s> bob", "cy"],
}


def of_kind(kind, **settings):
    return UserIndex(["ann", "</s> bob", "cy"], np.array([[2, 0], [0, 31], [0, 1]]), 32, kind, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_spells_and_comes_back_from_its_file(kind, tmp_path):
    index = of_kind(kind)
    assert [index.spell(user) for user in index] == SPELLED[kind]
    for number, before in enumerate((index, index.shuffled(3))):
        path = tmp_path / f"{number}.parquet"
        before.to_parquet(path)
        again = UserIndex.from_parquet(path)
        assert (again.kind, list(again)) == (kind, list(index))
        assert [again.spell(user) for user in again] == [before.spell(user) for user in before]
        assert [again[user] for user in again] == [before[user] for user in before]
    with pytest.raises(KeyError, match="'zoe' is not among the 3 users"):
        index.spell("zoe")


@pytest.mark.parametrize("kind", KINDS)
def test_a_shuffle_deals_out_what_is_spelled(kind):
    codes = np.stack(np.divmod(np.arange(100), 10), axis=1)
    index = UserIndex([f"u{user}" for user in range(100)], codes, 10, kind)
    shuffled = index.shuffled(1)
    assert list(shuffled) == list(index)
    dealt, own = ([each.spell(user) for user in index] for each in (shuffled, index))
    assert sorted(dealt) == sorted(own) and len(set(own)) == 100
    assert sum(a == b for a, b in zip(dealt, own, strict=True)) < 20
    # whoever bears a user's name bears that user's codes too
    by_name = {index.spell(user): index[user] for user in index}
    assert all(by_name[shuffled.spell(user)] == shuffled[user] for user in shuffled)


def test_the_default_file_says_nothing_of_kinds(index, tmp_path):
    index.shuffled(1).to_parquet(tmp_path / "user_index.parquet")
    schema = pq.read_schema(tmp_path / "user_index.parquet")
    assert schema.names == ["user_id", "codes"] and set(schema.metadata) == {b"codebook_size"}


def test_a_merged_map_keeps_its_kind_and_numbers_on():
    new = UserIndex(["dee", "cy"], np.array([[7, 7], [0, 1]]), 32)  # what the indexer makes knows of no kind
    for kind, last in (("number", "3"), ("id", "dee"), ("text", "7-7")):
        merged = of_kind(kind).merge(new)
        assert [merged.spell(user) for user in merged] == [*SPELLED[kind], last]
    shuffled, new = of_kind("id").shuffled(3), UserIndex(["dee"], np.array([[7, 7]]), 32)
    assert [shuffled.merge(new).spell(user) for user in shuffled] == [shuffled.spell(user) for user in shuffled]
    with pytest.raises(ValueError, match="'cy': <a_0><b_1> and <a_5><b_5>"):
        of_kind("number").merge(UserIndex(["cy"], np.array([[5, 5]]), 32))


def test_bad_kinds_and_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="index_kind is 'hash'; it must be one of codes, text, number, id"):
        of_kind("hash")
    for numbers in ([0, 1, 1], [0, 1, 3], [0, 1]):
        with pytest.raises(ValueError, match="numbers must hold each of 0 to 2 once"):
            of_kind("number", numbers=np.array(numbers))
    path = tmp_path / "user_index.parquet"
    of_kind("id").to_parquet(path)
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    with pytest.raises(ValueError, match=r"user_index.parquet is not a user index: numbers must hold each of 0 to 1"):
        UserIndex.from_parquet(path)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"index_kind": b"hash"}), path)
    with pytest.raises(ValueError, match=r"user_index.parquet is not a user index: index_kind is 'hash'"):
        UserIndex.from_parquet(path)


def test_maps_of_two_machines_merge_or_tell_the_conflict():
    first = UserIndex(["a", "b"], np.array([[0, 1], [1, 0]]), 4)
    second = UserIndex(["b", "c"], np.array([[1, 0], [2, 3]]), 4)
    merged = first.merge(second)
    assert list(merged) == ["a", "b", "c"] and merged["c"] == (2, 3)
    assert first.merge(first).codes.tolist() == first.codes.tolist()
    with pytest.raises(ValueError, match="1 users have two different indices, such as 'b': <a_1><b_0> and <a_3><b_0>"):
        first.merge(UserIndex(["b"], np.array([[3, 0]]), 4))
    with pytest.raises(ValueError, match="Users 'a' and 'd' share the index <a_0><b_1>"):
        first.merge(UserIndex(["d"], np.array([[0, 1]]), 4))
    with pytest.raises(ValueError, match="2 levels of 4 codes and one of 2 of 8 cannot be merged"):
        first.merge(UserIndex(["d"], np.array([[0, 0]]), 8))


def test_keys_are_sorted_numbers():
    assert UserIndex(["a", "b"], np.array([[3, 1], [0, 2]]), 4).keys.tolist() == [2, 13]


def test_another_kind_from_outside(monkeypatch, tmp_path):
    monkeypatch.setattr(KINDS, "_entries", dict(KINDS._entries))
    KINDS.register("roman")(IndexKind(lambda index, row, codes: "I" * (1 + int(index.numbers[row])), by_number=True))
    shuffled = of_kind("roman").shuffled(3)
    shuffled.to_parquet(tmp_path / "user_index.parquet")
    again = UserIndex.from_parquet(tmp_path / "user_index.parquet")
    assert [of_kind("roman").spell(user) for user in again] == ["I", "II", "III"]
    assert [again.spell(user) for user in again] == [shuffled.spell(user) for user in again] != ["I", "II", "III"]
    assert [kind for kind in KINDS if KINDS[kind].adds_tokens] == ["codes"]
    with pytest.raises(ValueError, match="index_kind 'roman' exists already"):
        KINDS.register("roman")(None)


# ---------------------------------------------------------------- earlier codes


def with_earlier(kind="codes"):
    """ann has two rows, bob none, cy one."""
    earlier = EarlierCodes(np.array([0, 2, 2, 3]), np.array([[5, 6], [7, 8], [5, 6]]))  # not unique
    return UserIndex(["ann", "bob", "cy"], np.array([[2, 0], [0, 31], [0, 1]]), 32, kind, earlier=earlier)


def test_a_training_row_spells_the_codes_before_its_target():
    index = with_earlier()
    assert [index.spell("ann", before) for before in range(3)] == ["<a_2><b_0>", "<a_5><b_6>", "<a_7><b_8>"]
    assert with_earlier("text").spell("cy", 1) == "5-6" and index.spell("bob") == "<a_0><b_31>"
    for user, before in (("ann", 3), ("bob", 1)):
        with pytest.raises(
            ValueError, match=f"user '{user}' has no codes without the newest {before} .*train_positions"
        ):
            index.spell(user, before)
    assert with_earlier("number").spell("bob", 1) == "1" and with_earlier("id").spell("ann", 9) == "ann"
    assert of_kind("codes").spell("ann", 4) == "<a_2><b_0>"  # not made from what users did


def test_a_shuffle_deals_out_earlier_codes_with_the_rest():
    index = with_earlier()
    seen = set()
    for seed in range(20):
        shuffled = index.shuffled(seed)
        for user in index:
            other = next(each for each in index if index[each] == shuffled[user])
            has = {"ann": 2, "bob": 0, "cy": 1}
            for before in range(1, has[user] + 1):
                expected = index.spell(other, min(before, has[other]))
                assert shuffled.spell(user, before) == expected
                seen.add((user, other, before))
    assert {("ann", "bob", 1), ("ann", "cy", 2), ("cy", "ann", 1)} <= seen


def test_earlier_codes_come_back_from_the_file_or_are_left_out(tmp_path):
    path = tmp_path / "user_index.parquet"
    index = with_earlier()
    index.to_parquet(path)
    again = UserIndex.from_parquet(path)
    assert pq.read_schema(path).field("earlier").type == pa.list_(pa.list_(pa.uint16()))
    assert again.earlier.codes.tolist() == index.earlier.codes.tolist() and again.earlier.codes.dtype == np.uint16
    assert again.earlier.offsets.tolist() == [0, 2, 2, 3]
    index.to_parquet(path, earlier=False)
    assert pq.read_schema(path).names == ["user_id", "codes"] and UserIndex.from_parquet(path).earlier is None
    nobody = UserIndex(["ann"], np.array([[2, 0]]), 32, earlier=EarlierCodes(np.array([0, 0]), np.empty((0, 2), int)))
    nobody.to_parquet(path)
    assert UserIndex.from_parquet(path).earlier.offsets.tolist() == [0, 0]


def test_merged_maps_keep_earlier_codes():
    index, new = with_earlier(), UserIndex(["dee", "cy"], np.array([[7, 7], [0, 1]]), 32)
    offsets = [0, 1, 3]
    other = UserIndex(
        ["dee", "cy"], new.codes, 32, earlier=EarlierCodes(np.array(offsets), np.array([[9, 9], [1, 1], [2, 2]]))
    )
    merged = index.merge(new)
    assert merged.spell("ann", 2) == "<a_7><b_8>" and merged.earlier.offsets.tolist() == [0, 2, 2, 3, 3]
    assert index.merge(other).spell("dee", 1) == "<a_9><b_9>" and index.merge(other).spell("cy", 1) == "<a_5><b_6>"
    assert of_kind("codes").merge(new).earlier is None
    with pytest.raises(ValueError, match="user 'dee' has no codes without the newest 1"):
        merged.spell("dee", 1)


@pytest.mark.parametrize(
    "earlier",
    [
        pa.array([[[1, 2]], None], pa.list_(pa.list_(pa.uint16()))),
        pa.array([[[1, 2]], [None]], pa.list_(pa.list_(pa.uint16()))),
        pa.array([[[1, 2]], [[1, None]]], pa.list_(pa.list_(pa.uint16()))),
        pa.array([[[1, 2]], [[1]]], pa.list_(pa.list_(pa.uint16()))),
        pa.array([[[1]], [[1]]], pa.list_(pa.list_(pa.uint16()))),
        pa.array([[[1, 99]], []], pa.list_(pa.list_(pa.uint16()))),
        pa.array([[["1", "2"]], []], pa.list_(pa.list_(pa.string()))),
        pa.array([[1, 2], [3]], pa.list_(pa.uint16())),
        pa.array(["1", "2"]),
    ],
)
def test_malformed_earlier_codes_are_refused_by_file(earlier, tmp_path):
    path = tmp_path / "user_index.parquet"
    UserIndex(["a", "b"], np.array([[2, 0], [0, 31]]), 32).to_parquet(path)
    table = pq.read_table(path)
    pq.write_table(table.append_column("earlier", earlier), path)
    with pytest.raises(ValueError, match=r"user_index\.parquet is not a user index"):
        UserIndex.from_parquet(path)
