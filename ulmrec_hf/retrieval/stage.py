"""The retrieval stage: a folder with a fitted retriever, its candidates, and every system's ranks of the targets."""

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..files import write_json, write_table
from ..protocol import EVALUATED
from ..stages import run_stage, stage_fingerprint
from ..tables import CANDIDATES, LeaveOneOut
from .arguments import RETRIEVERS, RetrieverArguments
from .base import Retriever
from .candidates import candidate_tables, rank_table

BASELINES = ("popularity", "item_knn")  # ranked in every run, for comparison


def train_retriever(
    args: RetrieverArguments, data: LeaveOneOut, output_dir: str | os.PathLike, *, overwrite: bool = False
) -> Path:
    """Runs the stage `output_dir/retriever` and returns its folder.

    The folder holds the retriever (config.json, model.safetensors), `candidates.parquet` (see `Retriever.candidates`),
    `ranks.parquet` (see `Retriever.ranks`) of the retriever, its components, the baselines popularity and item_knn and,
    with `id_only`, the retriever without titles, and `training.json` with the `training_history`. See `Retriever.fit`
    for what is read; test targets are only ranked. With `refit`, item statistics for the test rows, and those that are
    saved, come from train and validation items.

    Raises:
        ValueError: the folder was made with other settings, or there is too little data to fit on.
    """
    folder, inputs = Path(output_dir) / "retriever", {"data": stage_fingerprint(data.folder)}
    return run_stage(folder, asdict(args), inputs, lambda partial: _build(args, data, partial), overwrite=overwrite)


def cross_fit(args: RetrieverArguments, data: LeaveOneOut) -> list[Retriever]:
    """One retriever per fold, the f-th of n fitted without the users u % n == f; none where `args.cross_fit` is 0."""
    sequences, folds = data.sequences, []
    for fold in range(args.cross_fit):
        left_out = np.arange(len(sequences)) % args.cross_fit == fold
        kept = sequences.select(np.where(left_out, 0, sequences.lengths))
        folds.append(RETRIEVERS[args.retriever].fit_sequences(kept, data.titles, args))
    return folds


def protocol_notes(args: RetrieverArguments) -> list[str]:
    """What a report must say of how the retriever was fitted."""
    fitted = "whose weights come from the whole train part, that position included."
    if args.cross_fit:
        fitted = f"fitted without that user ({args.cross_fit} folds of users)."
    return [
        "Whatever is fitted sees the train parts alone; validation targets choose a retriever's epoch and a hybrid's "
        "combiner.",
        f"Candidates of a training position come from the history before it, and from a retriever {fitted}",
        "Item statistics (popularity, item_knn) of the test rows: counted in the train "
        + ("and validation items (refit)." if args.refit else "items."),
        *([f"{args.retriever}_ids: the same retriever, fitted without titles (id_only)."] if args.id_only else []),
    ]


def _build(args: RetrieverArguments, data: LeaveOneOut, folder: Path) -> None:
    retriever = RETRIEVERS[args.retriever].fit(data, args)
    fitted = {retriever.name, *(part.name for part in retriever.components)}
    baselines = [RETRIEVERS[name].fit(data, args) for name in BASELINES if name not in fitted]
    folds = cross_fit(args, data)

    def for_test(part: Retriever) -> Retriever:
        """With the newest item statistics that test rows may use."""
        sequences = data.sequences
        return part.refit(sequences.select(np.maximum(sequences.lengths - 1, 0))) if args.refit else part

    test_retriever = for_test(retriever)
    test_retriever.save_pretrained(folder)
    write_json(folder / "training.json", {"retriever": retriever.name, "history": list(retriever.training_history)})
    by_split = {"train": folds or [retriever], "validation": [retriever], "test": [test_retriever]}
    own = _write_candidates(folder / "candidates.parquet", by_split, args, data)
    ranks = [part.ranks(data, ["validation"]) for part in [*retriever.components, *baselines]]
    ranks += [part.ranks(data, ["test"]) for part in [*test_retriever.components, *map(for_test, baselines)]]
    if args.id_only:
        ids = RETRIEVERS[args.retriever].fit(data, replace(args, start_from_titles=False, id_only=False))
        name = f"{retriever.name}_ids"
        ranks += [
            part.ranks(data, [split], system=name) for split, part in zip(EVALUATED, (ids, for_test(ids)), strict=True)
        ]
    write_table(folder / "ranks.parquet", pa.concat_tables([*ranks, rank_table(own, retriever.name)]))


def _write_candidates(
    path: Path, retrievers: dict[str, Sequence[Retriever]], args: RetrieverArguments, data: LeaveOneOut
) -> pa.Table:
    """Streams the candidates to `path`; returns those columns that the ranks of validation and test are made of."""
    with pq.ParquetWriter(path, CANDIDATES, compression="zstd") as writer:
        for table in candidate_tables(retrievers, data.sequences, args.num_candidates, args.train_positions):
            writer.write_table(table)
    rows = pq.read_table(path, columns=["user", "split", "target_first", "target_tied"])
    return rows.filter(pc.not_equal(rows["split"], "train"))
