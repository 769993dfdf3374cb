"""The candidates table: the top k of a retriever for training positions, validation and test, in blocks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from tqdm.auto import tqdm

from ..protocol import SPLITS, target_positions
from ..tables import CANDIDATES, RANKS, Sequences
from .topk import hide, ranks_of, seen_places, top_items

_BLOCK = 16384  # rows that are held at once, grouped by length and written as one row group
_CELLS = 1 << 22  # scores that are held at once: 16 MB


class Scorer(Protocol):
    """What this module needs of a `Retriever`, whose base imports it."""

    name: str
    config: Any

    def score(self, histories: Sequence[np.ndarray]) -> torch.Tensor:
        """See `Retriever.score`."""

    def check_catalogue(self, catalogue: str) -> None:
        """See `Retriever.check_catalogue`."""


@torch.inference_mode()
def search(
    retriever: Scorer,
    histories: Sequence[np.ndarray],
    k: int,
    targets: np.ndarray | None = None,
    bar: tqdm | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores histories in batches of similar length.

    Args:
        histories: int [length] each, with ids of the catalogue only.
        k: how many of the best items to keep; 0 = the targets' ranks alone.
        targets: int64 [rows], the items to rank; without, their places are 0.
        bar: advanced by the rows of each batch.

    Returns:
        Items int64 and scores float32, [rows, k] each, as `Retriever.top` returns them; the targets' places,
        int64 [rows, 3], see `topk.ranks_of`.

    Raises:
        ValueError: the scores are NaN.
    """
    num_items, count = retriever.config.num_items, len(histories)
    k, batch_size = min(k, num_items), max(1, min(256, _CELLS // (num_items + 1)))
    items, values = np.empty((count, k), np.int64), np.empty((count, k), np.float32)
    ranks = np.zeros((count, 3), np.int64)
    lengths = np.array([len(history) for history in histories], dtype=np.int64)
    for start in range(0, count, _BLOCK):
        # rows of one length together, to keep padding low
        order = start + np.argsort(lengths[start : start + _BLOCK], kind="stable")
        for rows in np.split(order, range(batch_size, len(order), batch_size)):
            batch = [histories[row] for row in rows]
            scores = retriever.score(batch)
            hide(scores, seen_places(batch).to(scores.device))
            if targets is not None:
                ranks[rows] = ranks_of(scores, torch.from_numpy(targets[rows]).to(scores.device)).cpu().numpy()
            if k:
                items[rows], values[rows] = (part.cpu().numpy() for part in top_items(scores, k))
            if bar is not None:
                bar.update(len(rows))
    return items, values, ranks


def retrieve(
    retriever: Scorer, sequences: Sequences, split: str, users: np.ndarray, positions: np.ndarray, k: int
) -> Iterator[pa.Table]:
    """The candidates of some rows of a split, in blocks of the schema `CANDIDATES`; see `Retriever.candidates`.

    Args:
        sequences: whole sequences, targets included.
        users, positions: int64 [rows], see `protocol.target_positions`.
        k: candidates per row; 0 = the targets' ranks alone, with empty lists.

    Raises:
        ValueError: the retriever belongs to another catalogue, or its scores are NaN.
    """
    retriever.check_catalogue(sequences.catalogue)
    begins = sequences.offsets[users]
    targets = sequences.items[begins + positions].astype(np.int64)
    description = f"{retriever.name} {'candidates' if k else 'ranks'} ({split})"
    with tqdm(total=len(users), desc=description, unit="row") as bar:
        for start in range(0, len(users), _BLOCK):
            rows = slice(start, start + _BLOCK)
            ends = begins[rows] + positions[rows]
            histories = [sequences.items[begin:end] for begin, end in zip(begins[rows], ends, strict=True)]
            items, scores, ranks = search(retriever, histories, k, targets[rows], bar)
            real = scores > -np.inf
            offsets = np.concatenate([[0], np.cumsum(real.sum(1))]).astype(np.int32)
            columns = [
                users[rows].astype(np.int32),
                pa.repeat(split, len(real)),
                positions[rows].astype(np.int32),
                pa.ListArray.from_arrays(offsets, items[real].astype(np.int32)),
                pa.ListArray.from_arrays(offsets, scores[real]),
                targets[rows].astype(np.int32),
                *ranks.astype(np.int32).T,
            ]
            yield pa.table(columns, schema=CANDIDATES)


def candidate_tables(
    retrievers: Mapping[str, Sequence[Scorer]], sequences: Sequences, k: int, train_positions: int
) -> Iterator[pa.Table]:
    """The candidates of all splits, in blocks; see `Retriever.candidates`.

    Args:
        retrievers: for each split, those that find its candidates: of n, the f-th has the users u % n == f.
        sequences: whole sequences, targets included.
    """
    for split in SPLITS:
        users, positions = target_positions(sequences.lengths, split, train_positions)
        for fold, retriever in enumerate(retrievers[split]):
            own = users % len(retrievers[split]) == fold
            yield from retrieve(retriever, sequences, split, users[own], positions[own], k)


def rank_table(candidates: pa.Table, system: str) -> pa.Table:
    """The places of a candidates table's targets, with the schema `RANKS`; `system` is who ranked them."""
    users, splits, *places = (candidates[name] for name in ("user", "split", "target_first", "target_tied"))
    return pa.table([users, splits, pa.repeat(system, len(users)), *places], schema=RANKS).combine_chunks()
