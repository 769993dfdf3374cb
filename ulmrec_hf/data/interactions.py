"""Interactions in memory: from a table, a dataset or a file to `LeaveOneOut`, by the same rules as the data stage."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa

from ..tables import LeaveOneOut
from .arguments import DataArguments
from .columns import CHUNK, raw_interactions, raw_items, table_columns, to_texts
from .readers import read_source, source_settings
from .selection import TEXTS, Selection, log_summary, read_selection

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

    Titles = Mapping[str, str] | pd.Series | pd.DataFrame | pa.Table


class Interactions:
    """Who chose what and when, with the items' titles; what cannot be used is left out and counted.

    Left out are, in this order, rows without user, item or time, interactions of items without a title, and repeated
    (user, item) pairs, of which the earliest stays. `k_core` filters further; `leave_one_out` gives what all else is
    made from. Make one by `from_pandas`, `from_arrow`, `from_dataset`, `read` or `toy_world`.

    A source needs the columns user_id, item_id and timestamp; rating, summary and review are optional, and the
    spellings of the Amazon releases are known as well. Timestamps are seconds or milliseconds since 1970, dates or
    ISO 8601 text.
    """

    def __init__(self, selection: Selection, texts: pa.Table):
        self._selection, self._texts = selection, texts

    def __getattr__(self, name: str) -> Any:
        hint = ": call .leave_one_out() first" if hasattr(LeaveOneOut, name) else ""
        raise AttributeError(f"Interactions has no {name}{hint}.")

    @classmethod
    def from_pandas(cls, df: "pd.DataFrame", titles: "Titles | None" = None) -> Self:
        """Takes the interactions of a pandas table, one a row.

        Args:
            titles: item_id -> title as a mapping or Series, or a table with the columns item_id and title, whose other
                columns are kept. Items that are not in it are left out; without it, an item's id is its title.

        Raises:
            ValueError: a column is missing, or nothing usable is left; the message says why.
        """
        return cls.from_arrow(_arrow_table(df), titles)

    @classmethod
    def from_arrow(cls, table: pa.Table, titles: "Titles | None" = None) -> Self:
        """Takes the interactions of an Arrow table; see `from_pandas`."""
        items = None if titles is None else raw_items(table_columns(_title_table(titles)), "titles")
        return cls._collect(
            raw_interactions(table_columns(table), "the table"), items, name="the table", titles="titles"
        )

    @classmethod
    def from_dataset(cls, dataset: "Dataset", titles: "Titles | None" = None) -> Self:
        """Takes the interactions of one split of a dataset; see `from_pandas`."""
        if isinstance(dataset, Mapping):
            raise ValueError(f"the dataset has the splits {', '.join(dataset)}: give one of them.")
        return cls.from_arrow(dataset.with_format("arrow")[:], titles)

    @classmethod
    def read(cls, path: str | os.PathLike, format: str = "csv", items: str | os.PathLike | None = None) -> Self:
        """Reads a file or, for format "hub", a dataset.

        Args:
            path: the interactions.
            format: a name of `ulmrec_hf.data.readers.READERS`, such as csv, jsonl, parquet, amazon or sequences.
            items: a file with the items' titles; its name says its format (see `readers.read_items`).

        Raises:
            ValueError: a file is missing, damaged or of another format; the message names file and line.
        """
        items = None if items is None else os.fspath(items)
        return cls._read(DataArguments(data_format=format, interactions=os.fspath(path), items=items))

    @classmethod
    def toy_world(cls, users: int = 1000, seed: int = 0) -> Self:
        """Simulates customers with a hidden taste: see `ulmrec_hf.data.synthetic`."""
        return cls._read(DataArguments(data_format="synthetic", synthetic_users=users, synthetic_seed=seed))

    @classmethod
    def _read(cls, args: DataArguments) -> Self:
        return cls._collect(*read_source(args), **source_settings(args))

    @classmethod
    def _collect(cls, *source: Any, **settings: Any) -> Self:
        parts: list[pa.RecordBatch] = []
        selection = read_selection(*source, parts.append, **settings)
        # an array of type string holds 2 GiB at most
        large = pa.schema([(name, pa.large_string()) for name in TEXTS.names])
        return cls(selection, pa.Table.from_batches(parts, TEXTS).cast(large).combine_chunks())

    def __len__(self) -> int:
        return len(self._selection.rows)

    def __repr__(self) -> str:
        kept = self._selection
        users, items = (len(np.unique(codes[kept.rows])) for codes in (kept.users, kept.items))
        return f"Interactions(users={users}, items={items}, interactions={len(self)})"

    @property
    def left_out(self) -> dict[str, int]:
        """How many interactions were read, and how many left out for which reason; named as in `summary.json`."""
        return dict(self._selection.left_out)

    def k_core(self, k: int) -> Self:
        """The users and items with at least `k` interactions, filtered until both hold.

        Users with fewer than 3 are always left out: they cannot be split.

        Raises:
            ValueError: `k` is negative, or none are left.
        """
        return type(self)(self._selection.k_core(k), self._texts)

    def leave_one_out(self) -> LeaveOneOut:
        """Numbers users and items by sorted id and puts every user's interactions in time order.

        The tables are those of a data stage of equal settings. Users with fewer than 3 interactions are left out.

        Raises:
            ValueError: no user has 3 interactions.
        """
        kept = self._selection if self.left_out["user_minimum"] else self._selection.k_core(0)
        numbered = kept.number()
        log_summary({**numbered.counts(), **kept.left_out})
        interactions = []
        for begin in range(0, len(numbered.rows), CHUNK):
            part = slice(begin, begin + CHUNK)
            texts = self._texts.take(pa.array(numbered.rows[part])).cast(TEXTS)
            interactions.append(numbered.interactions(texts, part))
        tables = {
            "interactions": pa.concat_tables(interactions),
            "items": numbered.catalogue,
            "sequences": numbered.sequences(),
        }
        return LeaveOneOut(tables)


def _arrow_table(df: "pd.DataFrame") -> pa.Table:
    if not hasattr(df, "columns") or not df.columns.is_unique:
        what = f"a {type(df).__name__}" if not hasattr(df, "columns") else "a table with columns of one name"
        raise ValueError(f"from_pandas takes a DataFrame with columns of different names; got {what}.")
    columns = {}
    for name in df.columns:
        try:
            columns[str(name)] = pa.array(df[name], from_pandas=True)
        except pa.ArrowException:  # values of several types, such as ids that are numbers or text
            columns[str(name)] = to_texts(df[name].astype(object).where(df[name].notna(), None).tolist())
    return pa.table(columns)


def _title_table(titles: "Titles") -> pa.Table:
    import pandas as pd

    if isinstance(titles, pd.DataFrame):
        return _arrow_table(titles)
    if isinstance(titles, pd.Series):
        return _arrow_table(pd.DataFrame({"item_id": titles.index, "title": titles.array}))
    if isinstance(titles, Mapping):
        return pa.table({"item_id": to_texts(list(titles)), "title": to_texts(list(titles.values()))})
    if isinstance(titles, pa.Table):
        return titles
    raise ValueError(
        f"titles is a {type(titles).__name__}; give a mapping or Series from item_id to title, or a table with the "
        "columns item_id and title."
    )
