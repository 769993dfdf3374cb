"""From the columns of a source, in any known spelling and of any type, to raw interactions and items.

Nothing is left out or re-ordered here: a value that is missing or cannot be used becomes null.
"""

import contextlib
import datetime
import html
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

CHUNK = 2**15  # rows held as Python objects at a time
RAW_INTERACTIONS = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("timestamp", pa.int64()),
        ("rating", pa.float32()),
        ("summary", pa.string()),
        ("review", pa.string()),
    ]
)
# Our name -> the spellings it is read from, best first.
ALIASES = {
    "user_id": ("user_id", "reviewerID"),
    "item_id": ("item_id", "parent_asin", "asin"),
    "timestamp": ("timestamp", "unixReviewTime"),
    "rating": ("rating", "overall"),
    "summary": ("summary",),
    "review": ("review", "reviewText", "text"),
    "items": ("items", "asins"),
    "timestamps": ("timestamps", "unixReviewTimes"),
    "ratings": ("ratings", "overall"),
    "title": ("title",),
}
REQUIRED = ("user_id", "item_id", "timestamp")
AMAZON_RATINGS = (1.0, 5.0)
MILLISECONDS = 10**11  # as seconds this is the year 5138, as milliseconds 1973

_ELEMENTS = (
    "a|abbr|b|big|blockquote|body|br|center|code|div|dd|dl|dt|em|font|h[1-6]|head|hr|html|i|img|input|li|link|meta|nobr|ol|p|pre|"
    "small|span|strike|strong|sub|sup|table|tbody|td|th|thead|title|tr|tt|u|ul|wbr"
)
# Names of elements only: `<a_3>` or `</s>` in a title is untrusted text, which prompts neutralise, not formatting.
# The bounds keep a hostile title from costing quadratic time.
_TAG = re.compile(
    rf"<(script|style)\b.{{0,1000}}?</\1\s*>|<!--.{{0,1000}}?-->|</?(?:{_ELEMENTS}|script|style)(?:\s[^<>]*)?/?>",
    re.IGNORECASE | re.DOTALL,
)

Columns = dict[str, Sequence[Any] | pa.Array]


def raw_interactions(
    chunks: Iterable[Columns], source: str, *, amazon: bool = False, ordered: bool = False
) -> Iterator[pa.RecordBatch]:
    """Turns chunks of columns into batches with the schema `RAW_INTERACTIONS`, in the order of the source.

    A timestamp is in seconds since 1970; milliseconds and ISO 8601 dates are recognised, dates without a zone are UTC.
    A rating is any finite number.

    Args:
        chunks: columns of equal lengths, named by any spelling of `ALIASES`; others are ignored.
        source: what errors call the source.
        amazon: follow the Amazon releases: `timestamp` is in milliseconds, `title` is a review's, ratings are 1 to 5.
        ordered: the order of the source is the order in time; a missing timestamp is 0.

    Raises:
        ValueError: a required column is missing.
    """
    low, high = AMAZON_RATINGS if amazon else (-math.inf, math.inf)
    for number, columns in enumerate(chunks):
        if number == 0:
            require(columns, REQUIRED, source)
        # the 2023 release calls a review's title "title"; elsewhere that would be the item's
        summary = ("summary", "title") if amazon or "parent_asin" in columns else ("summary",)
        rows = max(map(len, columns.values()), default=0)
        times = [
            _seconds(columns[name], milliseconds=amazon and name == "timestamp")
            for name in ALIASES["timestamp"]
            if name in columns
        ]
        arrays = {
            "user_id": [_ids(values) for values in found(columns, ALIASES["user_id"])],
            "item_id": [_ids(values) for values in found(columns, ALIASES["item_id"])],
            "timestamp": [pc.fill_null(time, 0) for time in times] if ordered else times,
            "rating": [_ratings(values, low, high) for values in found(columns, ALIASES["rating"])],
            "summary": [to_texts(values) for values in found(columns, summary)],
            "review": [to_texts(values) for values in found(columns, ALIASES["review"])],
        }
        yield pa.record_batch(
            [_first(arrays[field.name], field.type, rows) for field in RAW_INTERACTIONS], schema=RAW_INTERACTIONS
        )


def raw_items(chunks: Iterable[Columns], source: str) -> Iterator[pa.Table]:
    """Turns chunks of columns into tables of strings: `item_id`, `title` and what else the source has.

    A title is plain text, null where there is none.

    Raises:
        ValueError: the items' ids or titles are missing.
    """
    for number, columns in enumerate(chunks):
        if number == 0:
            require(columns, ("item_id", "title"), source)
        rows = max(map(len, columns.values()), default=0)
        title = _first([to_texts(values) for values in found(columns, ALIASES["title"])], pa.string(), rows)
        table = {
            "item_id": _first([_ids(values) for values in found(columns, ALIASES["item_id"])], pa.string(), rows),
            "title": pa.array([clean_title(text) for text in title.to_pylist()], pa.string()),
        }
        for name, values in columns.items():
            if name not in ("item", "item_id", "title"):
                table[name] = to_texts(values)
        yield pa.table(table)


def table_columns(table: pa.Table) -> Iterator[Columns]:
    """Chunks of the columns of a table."""
    for batch in table.to_batches(max_chunksize=CHUNK):
        yield dict(zip(batch.schema.names, batch.columns, strict=True))


def clean_title(title: str | None) -> str | None:
    """A title without HTML entities, HTML elements and repeated white space; None if nothing is left."""
    if not title:
        return None
    title = html.unescape(html.unescape(title))  # some releases escape twice
    return " ".join(_TAG.sub(" ", title).split()) or None


def require(columns: Columns, fields: Sequence[str], source: Any) -> None:
    """Raises ValueError where a field has no column under any of its names."""
    for name in fields:
        if not any(alias in columns for alias in ALIASES[name]):
            raise ValueError(
                f"{source}: no column {' or '.join(ALIASES[name])}; found: {', '.join(map(str, columns))}. "
                "Rename the column, or set data_format to the format of the source."
            )


def found(columns: Columns, names: Sequence[str]) -> Iterator[Any]:
    """The values of those of the names that are columns."""
    return (columns[name] for name in names if name in columns)


def to_texts(values: Sequence[Any] | pa.Array) -> pa.Array:
    """Any values as strings: lists of plain values joined by spaces, other nested values as JSON, NaN as null."""
    if isinstance(values, pa.Array):
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            return values.cast(pa.string())
        values = values.to_pylist()
    try:
        return pa.array(values, pa.string())
    except (pa.ArrowException, UnicodeEncodeError):
        return pa.array([to_text(value) for value in values], pa.string())


def to_text(value: Any) -> str | None:
    """One value of `to_texts`."""
    if value is None or value != value:
        return None
    if isinstance(value, list | tuple) and not any(isinstance(part, list | tuple | dict) for part in value):
        value = " ".join(str(part) for part in value if part is not None)
    elif isinstance(value, list | tuple | dict):
        value = json.dumps(value, ensure_ascii=False, default=str)
    elif isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of whole ids with gaps arrives as floats
    # JSON may spell half of a surrogate pair, which is no character
    return str(value).encode("utf-8", "replace").decode("utf-8")


def _first(arrays: list[pa.Array], kind: pa.DataType, rows: int) -> pa.Array:
    """The first value that is not null in each row."""
    if len(arrays) == 1:
        return arrays[0]
    return pc.coalesce(*arrays) if arrays else pa.nulls(rows, kind)


def _ids(values: Sequence[Any] | pa.Array) -> pa.Array:
    names = to_texts(values)
    return pc.if_else(pc.equal(names, ""), pa.scalar(None, pa.string()), names)


def _ratings(values: Sequence[Any] | pa.Array, low: float, high: float) -> pa.Array:
    values = values.to_pylist() if isinstance(values, pa.Array) else values
    # one by one: Arrow would take true for 1
    exact = pa.array([_number(value) for value in values], pa.float64())
    numbers = exact.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    return pa.array(numbers, mask=~(np.isfinite(numbers) & (numbers >= low) & (numbers <= high)))


def _seconds(values: Sequence[Any] | pa.Array, milliseconds: bool) -> pa.Array:
    values = values.to_pylist() if isinstance(values, pa.Array) else values
    try:
        times = pa.array(values, pa.int64())
    except (pa.ArrowException, OverflowError):
        times = pa.array([_time(value) for value in values], pa.int64())
    if milliseconds:
        return pc.divide(times, 1000)
    return pc.if_else(pc.greater_equal(times, MILLISECONDS), pc.divide(times, 1000), times)


def _time(value: Any) -> int | None:
    number = _number(value)
    if number is None and isinstance(value, str | datetime.date):
        with contextlib.suppress(ValueError):
            time = datetime.datetime.fromisoformat(str(value).strip())
            number = time.replace(tzinfo=time.tzinfo or datetime.UTC).timestamp()
    return int(number) if number is not None and abs(number) < 2**62 else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
