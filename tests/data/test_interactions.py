import json
import logging

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ulmrec_hf.data.arguments import DataArguments
from ulmrec_hf.data.interactions import Interactions
from ulmrec_hf.data.stage import prepare_data
from ulmrec_hf.tables import LeaveOneOut

TABLES = ("interactions", "items", "sequences")


def purchases(count=900, users=90, items=60, seed=0):
    """Purchases with repeated pairs, ties in time, gaps in every column, and users and items below any minimum."""
    rng = np.random.default_rng(seed)
    rows = {
        "user_id": [f"u{user}" for user in rng.integers(users, size=count)],
        "item_id": [f"i{item}" for item in rng.integers(items, size=count)],
        "timestamp": rng.integers(1, 30, size=count).tolist(),
        "rating": rng.integers(1, 6, size=count).tolist(),
        "summary": [f"summary {n}" for n in range(count)],
        "review": [f"text {n}" for n in range(count)],
    }
    for values in rows.values():
        for gap in rng.integers(count, size=20):
            values[gap] = None
    return rows


def titles(items=60):
    return {f"i{item}": f"Item &amp; <b>{item}</b>" if item % 7 else " " for item in range(items)}


def assert_same(found: LeaveOneOut, expected: LeaveOneOut):
    for name in TABLES:
        one, two = (
            data._tables[name] if data.folder is None else pq.read_table(data.folder / f"{name}.parquet")
            for data in (found, expected)
        )
        assert one.schema.equals(two.schema) and one.equals(two), name
    assert found.sequences.catalogue == expected.sequences.catalogue
    assert found.texts().texts == expected.texts().texts


def write_lines(path, columns):
    rows = pa.table(columns).to_pylist()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def sources(tmp_path):
    """Interactions and items of every format that is a file."""
    columns = purchases()
    spelt = ("reviewerID", "asin", "unixReviewTime", "overall", "summary", "reviewText")
    names = {"item_id": list(titles()), "title": list(titles().values())}
    pd.DataFrame(columns).to_csv(tmp_path / "rows.csv", index=False)
    pd.DataFrame(names).to_csv(tmp_path / "items.csv", index=False)
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    write_lines(tmp_path / "rows.jsonl", columns)
    write_lines(tmp_path / "rows.json", dict(zip(spelt, columns.values(), strict=True)))
    write_lines(tmp_path / "lists.jsonl", {"user_id": list("cab"), "items": [list("zyxz"), list("xy"), list("yxz")]})
    return {
        "csv": (tmp_path / "rows.csv", tmp_path / "items.csv"),
        "parquet": (tmp_path / "rows.parquet", tmp_path / "items.csv"),
        "jsonl": (tmp_path / "rows.jsonl", None),
        "amazon": (tmp_path / "rows.json", tmp_path / "items.csv"),
        "sequences": (tmp_path / "lists.jsonl", None),
    }


@pytest.mark.parametrize("k", [0, 2, 5])
@pytest.mark.parametrize("data_format", ["csv", "parquet", "jsonl", "amazon"])
def test_memory_gives_what_the_stage_writes(tmp_path, sources, data_format, k, monkeypatch):
    monkeypatch.setattr("ulmrec_hf.data.interactions.CHUNK", 37)  # many parts
    path, items = sources[data_format]
    args = DataArguments(data_format, str(path), None if items is None else str(items), k_core=k)
    folder = prepare_data(args, tmp_path / "out")
    interactions = Interactions.read(path, data_format, items)
    everything = len(interactions)
    kept = interactions.k_core(k)
    assert_same(kept.leave_one_out(), LeaveOneOut.load(folder))
    summary = json.loads((folder / "summary.json").read_text())
    assert kept.left_out == {name: summary[name] for name in kept.left_out}
    assert len(kept) == summary["interactions"] < everything == len(interactions)
    assert repr(kept) == (
        f"Interactions(users={summary['users']}, items={summary['items']}, interactions={summary['interactions']})"
    )
    if not k:  # users that cannot be split are left out in any case
        assert_same(interactions.leave_one_out(), LeaveOneOut.load(folder))


def test_sequences_keep_their_order(tmp_path, sources):
    path, _ = sources["sequences"]
    data = Interactions.read(path, "sequences").leave_one_out()
    assert_same(data, LeaveOneOut.load(prepare_data(DataArguments("sequences", str(path), k_core=0), tmp_path / "out")))
    assert data.user_ids == ["b", "c"]
    assert [data.sequences[user].tolist() for user in (0, 1)] == [[2, 1, 3], [3, 2, 1]]


def test_toy_world(tmp_path):
    folder = prepare_data(DataArguments(synthetic_users=300, synthetic_seed=3), tmp_path)
    assert_same(Interactions.toy_world(users=300, seed=3).k_core(5).leave_one_out(), LeaveOneOut.load(folder))
    with pytest.raises(ValueError, match="synthetic_users is 0"):
        Interactions.toy_world(users=0)


def test_tables_and_datasets_give_the_same(sources):
    expected = Interactions.read(sources["parquet"][0], "parquet", sources["parquet"][1]).k_core(3).leave_one_out()
    columns = purchases()
    table = pa.table(columns)
    dataset = datasets.Dataset.from_dict({name: values[::-1] for name, values in columns.items()})
    reverse = dataset.select(range(len(dataset) - 1, -1, -1))  # with an index over the rows
    for interactions in (
        Interactions.from_pandas(pd.DataFrame(columns), titles()),
        Interactions.from_arrow(table, titles()),
        Interactions.from_arrow(table.rename_columns(["reviewerID", "asin", *table.column_names[2:]]), titles()),
        Interactions.from_dataset(reverse, titles()),
        Interactions.from_dataset(reverse.with_format("numpy", columns=["user_id"]), titles()),
    ):
        assert_same(interactions.k_core(3).leave_one_out(), expected)


@pytest.mark.parametrize(
    "spell",
    [
        dict,
        pd.Series,
        lambda titles: pd.DataFrame({"item_id": titles.keys(), "title": titles.values()}),
        lambda titles: pa.table({"asin": list(titles), "title": list(titles.values())}),
    ],
)
def test_titles(spell):
    rows = {"user_id": ["u"] * 5, "item_id": list("abcde"), "timestamp": range(5)}
    spelt = spell({"b": "B &amp; <i>b</i>", "a": "A", "c": "C", "d": None, "x": "not taken"})
    interactions = Interactions.from_pandas(pd.DataFrame(rows), spelt)
    assert interactions.leave_one_out().titles == ["A", "B & b", "C"]
    assert (interactions.left_out["untitled_items"], interactions.left_out["untitled_interactions"]) == (2, 2)


def test_other_columns_of_the_items_are_kept():
    rows = {"user_id": ["u"] * 3, "item_id": list("cab"), "timestamp": range(3)}
    items = pd.DataFrame({"brand": ["x", None], "title": ["C", "A"], "item_id": ["c", "a"]})
    items = pd.concat([items, pd.DataFrame({"item_id": ["b"], "title": ["B"], "price": [5]})])
    table = Interactions.from_pandas(pd.DataFrame(rows), items).leave_one_out()._tables["items"]
    assert table.to_pydict() == {
        "item": [1, 2, 3],
        "item_id": ["a", "b", "c"],
        "title": ["A", "B", "C"],
        "brand": [None, None, "x"],
        "price": [None, "5", None],
    }


def test_types_of_pandas(caplog):
    times = ["2020-01-03", "2020-01-01T00:00:00.123456789", "2020-01-02", None]
    rows = pd.DataFrame(
        {
            "user_id": pd.Series([7, 7, 7, None]),  # whole numbers with a gap: floats
            "item_id": pd.Series(["a", 5, "c", "d"], dtype=object),
            "timestamp": pd.to_datetime(times, format="ISO8601", utc=True),
            "rating": pd.Series([4, None, 5, 1], dtype="Int64"),
            "review": pd.Series(["good", pd.NA, "fine", "x"], dtype="string"),
            "summary": pd.Series(["x", "x", "y", "y"], dtype="category"),
            "title": ["other"] * 4,
            8: range(4),
        }
    ).set_index(pd.Index(list("wxyz")))
    with caplog.at_level(logging.INFO):
        data = Interactions.from_pandas(rows).leave_one_out()
    assert data.user_ids == ["7"] and data.titles == ["5", "a", "c"]
    assert data.sequences.items.tolist() == [1, 3, 2]
    assert data.times.tolist() == [1577836800 + 86400 * day for day in range(3)]
    assert np.array_equal(data.ratings, [np.nan, 5, 4], equal_nan=True)
    assert data.texts(train_only=False).texts == ["x", "y fine", "x good"]
    for text in ("id serves as its title", "1 users, 3 items, 3 interactions", "1 rows without user", "1 of 3 ratings"):
        assert text in caplog.text


def test_nothing_changes_what_it_was_made_from():
    interactions = Interactions.toy_world(300)
    before = interactions.left_out
    interactions.k_core(6)
    interactions.left_out.clear()
    assert interactions.left_out == before and len(interactions) == before["read_interactions"]
    twice, once = interactions.k_core(3).k_core(6), interactions.k_core(6)
    assert twice.left_out == once.left_out
    assert_same(twice.leave_one_out(), once.leave_one_out())


ROWS = {"user_id": ["u"] * 3, "item_id": list("abc"), "timestamp": [1, 2, 3]}


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (
            lambda: Interactions.from_pandas(pd.DataFrame({"user": ["u"]})),
            "no column user_id or reviewerID; found: user",
        ),
        (
            lambda: Interactions.from_pandas(pd.DataFrame(ROWS), {"x": "X"}),
            "none of the 3 items in the table has a title",
        ),
        (lambda: Interactions.from_pandas(pd.DataFrame(ROWS), ["X"]), "titles is a list; give a mapping"),
        (
            lambda: Interactions.from_arrow(pa.table(ROWS), pa.table({"item_id": ["a"]})),
            "titles: no column title; found",
        ),
        (lambda: Interactions.from_arrow(pa.table(ROWS).slice(0, 0)), "no usable interaction in it"),
        (lambda: Interactions.from_arrow(pa.table(ROWS).slice(0, 2)).leave_one_out(), "at least 3 interactions"),
        (lambda: Interactions.from_arrow(pa.table(ROWS)).k_core(5), r"Lower k_core \(now 5\)"),
        (lambda: Interactions.from_arrow(pa.table(ROWS)).k_core(-1), "k_core is -1"),
        (lambda: Interactions.from_dataset(datasets.DatasetDict(train=1, test=2)), "has the splits train, test"),
        (lambda: Interactions.read("nowhere.csv"), r"interactions: nowhere\.csv does not exist"),
        (lambda: Interactions.read("x", "synthetic"), "'synthetic', which reads no file"),
    ],
)
def test_bad_input(make, error):
    with pytest.raises(ValueError, match=error):
        make()
