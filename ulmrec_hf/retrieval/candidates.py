"""The candidates table: the top k of a retriever for training positions, validation and test, streamed."""

import os
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from ..files import atomic_path
from ..protocol import SPLITS
from ..tables import CANDIDATES, Sequences
from .base import Retriever
from .topk import hide, ranks_of, seen_places, top_items

_BLOCK = 16384  # rows that are held at once, grouped by length and written as one row group
_CELLS = 1 << 22  # scores that are held at once: 16 MB


@dataclass(frozen=True)
class Positions:
    """Which item of which user is the target of each row: int64 arrays [rows]."""

    users: np.ndarray
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.users)


def split_positions(sequences: Sequences, split: str, train_positions: int = 0) -> Positions:
    """The rows of one split, by user and then position.

    Args:
        split: "test" has every user's last position, "validation" the second last, "train" those of the
            train part but the first, which has no history.
        train_positions: how many of the newest train positions of each user; 0 = all.
    """
    lengths = sequences.lengths
    if split != "train":
        back = {"validation": 2, "test": 1}[split]
        users = np.flatnonzero(lengths >= back)
        return Positions(users, lengths[users] - back)
    counts = np.maximum(lengths - 3, 0)
    if train_positions:
        counts = np.minimum(counts, train_positions)
    users = np.repeat(np.arange(len(lengths)), counts)
    last_row = np.repeat(np.cumsum(counts), counts)
    return Positions(users, lengths[users] - 2 - last_row + np.arange(len(users)))


def retrieve(
    retriever: Retriever, sequences: Sequences, rows: Positions, k: int, *, description: str = "retrieving"
) -> Iterator[dict[str, np.ndarray]]:
    """Scores rows in blocks; of a row's user only the items before its position are read.

    Args:
        k: how many of the best items to keep; 0 = the targets' ranks alone.
        description: what the progress bar says.

    Yields:
        For each block, in the order of `rows`: `users`, `positions`, `targets` and `ranks` (int64 [block]; rank 1 =
        best of the whole catalogue without the history, 0 = the target is in the history), `items` (int64 [block, k])
        and `scores` (float32 [block, k], descending, -inf where the catalogue has no more items).

    Raises:
        ValueError: the retriever belongs to another catalogue, or its scores are NaN.
    """
    retriever.check_catalogue(sequences.catalogue)
    batch_size = max(1, min(256, _CELLS // (sequences.num_items + 1)))
    width = min(k, sequences.num_items)
    with tqdm(total=len(rows), desc=description, unit="row") as bar:
        for start in range(0, len(rows), _BLOCK):
            users, positions = rows.users[start : start + _BLOCK], rows.positions[start : start + _BLOCK]
            begins = sequences.offsets[users]
            block = {
                "users": users,
                "positions": positions,
                "targets": sequences.items[begins + positions].astype(np.int64),
                "ranks": np.empty(len(users), np.int64),
                "items": np.empty((len(users), width), np.int64),
                "scores": np.empty((len(users), width), np.float32),
            }
            # rows of one length together, so that a batch is padded little
            order = np.argsort(positions, kind="stable")
            for batch in np.split(order, range(batch_size, len(order), batch_size)):
                histories = [sequences.items[begins[i] : begins[i] + positions[i]] for i in batch]
                _retrieve_batch(retriever, histories, batch, block, width)
                bar.update(len(batch))
            yield block


@torch.inference_mode()
def _retrieve_batch(
    retriever: Retriever, histories: list[np.ndarray], batch: np.ndarray, block: dict[str, np.ndarray], k: int
) -> None:
    scores = retriever.score(histories)
    seen = seen_places(histories).to(scores.device)
    targets = torch.from_numpy(block["targets"][batch]).to(scores.device)
    block["ranks"][batch] = ranks_of(scores, targets, seen).cpu().numpy()
    if k:
        items, values = top_items(hide(scores, seen), k)
        block["items"][batch], block["scores"][batch] = items.cpu().numpy(), values.cpu().numpy()


def retrieve_candidates(
    retriever: Retriever,
    sequences: Sequences,
    path: str | os.PathLike,
    *,
    k: int = 20,
    train_positions: int = 5,
    test_retriever: Retriever | None = None,
    folds: SequenceOf[Retriever] = (),
) -> Path:
    """Writes the candidates of train positions, validation and test to one Parquet file, in blocks.

    Only the history before a row's position is read, for training positions too. The retriever's weights or counts,
    however, come from the whole train part, so that the lists of training positions are better than those of
    unseen users would be: the retriever has learned from those very targets. `folds` avoids that.

    Args:
        retriever: fitted on the train part of the same catalogue.
        sequences: whole sequences, targets included.
        path: the file to write.
        k: candidates per row; rows get fewer where the catalogue without the history has fewer.
        train_positions: how many of the newest train positions of each user; 0 = all.
        test_retriever: for the rows of the test split; `retriever` by default.
        folds: for the rows of the train split, where given: the f-th of n retrievers, fitted without the users
            u % n == f, brings their candidates.

    Returns:
        The path. Columns: user, split, position, items (the best first, no item of the history), scores, target, and
        target_rank in the whole catalogue without the history (1 = best; 0 = the target is in the history).

    Raises:
        ValueError: k below 1, a retriever of another catalogue, or scores that are NaN.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}.")
    path = Path(path)
    with atomic_path(path) as partial, pq.ParquetWriter(partial, CANDIDATES, compression="zstd") as writer:
        for split in SPLITS:
            rows = split_positions(sequences, split, train_positions)
            parts = [(test_retriever if split == "test" and test_retriever else retriever, rows)]
            if split == "train" and folds:
                users = [rows.users % len(folds) == fold for fold in range(len(folds))]
                own = (Positions(rows.users[mask], rows.positions[mask]) for mask in users)
                parts = list(zip(folds, own, strict=True))
            for its_retriever, its_rows in parts:
                description = f"{its_retriever.name} candidates ({split})"
                for block in retrieve(its_retriever, sequences, its_rows, k, description=description):
                    writer.write_table(_to_table(block, split))
    return path


def _to_table(block: dict[str, np.ndarray], split: str) -> pa.Table:
    real = block["scores"] > -np.inf
    offsets = np.concatenate([[0], np.cumsum(real.sum(1))]).astype(np.int32)
    columns = [
        block["users"].astype(np.int32),
        pa.repeat(split, len(real)),
        block["positions"].astype(np.int32),
        pa.ListArray.from_arrays(offsets, block["items"][real].astype(np.int32)),
        pa.ListArray.from_arrays(offsets, block["scores"][real]),
        block["targets"].astype(np.int32),
        block["ranks"].astype(np.int32),
    ]
    return pa.table(columns, schema=CANDIDATES)


def target_ranks(retriever: Retriever, sequences: Sequences, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(users, ranks), int32 [rows]: where the retriever puts each target of the split, without keeping candidates."""
    blocks = list(
        retrieve(
            retriever, sequences, split_positions(sequences, split), 0, description=f"{retriever.name} ranks ({split})"
        )
    )
    return tuple(
        np.concatenate([block[name] for block in blocks] or [np.empty(0)]).astype(np.int32)
        for name in ("users", "ranks")
    )
