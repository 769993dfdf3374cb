import csv
import datetime
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ulmrec_hf.data.arguments import DataArguments
from ulmrec_hf.data.columns import RAW_INTERACTIONS, clean_title
from ulmrec_hf.data.interactions import Interactions
from ulmrec_hf.data.readers import READERS, Reader, check_source, read_interactions, read_items
from ulmrec_hf.data.stage import prepare_data

ROW_2014 = {
    "reviewerID": "u",
    "asin": "a",
    "overall": 4.0,
    "unixReviewTime": 1393545600,
    "summary": "s",
    "reviewText": "t",
}
ROW_2023 = {
    "user_id": "u",
    "asin": "variant",
    "parent_asin": "a",
    "rating": 4.0,
    "timestamp": 1393545600123,
    "title": "s",
    "text": "t",
}
EXPECTED = {"user_id": "u", "item_id": "a", "timestamp": 1393545600, "rating": 4.0, "summary": "s", "review": "t"}


ROW_AMAZON = ("reviewerID", "asin", "unixReviewTime", "overall", "summary", "reviewText")  # in the order of EXPECTED


def write_lines(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def interactions(path, data_format="amazon", **kwargs):
    batches = list(read_interactions(DataArguments(data_format=data_format, interactions=str(path), **kwargs)))
    assert all(batch.schema == RAW_INTERACTIONS for batch in batches)
    return [row for batch in batches for row in batch.to_pylist()]


def items(path, data_format="amazon"):
    args = DataArguments(data_format=data_format, interactions="unused", items=str(path))
    return [row for table in read_items(args) for row in table.to_pylist()]


@pytest.mark.parametrize("row", [ROW_2014, {**ROW_2014, "overall": "4.0", "verified": True, "vote": "3"}, ROW_2023])
@pytest.mark.parametrize("packed", [False, True])
def test_amazon_releases(tmp_path, row, packed):
    path = write_lines(tmp_path / "reviews", [row])  # no suffix: the content decides
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert interactions(path) == [EXPECTED]


def test_missing_fields_and_lists(tmp_path):
    path = write_lines(
        tmp_path / "reviews.json",
        [
            ROW_2014,
            {"reviewerID": "u", "asin": "b", "unixReviewTime": 5, "reviewText": ["two", "parts"], "summary": []},
            {"reviewerID": "u", "unixReviewTime": 5},
            {"reviewerID": "", "asin": "b", "unixReviewTime": None},
        ],
    )
    rows = interactions(path)
    assert rows[1] == {
        "user_id": "u",
        "item_id": "b",
        "timestamp": 5,
        "rating": None,
        "summary": "",
        "review": "two parts",
    }
    assert rows[2]["item_id"] is None
    assert rows[3]["user_id"] is None and rows[3]["timestamp"] is None


def test_parent_asin_falls_back_to_asin(tmp_path):
    rows = [ROW_2023, {**ROW_2023, "parent_asin": None}, {**ROW_2023, "parent_asin": ""}]
    assert [row["item_id"] for row in interactions(write_lines(tmp_path / "r", rows))] == ["a", "variant", "variant"]


@pytest.mark.parametrize(
    "rating", [None, "", "good", float("nan"), float("inf"), 0, 6, -1, [5], True, 10**400, {"a": 1}]
)
def test_unusable_ratings_are_null(tmp_path, rating):
    path = write_lines(tmp_path / "r", [ROW_2014, {**ROW_2014, "overall": rating}])
    assert [row["rating"] for row in interactions(path)] == [4.0, None]


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("1393545600", 1393545600),
        (1393545600.9, 1393545600),
        ("2014-02-28", 1393545600),
        ("2014-02-28 01:00:00+01:00", 1393545600),
        ("2014-02-28T00:00:00.123Z", 1393545600),
        (10**40, None),
        ("now", None),
    ],
)
def test_times(tmp_path, time, seconds):
    path = write_lines(tmp_path / "r", [{**ROW_2014, "unixReviewTime": time}])
    assert interactions(path)[0]["timestamp"] == seconds


def test_untrusted_text_stays(tmp_path):
    text = "</s> ### Response:\n<a_3> <b>bold</b> \u0000 [INST]"
    path = write_lines(tmp_path / "r", [{**ROW_2014, "reviewText": text, "summary": text}])
    assert interactions(path)[0]["review"] == interactions(path)[0]["summary"] == text


def test_half_a_surrogate_pair(tmp_path):
    line = '{"reviewerID": "u", "asin": "a", "unixReviewTime": 1, "reviewText": "x\\ud83dy"}'
    path = write_lines(tmp_path / "r", [line])
    assert interactions(path)[0]["review"] == "x?y"


@pytest.mark.parametrize(
    ("title", "plain"),
    [
        ("Salt &amp; Pepper", "Salt & Pepper"),
        ("Salt &amp;amp; Pepper", "Salt & Pepper"),
        ("<b>Big</b><br/>Box\n  of  <span class='x'>Tea</span>", "Big Box of Tea"),
        ("&lt;i&gt;Tea&lt;/i&gt;", "Tea"),
        ("<script>var a = 1 < 2;</script>Tea<!-- note -->", "Tea"),
        ("size <5 and >3", "size <5 and >3"),
        ("<a_3> and </s> ### Response:", "<a_3> and </s> ### Response:"),
        ("  <br>  ", None),
        ("", None),
        (None, None),
    ],
)
def test_clean_title(title, plain):
    assert clean_title(title) == plain


def test_hostile_title_is_fast():
    assert clean_title("<script" * 2000) == "<script" * 2000


def test_items(tmp_path):
    path = write_lines(
        tmp_path / "meta.json",
        [
            {"asin": "a", "title": ["Tea", "&amp; Milk"], "category": ["Food", "Tea"], "price": 5.5},
            {"asin": "v", "parent_asin": "b", "title": "Box", "details": {"size": 1}, "images": [{"url": "x"}]},
            {"asin": "c"},
        ],
    )
    rows = items(path)
    assert [(row["item_id"], row["title"]) for row in rows] == [("a", "Tea & Milk"), ("b", "Box"), ("c", None)]
    assert rows[0]["category"] == "Food Tea" and rows[0]["price"] == "5.5"
    assert rows[1]["details"] == '{"size": 1}' and rows[1]["images"] == '[{"url": "x"}]'


def test_metadata_of_python_literals(tmp_path):
    path = write_lines(tmp_path / "meta.json", ["""{'asin': 'a', 'title': "Bob's Tea", 'price': None}"""])
    assert items(path) == [{"item_id": "a", "title": "Bob's Tea", "asin": "a", "price": None}]


@pytest.mark.parametrize(
    "line", ["{'asin': __import__('os').getcwd()}", "{'asin': 'a'", "{asin: 1}", "[1]", "3", '{"a": 1']
)
def test_not_json(tmp_path, line):
    path = write_lines(tmp_path / "r.json", [ROW_2014, "", line])
    with pytest.raises(ValueError, match=r"r\.json:3: not (JSON|a JSON object)"):
        interactions(path)


def test_deep_nesting_is_not_json(tmp_path):
    path = write_lines(tmp_path / "r.json", ["[" * 100_000])
    with pytest.raises(ValueError, match=r"r\.json:1: not JSON"):
        interactions(path)


def test_not_utf8(tmp_path):
    path = tmp_path / "r.json"
    path.write_bytes(json.dumps(ROW_2014).encode() + b'\n{"asin": "\xff"}\n')
    with pytest.raises(ValueError, match=r"r\.json:2: not UTF-8"):
        interactions(path)


def test_byte_order_mark(tmp_path):
    path = tmp_path / "r.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW_2014).encode())
    assert interactions(path) == [EXPECTED]


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:-6] + b"\0" * 6])
def test_damaged_gzip(tmp_path, damage):
    path = tmp_path / "r.json.gz"
    lines = "".join(json.dumps({**ROW_2014, "reviewText": str(i**9)}) + "\n" for i in range(5000))
    path.write_bytes(damage(gzip.compress(lines.encode())))
    with pytest.raises(ValueError, match=r"r\.json\.gz: the gzip file is cut short or damaged after about line \d+"):
        interactions(path)


def test_missing_column_names_what_was_found(tmp_path):
    path = write_lines(tmp_path / "r.json", [{"reviewerID": "u", "product": "a", "unixReviewTime": 1}])
    with pytest.raises(ValueError, match=r"no column item_id or parent_asin or asin; found: reviewerID, product, unix"):
        interactions(path)


@pytest.mark.parametrize("data_format", ["csv", "jsonl", "parquet", "hub"])
@pytest.mark.parametrize("names", ["ours", "amazon"])
def test_tables(tmp_path, data_format, names):
    rows = [EXPECTED, {**EXPECTED, "item_id": "b", "rating": 9.5, "review": 'a "quoted",\nline'}]
    if names == "amazon":
        spelt = dict(zip(EXPECTED, ROW_AMAZON, strict=True))
        given = [{spelt[name]: value for name, value in row.items()} for row in rows]
    else:
        given = rows
    folder = tmp_path / "set"
    folder.mkdir()
    path = folder / "data.parquet"
    if data_format == "jsonl":
        path = write_lines(folder / "data.jsonl", given)
    elif data_format == "csv":
        path = folder / "data.csv"
        write_csv(path, given)
    else:
        pq.write_table(pa.Table.from_pylist(given), path)
    assert interactions(folder if data_format == "hub" else path, data_format) == rows


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_title_of_a_table_is_the_items_unless_2023(tmp_path):
    row = {"user_id": "u", "item_id": "a", "timestamp": 1, "title": "Tea"}
    assert interactions(write_lines(tmp_path / "a", [row]), "jsonl")[0]["summary"] is None
    assert interactions(write_lines(tmp_path / "b", [ROW_2023]), "jsonl") == [EXPECTED]


def test_packed_csv_and_integer_ids(tmp_path):
    path = tmp_path / "data.csv.gz"
    path.write_bytes(gzip.compress(b"user_id,item_id,timestamp\r\n7,8,9\r\n"))
    row = interactions(path, "csv")[0]
    assert row == {**dict.fromkeys(RAW_INTERACTIONS.names), "user_id": "7", "item_id": "8", "timestamp": 9}


def test_parquet_types(tmp_path):
    path = tmp_path / "data.parquet"
    time = datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC)
    columns = {
        "user_id": pa.array([1, None], pa.int64()),
        "item_id": pa.array([1.0, 2.0]),
        "timestamp": pa.array([time, None], pa.timestamp("ms", "UTC")),
        "review": pa.array(["x", None], pa.large_string()),
    }
    pq.write_table(pa.table(columns), path)
    first, second = interactions(path, "parquet")
    assert (first["user_id"], first["item_id"], first["review"]) == ("1", "1", "x")
    assert first["timestamp"] == int(time.timestamp())
    assert (second["user_id"], second["timestamp"]) == (None, None)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("user_id,item_id,timestamp\nu,a,1\nu,a\n", r"data\.csv:3: 2 fields, but the first line names 3 columns"),
        ('user_id,item_id,timestamp\nu,a,1\nu,"a,1\n', r"data\.csv:3: not CSV"),
        ("user,item\nu,a\n", r"no column user_id or reviewerID; found: user, item"),
        ("", "the file is empty"),
    ],
)
def test_bad_csv(tmp_path, text, error):
    path = tmp_path / "data.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=error):
        interactions(path, "csv")


def test_bad_parquet(tmp_path):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist([EXPECTED]), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"data\.parquet: not a whole Parquet file"):
        interactions(path, "parquet")


def test_hub_dataset_that_is_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"the dataset .*empty.* cannot be loaded"):
        interactions(tmp_path / "empty", "hub")


def test_sequences_keep_their_order(tmp_path):
    rows = [
        {"reviewerID": "u", "asins": ["c", "a"], "unixReviewTimes": [9, 1], "overall": [None, 3]},
        {"user_id": "v", "items": ["a", "b"]},
    ]
    found = interactions(write_lines(tmp_path / "s.jsonl", rows), "sequences")
    assert [(row["user_id"], row["item_id"], row["timestamp"], row["rating"]) for row in found] == [
        ("u", "c", 9, None),
        ("u", "a", 1, 3.0),
        ("v", "a", 0, None),
        ("v", "b", 0, None),
    ]


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([{"user_id": "u", "items": ["a"], "overall": [1, 2]}], r"s:1: user 'u' has 1 items, but not as many ratings"),
        ([{"user_id": "u", "items": ["a"]}, {"user_id": "u", "items": ["b"]}], r"s:2: user 'u' has had a row before"),
        ([{"user_id": "u", "items": ["a"]}, {"user_id": "v", "items": "b"}], r"s:2: a row needs a user_id"),
        ([{"user_id": "u", "item_id": "b"}], "no column items or asins; found: user_id, item_id"),
    ],
)
def test_bad_sequences(tmp_path, rows, error):
    with pytest.raises(ValueError, match=error):
        interactions(write_lines(tmp_path / "s", rows), "sequences")


def test_missing_files(tmp_path):
    there = write_lines(tmp_path / "r.json", [ROW_2014])
    for paths, error in (
        ({"interactions": tmp_path / "no.json"}, r"interactions: .*no\.json does not exist"),
        ({"interactions": tmp_path}, "interactions: .* is a folder"),
        ({"interactions": there, "items": tmp_path / "no.json"}, r"items: .*no\.json does not exist"),
    ):
        with pytest.raises(ValueError, match=error):
            check_source(DataArguments(data_format="amazon", **{name: str(path) for name, path in paths.items()}))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"data_format": "xml"}, "data_format is 'xml'; it must be one of amazon, csv"),
        ({"data_format": "csv"}, "interactions is not set"),
        ({"interactions": "file"}, "'synthetic', which reads no file"),
        ({"k_core": -1}, "k_core is -1"),
        ({"k_core": 2.5}, "k_core is 2.5"),
        ({"synthetic_users": 0}, "synthetic_users is 0"),
    ],
)
def test_bad_settings(settings, error):
    with pytest.raises(ValueError, match=error):
        DataArguments(**settings)


def test_settings_have_help():
    fields = DataArguments.__dataclass_fields__.values()
    assert all(field.metadata["help"] for field in fields)
    assert all(name in DataArguments.__dataclass_fields__["data_format"].metadata["help"] for name in READERS)


def test_a_format_from_outside_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(READERS, "_entries", dict(READERS._entries))  # so that no other test finds it

    def toy_columns(path):
        with open(path, encoding="utf-8") as file:
            rows = [line.split() for line in file]
        yield dict(zip(("user_id", "item_id", "timestamp"), zip(*rows, strict=True), strict=True))

    READERS.register("toy")(Reader(toy_columns))

    path = tmp_path / "purchases.txt"
    path.write_text("".join(f"user{user} item{item} {item}\n" for user in range(3) for item in range(4)))
    folder = prepare_data(DataArguments(data_format="toy", interactions=str(path), k_core=0), tmp_path)
    assert pq.read_table(folder / "sequences.parquet")["items"].to_pylist() == [[1, 2, 3, 4]] * 3
    assert len(Interactions.read(path, "toy")) == 12
    with pytest.raises(ValueError, match=r"data_format is .xml.; it must be one of .*, toy"):
        Interactions.read(path, "xml")
