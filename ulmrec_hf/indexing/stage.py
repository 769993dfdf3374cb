"""The indexing stage: the train part -> embeddings -> indexer -> unique user index, and what it is worth."""

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import atomic_folder, hash_file, hash_value
from ..stages import begin_stage, partial_folder, run_stage, stage_fingerprint, stage_is_current
from ..tables import LeaveOneOut, UserTexts
from ..user_index import UserIndex
from .arguments import IndexArguments

if TYPE_CHECKING:
    from accelerate import PartialState

    from .encoder import TextEncoder
    from .indexer import UserDataset, UserIndexer
    from .inputs import InputEncoder, Table, TrainPart

logger = logging.getLogger(__name__)
EMBEDDINGS = "embeddings"  # the shards' folder while the stage is made


def index_users(
    args: IndexArguments,
    data_folder: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    overwrite: bool = False,
) -> Path:
    """Makes the stage `output_dir/index` from a data stage, in one process; returns its folder.

    It holds user_index.parquet, indexer/ (the `UserIndexer` with all it needs to index new users) and what
    `write_quality_report` writes. Only the train part of each user is read, but for the lift of held-out items in the
    report. A killed run goes on with the embeddings it has, or that `encode_inputs` made.

    Raises:
        ValueError: an unfinished data stage, an input that it does not have, embeddings that are not finite, a codebook
            too small for the users, or a stage of other settings stands there.
    """
    return run_stage(
        *_stage(args, data_folder, output_dir),
        lambda folder: _build(args, data_folder, folder),
        overwrite=overwrite,
        resume=True,
    )


def encode_inputs(
    args: IndexArguments,
    data_folder: str | os.PathLike,
    output_dir: str | os.PathLike,
    state: "PartialState",
    *,
    overwrite: bool = False,
) -> None:
    """What several processes can do for `index_users`, which one of them calls next: the embeddings.

    Args:
        args, data_folder, output_dir, overwrite: as for `index_users`; all processes see the folders.
        state: the processes, all of which call this.

    Raises:
        ValueError: as for `index_users`.
    """
    from .inputs import read_inputs

    folder, settings, inputs = _stage(args, data_folder, output_dir)
    current = stage_is_current(folder, settings, inputs, overwrite=overwrite)
    state.wait_for_everyone()  # nobody may begin to write before all have looked
    if current:
        return
    if state.is_main_process:
        begin_stage(folder, settings, inputs, resume=True)
    state.wait_for_everyone()
    _encode(args, *read_inputs(args.inputs, args.input_weights, data_folder), partial_folder(folder), state)


def _stage(
    args: IndexArguments, data_folder: str | os.PathLike, output_dir: str | os.PathLike
) -> tuple[Path, dict[str, Any], dict[str, str]]:
    """Folder, settings and inputs of the stage."""
    inputs = {"data": stage_fingerprint(data_folder)}
    if os.path.isdir(args.encoder):
        files = sorted(file for file in Path(args.encoder).rglob("*") if file.is_file())
        inputs["encoder"] = hash_value([(file.name, hash_file(file)) for file in files])
    return Path(output_dir) / "index", asdict(args), inputs


def fit_encoder(args: IndexArguments, texts: Mapping[str, UserTexts]) -> "TextEncoder | None":
    """The text encoder, fitted on these texts (see `read_inputs`); None without texts."""
    from .encoder import make_encoder

    if not texts:
        return None
    encoder = make_encoder(args.encoder, args.embedding_dim, args.seed, pooling=args.pooling)
    return encoder.fit([text for part in texts.values() for text in part.texts])


def encode_train_part(
    args: IndexArguments,
    weights: Mapping[str, float],
    texts: Mapping[str, UserTexts],
    train: "TrainPart",
    encoder: "TextEncoder | None",
    embed: Callable[["TextEncoder", str, Sequence[str]], "Table"],
) -> tuple["InputEncoder", "UserDataset"]:
    """Fits what turns a user's interactions into vectors, and gives those of the train part.

    Args:
        weights, texts, train: see `read_inputs`.
        encoder: see `fit_encoder`.
        embed: gives a table of vectors by the text encoder, what is encoded (the name of an input, or
            "user_ids") and the strings.
    """
    from .indexer import UserDataset
    from .inputs import ArrayTable, fit_inputs

    fitted, inputs = fit_inputs(
        weights,
        texts,
        train,
        encoder,
        partial(embed, encoder),
        cooccurrence_dim=args.cooccurrence_dim,
        max_reviews=args.max_reviews,
    )
    ids = None
    if args.attention:
        users = train.user_ids
        ids = embed(encoder, "user_ids", users) if encoder else ArrayTable(fitted.encode_user_ids(users))
    return fitted, UserDataset(inputs, train.offsets, ids, args.max_reviews)


def fit_indexer(args: IndexArguments, fitted: "InputEncoder", dataset: "UserDataset") -> "UserIndexer":
    """Trains an indexer on what `encode_train_part` gave."""
    from transformers import set_seed

    from .indexer import UserIndexer, train_indexer

    set_seed(args.seed)
    indexer = UserIndexer(
        embedding_dim=dataset.dim,
        codebook_size=args.codebook_size,
        levels=args.levels,
        code_dim=args.code_dim,
        preset=args.preset,
        attention=args.attention,
        encoder_name=fitted.encoder.name if fitted.encoder else "",
        user_dim=dataset.user_ids.dim if args.attention else None,
    )
    indexer.inputs = fitted
    train_indexer(
        indexer,
        dataset,
        steps=args.steps,
        autoencoder_steps=args.autoencoder_steps,
        batch_size=args.batch_size or 4 * args.codebook_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
        refit_codebooks=args.refit_codebooks,
    )
    return indexer


def _save_encoder(args: IndexArguments, texts: Mapping[str, UserTexts], shards: Path) -> None:
    """Fits the encoder and saves it, but where a killed run has left it, and embeddings by it."""
    from safetensors import SafetensorError

    from .encoder import load_encoder

    why = None
    if (shards / "encoder").is_dir():
        try:
            load_encoder(shards / "encoder")
            return
        except (ValueError, KeyError, OSError, SafetensorError) as error:
            why = error
    encoder = fit_encoder(args, texts)  # where its model is out of reach, this fails before anything is lost
    if why is not None:
        logger.warning("The embeddings so far are dropped. %s", why)
        shutil.rmtree(shards)
    with atomic_folder(shards / "encoder") as saved:
        encoder.save(saved)


def _encode(
    args: IndexArguments,
    weights: Mapping[str, float],
    texts: Mapping[str, UserTexts],
    train: "TrainPart",
    folder: Path,
    state: "PartialState",
) -> tuple["InputEncoder", "UserDataset"]:
    """`encode_train_part` into shards in `folder`, by all processes; `check_capacity` before."""
    from .assignment import check_capacity
    from .embeddings import write_embeddings
    from .encoder import load_encoder

    check_capacity(len(train.user_ids), args.levels, args.codebook_size)
    shards = folder / EMBEDDINGS

    def embed(encoder: "TextEncoder", name: str, strings: Sequence[str]) -> "Table":
        return write_embeddings(shards / name, strings, encoder, user_ids=name == "user_ids", state=state)

    encoder = None
    if texts:
        if state.is_main_process:
            _save_encoder(args, texts, shards)
        state.wait_for_everyone()
        # Read even where it was just written: a run that goes on, or another process, may not fit the same last bits.
        encoder = load_encoder(shards / "encoder")
    return encode_train_part(args, weights, texts, train, encoder, embed)


def _build(args: IndexArguments, data_folder: str | os.PathLike, folder: Path) -> None:
    import torch
    from accelerate import PartialState

    from .assignment import assign_unique, count_collisions, nearest_codes
    from .indexer import latent_vectors, reconstruction_errors, user_vectors
    from .inputs import read_inputs
    from .quality import index_quality, write_quality_report

    state = PartialState(cpu=not torch.accelerator.is_available())
    if state.num_processes > 1:
        raise ValueError("index_users runs in one process; what several can do for it is encode_inputs.")
    weights, texts, train = read_inputs(args.inputs, args.input_weights, data_folder)
    fitted, dataset = _encode(args, weights, texts, train, folder, state)
    indexer = fit_indexer(args, fitted, dataset)
    latents, codebooks = latent_vectors(indexer, dataset).numpy(), indexer.codebooks.numpy()
    nearest = nearest_codes(latents, codebooks)
    codes = assign_unique(latents, codebooks)
    index = UserIndex(train.user_ids, codes, args.codebook_size, args.index_kind)
    silent = sum(int((~vectors.any(dim=1)).sum()) for vectors in user_vectors(indexer, dataset, range(len(dataset))))
    if silent:
        logger.warning("%d users have nothing in their train part to be indexed by: their vector is zero", silent)

    index.to_parquet(folder / "user_index.parquet")
    indexer.save_pretrained(folder / "indexer")
    quality = index_quality(
        index,
        next(iter(texts.values())) if texts else LeaveOneOut.load(data_folder).texts("titles"),
        latents,
        data_folder,
        collisions_before=count_collisions(nearest),
        collisions_after=count_collisions(codes),
        reconstruction_error=reconstruction_errors(indexer, dataset, nearest),
        extra={
            "inputs": ", ".join(f"{name} x {weight:g}" for name, weight in weights.items()),
            "users_without_inputs": silent,
            "encoder": indexer.encoder_name or "none",
            "embedding_dim": dataset.dim,
            "preset": args.preset,
            "attention": args.attention,
        },
        seed=args.seed,
    )
    write_quality_report(folder, quality, index, latents)
    shutil.rmtree(folder / EMBEDDINGS, ignore_errors=True)
    logger.info(
        "User index of %d users: perplexity %s, held-out lift %s",
        len(index),
        quality["perplexity"],
        quality["lift_heldout"],
    )
