"""The indexing stage: the train part -> embeddings -> indexer -> unique user index and its quality."""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError

from ..files import atomic_folder, hash_file, hash_value
from ..stages import begin_stage, partial_folder, run_stage, stage_fingerprint, stage_is_current
from ..tables import LeaveOneOut, UserTexts
from ..user_index import UserIndex
from .arguments import INDEXERS, IndexArguments
from .assignment import Assignment, check_capacity
from .base import Indexer
from .dataset import Table, UserDataset
from .embeddings import write_embeddings
from .encoder import TextEncoder, fit_encoder, load_encoder
from .inputs import InputEncoder, TrainPart
from .report import index_quality, write_quality_report

logger = logging.getLogger(__name__)
EMBEDDINGS = "embeddings"  # the shards' folder while the stage is made


def index_users(
    args: IndexArguments, data: LeaveOneOut, output_dir: str | os.PathLike, *, overwrite: bool = False
) -> Path:
    """Makes the stage `output_dir/index` from a data stage, in one process; returns its folder.

    It holds user_index.parquet, indexer/ (the `Indexer` with all it needs to index new users) and what
    `write_quality_report` writes. Only train parts are read (with `evidence: all`, everything), except for the lift of
    held-out items in the report. A killed run resumes with the embeddings it has, or that `encode_inputs` made.

    Raises:
        ValueError: an unfinished data stage, an input that it does not have, embeddings that are not finite, a codebook
            too small for the users, or a stage of other settings stands there.
    """
    stage = _stage(args, data, output_dir)
    return run_stage(*stage, lambda folder: _build(args, data, folder), overwrite=overwrite, resume=True)


def encode_inputs(
    args: IndexArguments,
    data: LeaveOneOut,
    output_dir: str | os.PathLike,
    state: PartialState,
    *,
    overwrite: bool = False,
) -> None:
    """What several processes can do for `index_users`, which one of them calls next: the embeddings.

    Args:
        args, data, output_dir, overwrite: as for `index_users`; all processes see the folders.
        state: the processes, all of which call this.

    Raises:
        ValueError: as for `index_users`.
    """
    folder, settings, inputs = _stage(args, data, output_dir)
    current = stage_is_current(folder, settings, inputs, overwrite=overwrite)
    state.wait_for_everyone()  # no process may write before all have looked
    if current:
        return
    if state.is_main_process:
        begin_stage(folder, settings, inputs, resume=True)
    state.wait_for_everyone()
    _encode(args, data, partial_folder(folder), state)


def _stage(
    args: IndexArguments, data: LeaveOneOut, output_dir: str | os.PathLike
) -> tuple[Path, dict[str, Any], dict[str, str]]:
    """Folder, settings and inputs of the stage."""
    inputs = {"data": stage_fingerprint(data.folder)}
    if os.path.isdir(args.encoder):
        files = sorted(file for file in Path(args.encoder).rglob("*") if file.is_file())
        inputs["encoder"] = hash_value([(file.name, hash_file(file)) for file in files])
    return Path(output_dir) / "index", asdict(args), inputs


def _save_encoder(args: IndexArguments, texts: Mapping[str, UserTexts], shards: Path) -> None:
    """Fits the encoder and saves it, unless a killed run left it, and embeddings by it."""
    why = None
    if (shards / "encoder").is_dir():
        try:
            load_encoder(shards / "encoder")
            return
        except (ValueError, KeyError, OSError, SafetensorError) as error:
            why = error
    encoder = fit_encoder(args, texts)  # where its model cannot be loaded, this fails before anything is lost
    if why is not None:
        logger.warning("The embeddings so far are dropped. %s", why)
        shutil.rmtree(shards)
    with atomic_folder(shards / "encoder") as saved:
        encoder.save(saved)


def _encode(
    args: IndexArguments, data: LeaveOneOut, folder: Path, state: PartialState
) -> tuple[TrainPart, InputEncoder, UserDataset]:
    """What `Indexer.fit` does before the training, with the vectors in shards in `folder`, by all processes."""
    check_capacity(len(data), args.levels, args.codebook_size)
    train, shards = TrainPart.read(data, args.inputs, args.input_weights, args.evidence), folder / EMBEDDINGS

    def embed(encoder: TextEncoder, name: str, strings: Sequence[str]) -> Table:
        return write_embeddings(shards / name, strings, encoder, user_ids=name == "user_ids", state=state)

    encoder = None
    if train.texts:
        if state.is_main_process:
            _save_encoder(args, train.texts, shards)
        state.wait_for_everyone()
        # Read even where it was just written: a resumed run, or another process, may not fit the same last bits.
        encoder = load_encoder(shards / "encoder")
    inputs = INDEXERS[args.indexer].fit_inputs(args, train, encoder)
    return train, inputs, inputs.dataset(train, embed)


def _build(args: IndexArguments, data: LeaveOneOut, folder: Path) -> None:
    state = PartialState(cpu=not torch.accelerator.is_available())
    if state.num_processes > 1:
        raise ValueError("index_users runs in one process; what several can do for it is encode_inputs.")
    train, inputs, dataset = _encode(args, data, folder, state)
    indexer = INDEXERS[args.indexer].fit_encoded(args, inputs, dataset)
    assignment = indexer.assign(dataset)
    earlier = indexer.earlier_codes(dataset, data, args.train_positions)
    index = UserIndex(data.user_ids, assignment.codes, args.codebook_size, args.index_kind, earlier=earlier)
    index.to_parquet(folder / "user_index.parquet")
    indexer.save_pretrained(folder / "indexer")
    _report(folder, data, train, indexer, index, assignment, args.seed)
    shutil.rmtree(folder / EMBEDDINGS, ignore_errors=True)


def _report(
    folder: Path,
    data: LeaveOneOut,
    train: TrainPart,
    indexer: Indexer,
    index: UserIndex,
    assignment: Assignment,
    seed: int,
) -> None:
    config = asdict(indexer.settings)
    extra = {
        "inputs": ", ".join(f"{name} x {weight:g}" for name, weight in train.weights.items()),
        "users_without_inputs": assignment.silent,
        "indexer": indexer.name,
        "encoder": config.pop("encoder_name") or "none",
        **config,
    }
    texts = next(iter(train.texts.values())) if train.texts else data.texts("titles")
    quality = index_quality(index, assignment, data, texts, extra=extra, seed=seed)
    write_quality_report(folder, quality, index, assignment.latents)
    message = "User index of %d users: perplexity %s, held-out lift %s"
    logger.info(message, len(index), quality["perplexity"], quality["lift_heldout"])
