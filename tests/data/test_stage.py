import gzip
import json
import logging
import resource
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ulmrec_hf.data import stage
from ulmrec_hf.data.arguments import DataArguments
from ulmrec_hf.data.selection import k_core
from ulmrec_hf.data.stage import prepare_data
from ulmrec_hf.tables import INTERACTIONS

FILES = ("interactions.parquet", "items.parquet", "sequences.parquet", "summary.json", "stage.json")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def review(user, item, time, rating=5, text="fine", summary="ok"):
    return {
        "reviewerID": user,
        "asin": item,
        "unixReviewTime": time,
        "overall": rating,
        "reviewText": text,
        "summary": summary,
    }


def amazon(tmp_path, rows, titles=None, **kwargs):
    paths = {"interactions": write_lines(tmp_path / "reviews.json", rows)}
    if titles is not None:
        paths["items"] = write_lines(tmp_path / "meta.json", [{"asin": a, "title": t} for a, t in titles])
    return DataArguments(data_format="amazon", **paths, **{"k_core": 0, **kwargs})


def table(folder, name="interactions"):
    return pq.read_table(folder / f"{name}.parquet")


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def random_reviews(count, users, items, seed=0):
    rng = np.random.default_rng(seed)
    return [
        review(f"u{rng.integers(users)}", f"i{rng.integers(items)}", int(rng.integers(30)), text=f"text {n}")
        for n in range(count)
    ]


def expected_rows(rows, k):
    """The preparation in plain Python: (user_id, item_id, time, text) in the final order."""
    seen, kept = set(), []
    for row in sorted(rows, key=lambda row: row["unixReviewTime"]):  # stable
        pair = row["reviewerID"], row["asin"]
        if pair not in seen:
            seen.add(pair)
            kept.append(row)
    while True:
        users, items = (Counter(row[name] for row in kept) for name in ("reviewerID", "asin"))
        core = [row for row in kept if users[row["reviewerID"]] >= max(k, 3) and items[row["asin"]] >= k]
        if len(core) == len(kept):
            break
        kept = core
    kept.sort(key=lambda row: row["reviewerID"])
    return [(row["reviewerID"], row["asin"], row["unixReviewTime"], row["reviewText"]) for row in kept]


@pytest.mark.parametrize("k", [0, 2, 4, 5])
def test_equals_plain_python(tmp_path, k, monkeypatch):
    monkeypatch.setattr(stage, "BUCKET_ROWS", 37)  # many buckets
    rows = random_reviews(900, 90, 60)
    folder = prepare_data(amazon(tmp_path, rows, k_core=k), tmp_path / "out")
    found = table(folder).select(["user_id", "item_id", "timestamp", "review"]).to_pylist()
    assert [tuple(row.values()) for row in found] == expected_rows(rows, k)
    assert summary(folder)["interactions"] == len(found) < 900


def test_tables_agree(tmp_path):
    folder = prepare_data(amazon(tmp_path, random_reviews(600, 60, 40), k_core=3), tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    interactions, sequences, items = table(folder), table(folder, "sequences"), table(folder, "items")
    assert interactions.schema.equals(INTERACTIONS)
    assert sequences.schema.types == [
        pa.int32(),
        pa.string(),
        pa.list_(pa.int32()),
        pa.list_(pa.float32()),
        pa.list_(pa.int64()),
    ]
    assert sequences["user"].to_pylist() == list(range(len(sequences)))
    assert items["item"].to_pylist() == list(range(1, len(items) + 1)) and items["item"].type == pa.int32()
    assert sequences["user_id"].to_pylist() == sorted(sequences["user_id"].to_pylist())
    assert items["item_id"].to_pylist() == sorted(items["item_id"].to_pylist())
    for flat, nested in (("item", "items"), ("rating", "ratings"), ("timestamp", "timestamps")):
        assert interactions[flat].to_pylist() == [value for row in sequences[nested].to_pylist() for value in row]
    ids = dict(zip(items["item"].to_pylist(), items["item_id"].to_pylist(), strict=True))
    assert [ids[item] for item in interactions["item"].to_pylist()] == interactions["item_id"].to_pylist()
    names = sequences["user_id"].to_pylist()
    assert [names[user] for user in interactions["user"].to_pylist()] == interactions["user_id"].to_pylist()


def test_order_duplicates_and_ties(tmp_path):
    rows = [
        review("u", "late", 9),
        review("u", "z", 5, text="first of a tie"),
        review("u", "a", 5),
        review("u", "late", 1, rating=None, text="the earliest stays"),
        review("u", "z", 5, text="second of a tie"),
    ]
    folder = prepare_data(amazon(tmp_path, rows), tmp_path / "out")
    found = table(folder).to_pylist()
    assert [row["item_id"] for row in found] == ["late", "z", "a"]
    assert [row["review"] for row in found] == ["the earliest stays", "first of a tie", "fine"]
    assert [row["rating"] for row in found] == [None, 5, 5]
    counts = summary(folder)
    assert counts["repeated_interactions"] == 2 and counts["unknown_ratings"] == 1


def test_untitled_items_go_before_the_core(tmp_path, caplog):
    rows = [review(f"u{n}", item, n) for n in range(3) for item in ("a", "b", "c")]
    rows += [review("v", item, 1) for item in ("a", "b", "untitled")]  # in the 3-core only with the untitled one
    titles = [("a", "A &amp; <b>1</b>"), ("b", ""), ("b", "B"), ("b", "other"), ("c", "C"), ("untitled", "<br>")]
    titles.append(("never bought", "X"))
    folder = prepare_data(amazon(tmp_path, rows, titles, k_core=3), tmp_path / "out")
    assert table(folder, "items")["title"].to_pylist() == ["A & 1", "B", "C"]
    assert table(folder, "sequences")["user_id"].to_pylist() == ["u0", "u1", "u2"]
    counts = summary(folder)
    assert (counts["untitled_items"], counts["untitled_interactions"], counts["users_below_minimum"]) == (1, 1, 1)
    assert "1 interactions of 1 items without a title; 2 interactions of 1 users with fewer than 3" in caplog.text


def test_what_else_the_items_have(tmp_path):
    rows = [review("u", item, 1) for item in "cab"]
    args = amazon(tmp_path, rows, [])
    write_lines(
        tmp_path / "meta.json",
        [
            {"brand": "x", "asin": "c", "title": "C"},
            {"asin": "a", "title": "A", "item": 7},
            {"asin": "b", "title": "B"},
        ],
    )
    items = table(prepare_data(args, tmp_path / "out"), "items")
    assert items.column_names == ["item", "item_id", "title", "brand", "asin"]
    assert items["item"].to_pylist() == [1, 2, 3] and items["title"].to_pylist() == ["A", "B", "C"]
    assert items["brand"].to_pylist() == [None, None, "x"]


def test_users_too_short_to_split_go_whatever_k(tmp_path):
    rows = [review("long", item, 1) for item in "abc"] + [review("short", item, 1) for item in "ad"]
    folder = prepare_data(amazon(tmp_path, rows, k_core=0), tmp_path / "out")
    assert table(folder, "sequences")["user_id"].to_pylist() == ["long"]
    assert table(folder, "items")["item_id"].to_pylist() == ["a", "b", "c"]
    counts = summary(folder)
    assert (counts["users_below_minimum"], counts["items_below_minimum"], counts["user_minimum"]) == (1, 1, 3)


def test_logged_counts(tmp_path, caplog):
    rows = [review("u", item, 1, rating="bad", text=" ") for item in "abc"]
    rows += [{"reviewerID": "u", "asin": "d"}, {"asin": "d", "unixReviewTime": 1}]
    with caplog.at_level(logging.INFO):
        folder = prepare_data(amazon(tmp_path, rows), tmp_path / "out")
    counts = summary(folder)
    assert (counts["read_interactions"], counts["incomplete_interactions"]) == (5, 2)
    assert (counts["unknown_ratings"], counts["empty_reviews"]) == (3, 3)
    for text in ("1 users, 3 items, 3 interactions", "2 rows without user", "3 of 3 ratings", "id serves as its title"):
        assert text in caplog.text
    assert table(folder, "items")["title"].to_pylist() == ["a", "b", "c"]
    assert table(folder)["review"].to_pylist() == [" "] * 3


def test_sequences_keep_order(tmp_path):
    rows = [
        {"reviewerID": "v", "asins": list("dcba"), "unixReviewTimes": [4, 3, 2, 1], "overall": [None, 2, 3, 4]},
        {"reviewerID": "u", "asins": list("abca")},
    ]
    args = DataArguments(data_format="sequences", interactions=write_lines(tmp_path / "s.jsonl", rows), k_core=0)
    folder = prepare_data(args, tmp_path / "out")
    sequences = table(folder, "sequences").to_pylist()
    assert [row["items"] for row in sequences] == [[1, 2, 3], [4, 3, 2, 1]]
    assert sequences[1]["timestamps"] == [4, 3, 2, 1] and sequences[1]["ratings"] == [None, 2, 3, 4]
    assert summary(folder)["repeated_interactions"] == 1


@pytest.mark.parametrize("seed", range(5))
def test_k_core_is_the_largest(seed):
    rng = np.random.default_rng(seed)
    users, items = rng.integers(30, size=200), rng.integers(20, size=200)
    kept = set(range(200))
    while True:  # one interaction at a time, in another order
        count_users, count_items = Counter(users[list(kept)]), Counter(items[list(kept)])
        bad = [n for n in kept if count_users[users[n]] < 6 or count_items[items[n]] < 8]
        if not bad:
            break
        kept.remove(max(bad))
    assert k_core(users, items, 6, 8).tolist() == sorted(kept)


def test_equal_bytes_and_current_stage(tmp_path):
    rows = random_reviews(300, 30, 20)
    first = prepare_data(amazon(tmp_path, rows, k_core=3), tmp_path / "one")
    (tmp_path / "moved").mkdir()
    second = prepare_data(amazon(tmp_path / "moved", rows, k_core=3), tmp_path / "two")
    for name in FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    before = (first / "sequences.parquet").stat().st_mtime_ns
    prepare_data(amazon(tmp_path / "moved", rows, k_core=3), tmp_path / "one")  # equal bytes elsewhere: the same stage
    assert (first / "sequences.parquet").stat().st_mtime_ns == before


def test_other_settings_are_refused_then_overwritten(tmp_path):
    args = amazon(tmp_path, random_reviews(300, 30, 20))
    folder = prepare_data(args, tmp_path / "out")
    (folder / "tasks").mkdir()
    args.k_core = 3
    with pytest.raises(ValueError, match=r"k_core was 0, is 3.*--overwrite"):
        prepare_data(args, tmp_path / "out")
    assert (folder / "tasks").is_dir()
    prepare_data(args, tmp_path / "out", overwrite=True)
    assert not (folder / "tasks").exists() and summary(folder)["item_minimum"] == 3


@pytest.mark.parametrize(
    ("rows", "titles", "k", "error"),
    [
        ([review("u", item, 1) for item in "abc"], None, 5, r"No users and no items are left.*Lower k_core \(now 5\)"),
        ([review("u", item, 1) for item in "ab"], None, 0, "at least 3 interactions.*last item is the test target"),
        ([review("u", "a", 1)], [("b", "B")], 0, "No items are left: none of the 1 items.*has a title in .*meta.json"),
        ([review("u", "a", 1)], [("a", "")], 0, "No items are left"),
        ([review("", "a", 1)], None, 0, r"no usable interaction in it \(1 rows"),
        ([], None, 0, r"reviews\.json: no usable interaction"),
    ],
)
def test_nothing_left(tmp_path, rows, titles, k, error):
    with pytest.raises(ValueError, match=error):
        prepare_data(amazon(tmp_path, rows, titles, k_core=k), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_input_leaves_the_old_stage(tmp_path):
    args = amazon(tmp_path, random_reviews(300, 30, 20))
    folder = prepare_data(args, tmp_path / "out")
    before = {name: (folder / name).read_bytes() for name in FILES}
    path = tmp_path / "cut.json.gz"
    path.write_bytes(gzip.compress((tmp_path / "reviews.json").read_bytes())[:-2000])
    with pytest.raises(ValueError, match=r"cut\.json\.gz: the gzip file is cut short"):
        prepare_data(DataArguments(data_format="amazon", interactions=str(path)), tmp_path / "out", overwrite=True)
    assert {name: (folder / name).read_bytes() for name in FILES} == before
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["data"]


def test_a_disk_that_refuses_the_write(tmp_path):
    args = amazon(tmp_path, [review(f"u{u}", f"i{i}", i, text=str(u * i) * 100) for u in range(60) for i in range(60)])
    folder = prepare_data(args, tmp_path / "out")
    before = {name: (folder / name).read_bytes() for name in FILES}
    args.k_core = 5
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="out/data"):
            prepare_data(args, tmp_path / "out", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {name: (folder / name).read_bytes() for name in FILES} == before
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["data"]


def test_hub_dataset(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    rows = random_reviews(300, 30, 20)
    pq.write_table(pa.Table.from_pylist(rows), folder / "reviews.parquet")
    args = DataArguments(data_format="hub", interactions=str(folder), k_core=3)
    found = table(prepare_data(args, tmp_path / "out")).select(["user_id", "item_id", "timestamp", "review"])
    assert [tuple(row.values()) for row in found.to_pylist()] == expected_rows(rows, 3)


def test_synthetic(tmp_path):
    args = DataArguments(synthetic_users=60, synthetic_seed=3, k_core=0)
    first, second = (prepare_data(args, tmp_path / name) for name in ("one", "two"))
    for name in FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert summary(first)["users"] == 60
    assert "".join(table(first, "items")["title"].to_pylist())


@pytest.mark.data
def test_beauty(shared, tmp_path):
    source = shared / "data/amazon_beauty_2014"
    args = DataArguments(
        data_format="sequences",
        interactions=str(source / "sequences.jsonl.gz"),
        items=str(source / "items.jsonl.gz"),
    )
    folder = prepare_data(args, tmp_path)
    counts = summary(folder)
    assert (counts["users"], counts["items"], counts["interactions"]) == (22_332, 12_086, 198_215)
    ids = dict(zip(*(table(folder, "items")[name].to_pylist() for name in ("item", "item_id")), strict=True))
    sequences = table(folder, "sequences")
    users, sequence_items = (sequences[name].to_pylist() for name in ("user_id", "items"))
    found = {user: [ids[item] for item in items] for user, items in zip(users, sequence_items, strict=True)}
    with gzip.open(source / "sequences.jsonl.gz", "rt", encoding="utf-8") as file:
        given = {row["reviewerID"]: row["asins"] for row in map(json.loads, file)}
    assert all(found[user][-2:] == items[-2:] for user, items in given.items())
    assert found == given


@pytest.mark.data
def test_gift_cards(shared, tmp_path):
    source = shared / "data/amazon_gift_cards_2018"
    args = DataArguments(
        data_format="amazon",
        interactions=str(source / "Gift_Cards_5.json.gz"),
        items=str(source / "meta_Gift_Cards.json.gz"),
    )
    folder = prepare_data(args, tmp_path)
    counts = summary(folder)
    assert (counts["users"], counts["items"], counts["interactions"]) == (453, 147, 2_941)
    assert counts["repeated_interactions"] == 7
    assert all(table(folder, "items")["title"].to_pylist())


@pytest.mark.data
def test_musical_instruments_without_items(shared, tmp_path, caplog):
    path = shared / "data/amazon_musical_instruments_2014/reviews_Musical_Instruments_5.json.gz"
    folder = prepare_data(DataArguments(data_format="amazon", interactions=str(path)), tmp_path)
    counts = summary(folder)
    assert (counts["users"], counts["items"], counts["interactions"]) == (1_429, 900, 10_261)
    assert counts["empty_reviews"] == 7
    assert table(folder, "items")["title"].equals(table(folder, "items")["item_id"])
    assert "No titles are given" in caplog.text
