"""The indexing stage: texts of the train part -> embeddings -> indexer -> unique user index."""

import logging
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..files import write_json
from ..stages import run_stage, stage_fingerprint
from ..texts import UserTexts, read_user_texts
from ..user_index import UserIndex
from .arguments import IndexArguments

logger = logging.getLogger(__name__)


def index_users(
    args: IndexArguments,
    data_folder: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    overwrite: bool = False,
) -> Path:
    """Makes the stage `output_dir/index` from a data stage; returns its folder.

    It holds user_index.parquet, indexer/ (the `UserIndexer` and, in indexer/encoder/, its text encoder) and
    report.json. Only the train part of each user is read.

    Raises:
        ValueError: an unfinished data stage, embeddings that are not finite, a codebook too small for the users, or
            a stage of other settings stands there.
    """
    inputs = {"data": stage_fingerprint(data_folder)}
    return run_stage(
        Path(output_dir) / "index",
        asdict(args),
        inputs,
        lambda folder: _build(args, data_folder, folder),
        overwrite=overwrite,
    )


def _build(args: IndexArguments, data_folder: str | os.PathLike, folder: Path) -> None:
    from transformers import set_seed

    from .assignment import assign_unique, check_capacity, count_collisions, nearest_codes
    from .encoder import make_encoder
    from .indexer import UserDataset, UserIndexer, latent_vectors, reconstruction_errors, train_indexer

    users = read_user_texts(data_folder, args.text)
    check_capacity(len(users), args.levels, args.codebook_size)
    set_seed(args.seed)
    encoder = make_encoder(args.encoder, args.embedding_dim, args.seed).fit(users.texts)
    texts = _finite(encoder.encode(users.texts), users.texts, args.encoder)
    ids = _finite(encoder.encode_user_ids(users.user_ids), users.user_ids, args.encoder)
    dataset = UserDataset(texts, [users.of_user(user) for user in range(len(users))], ids, args.max_reviews)
    indexer = UserIndexer(
        embedding_dim=encoder.dim,
        codebook_size=args.codebook_size,
        levels=args.levels,
        code_dim=args.code_dim,
        preset=args.preset,
        attention=args.attention,
        encoder_name=encoder.name,
    )
    train_indexer(
        indexer,
        dataset,
        steps=args.steps,
        autoencoder_steps=args.autoencoder_steps,
        batch_size=args.batch_size or 4 * args.codebook_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    latents, codebooks = latent_vectors(indexer, dataset).numpy(), indexer.codebooks.numpy()
    nearest = nearest_codes(latents, codebooks)
    codes = assign_unique(latents, codebooks)
    index = UserIndex(users.user_ids, codes, args.codebook_size)

    index.to_parquet(folder / "user_index.parquet")
    indexer.save_pretrained(folder / "indexer")
    (folder / "indexer" / "encoder").mkdir()
    encoder.save(folder / "indexer" / "encoder")
    report = {
        **index.report(),
        "collisions_before": count_collisions(nearest),
        "collisions_after": count_collisions(codes),
        "reconstruction_error": reconstruction_errors(indexer, dataset, nearest),
        "text": users.kind,
        "users_without_text": _count_silent(users),
        "encoder": encoder.name,
        "embedding_dim": encoder.dim,
    }
    write_json(folder / "report.json", report)
    logger.info("User index of %d users: %s", len(index), report)


def _finite(embeddings: np.ndarray, texts: list[str], encoder: str) -> np.ndarray:
    broken = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(broken):
        raise ValueError(
            f"The encoder {encoder!r} gave NaN or infinite embeddings for {len(broken)} of {len(texts)} texts, the "
            f"first {texts[broken[0]][:80]!r}: use another encoder, or its weights in another precision."
        )
    return embeddings


def _count_silent(users: UserTexts) -> int:
    silent = sum(len(users.of_user(user)) == 0 for user in range(len(users)))
    if silent:
        logger.warning("%d users have no text in their train part: their embedding is zero", silent)
    return silent
