"""The retrieval stage: fit the retriever, write its candidates, and rank the targets by every system."""

import os
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import set_seed

from ..files import write_json, write_table
from ..stages import run_stage, stage_fingerprint
from ..tables import LeaveOneOut, Sequences
from .arguments import RetrieverArguments
from .base import Retriever, retriever_class
from .candidates import retrieve_candidates, target_ranks
from .item_knn import ItemKNNRetriever
from .popularity import PopularityRetriever
from .text import TextRetriever, title_embeddings

BASELINES = ("popularity", "item_knn")


def train_retriever(
    args: RetrieverArguments,
    data_folder: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    overwrite: bool = False,
) -> Path:
    """Runs the stage `output_dir/retriever` and returns its folder.

    The folder holds the chosen retriever (config.json, model.safetensors), `candidates.parquet` (see
    `retrieve_candidates`), `ranks.parquet` (user, split, system, rank; 0 = unreachable) of popularity, item_knn, the
    chosen one and what it combines on validation and test, and `training.json` with loss and validation metrics for
    each epoch. Whatever is fitted sees the train parts alone; validation targets choose the epoch and a hybrid's
    weights, and test targets are only ranked. With `refit`, item statistics behind the test rows, and in the retriever
    that is kept, come from the train and validation items.

    Args:
        args: the settings.
        data_folder: a finished data stage.
        output_dir: the run's folder.
        overwrite: make the stage anew where it was made with other settings.
    """

    def build(folder: Path) -> None:
        sequences, titles = LeaveOneOut.load(data_folder).sequences, read_titles(data_folder)
        retriever, history = fit_retriever(args.retriever, args, sequences, titles, folder)
        others = {part.name: part for part in getattr(retriever, "components", [])}
        for name in BASELINES:
            if name != args.retriever and name not in others:
                others[name], _ = fit_retriever(name, args, sequences, titles, folder)
        folds = []
        for fold in range(args.cross_fit):
            left_out = np.arange(len(sequences)) % args.cross_fit == fold
            others_alone = sequences.select(np.where(left_out, 0, sequences.lengths))
            folds.append(fit_retriever(args.retriever, args, others_alone, titles, folder)[0])
        # the newest item statistics that each split may use
        known = sequences.select(np.maximum(sequences.lengths - 1, 0)) if args.refit else None
        newest = {name: part.refit(known) if known else part for name, part in others.items()}
        test_retriever = retriever.refit(known) if known else retriever

        test_retriever.save_pretrained(folder)
        write_json(folder / "training.json", {"retriever": retriever.name, "history": history})
        candidates = retrieve_candidates(
            retriever,
            sequences,
            folder / "candidates.parquet",
            k=args.num_candidates,
            train_positions=args.train_positions,
            test_retriever=test_retriever,
            folds=folds,
        )
        tables = [
            _rank_table(name, split, *target_ranks(part, sequences, split))
            for split, parts in (("validation", others), ("test", newest))
            for name, part in parts.items()
        ]
        own = pq.read_table(candidates, columns=["user", "split", "target_rank"])
        for split in ("validation", "test"):
            rows = own.filter(pc.equal(own["split"], split))
            tables.append(_rank_table(args.retriever, split, rows["user"].to_numpy(), rows["target_rank"].to_numpy()))
        write_table(folder / "ranks.parquet", pa.concat_tables(tables))

    return run_stage(
        Path(output_dir) / "retriever",
        asdict(args),
        {"data": stage_fingerprint(data_folder)},
        build,
        overwrite=overwrite,
    )


def protocol_notes(args: RetrieverArguments) -> list[str]:
    """What a report must say of how the retriever was fitted."""
    return [
        "Whatever is fitted sees the train parts alone; validation targets choose a retriever's epoch and a hybrid's "
        "combiner.",
        "Candidates of a training position come from the history before it, and from a retriever "
        + (
            f"fitted without that user ({args.cross_fit} folds of users)."
            if args.cross_fit
            else "whose weights come from the whole train part, that position included."
        ),
        "Item statistics (popularity, item_knn) of the test rows: counted in the train "
        + ("and validation items (refit)." if args.refit else "items."),
    ]


def fit_retriever(
    name: str, args: RetrieverArguments, sequences: Sequences, titles: list[str], work_folder: Path
) -> tuple[Retriever, list[dict[str, float | str]]]:
    """Fits a retriever by name on the train parts; returns it and, for neural ones, the history of its training."""
    if name == "popularity":
        return PopularityRetriever.fit(sequences.train_part()), []
    if name == "item_knn":
        return ItemKNNRetriever.fit(sequences.train_part(), **_settings(args, "knn_")), []
    if name == "text":
        return TextRetriever.fit(sequences.train_part(), titles, **_settings(args, "text_")), []
    if name == "hybrid":
        from .hybrid import HybridRetriever

        fitted = [fit_retriever(part, args, sequences, titles, work_folder) for part in args.hybrid_components]
        hybrid = HybridRetriever.fit([retriever for retriever, _ in fitted], sequences, seed=args.seed)
        return hybrid, [entry for _, history in fitted for entry in history]
    from .trainer import train_neural_retriever

    model_class = retriever_class(name)
    own = {item.name for item in fields(model_class.config_class)}
    settings = {item: value for item, value in asdict(args).items() if item in own}
    set_seed(args.seed)
    model = model_class(
        model_class.config_class(num_items=sequences.num_items, catalogue=sequences.catalogue, **settings)
    )
    if args.start_from_titles:
        model.start_from(title_embeddings(titles, args.text_encoder, args.hidden_size))
    history = train_neural_retriever(model, sequences, args, work_folder)
    return model, [{"retriever": name} | entry for entry in history]


def read_titles(data_folder: str | os.PathLike) -> list[str]:
    """The titles of the items 1..n of a data stage."""
    return pq.read_table(Path(data_folder) / "items.parquet", columns=["title"])["title"].to_pylist()


def _settings(args: RetrieverArguments, prefix: str) -> dict[str, float | str]:
    own = {name.removeprefix(prefix): value for name, value in asdict(args).items() if name.startswith(prefix)}
    return {"max_history": args.max_history} | own


def _rank_table(system: str, split: str, users: np.ndarray, ranks: np.ndarray) -> pa.Table:
    return pa.table(
        {
            "user": pa.array(users, pa.int32()),
            "split": pa.repeat(split, len(users)),
            "system": pa.repeat(system, len(users)),
            "rank": pa.array(ranks, pa.int32()),
        }
    )
