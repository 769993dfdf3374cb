"""The preferences stage: one row for every (user, position) that a prompt may show."""

import itertools
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..files import atomic_path
from ..stages import run_stage, stage_fingerprint
from ..tables import LeaveOneOut, UserTexts
from .arguments import PreferenceArguments
from .key_phrases import NO_PREFERENCE, KeyPhraseExtractor, PreferenceExtractor

logger = logging.getLogger(__name__)

# An extractor is one class with `fit` and `extract`; its name here is its value of the setting `extractor`.
EXTRACTORS = {KeyPhraseExtractor.name: lambda args: KeyPhraseExtractor(args.num_phrases)}

SCHEMA = pa.schema(
    {
        "user": pa.int32(),
        "user_id": pa.string(),
        "position": pa.int32(),
        "preference": pa.string(),
        "evidence": pa.string(),
        "extractor": pa.string(),
        "model": pa.string(),
        "prompt_hash": pa.string(),
    }
)
_BATCH = 16_384


def extract_preferences(
    args: PreferenceArguments,
    data_folder: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    overwrite: bool = False,
) -> Path:
    """Makes the stage `output_dir/preferences` from a data stage; returns its folder.

    preferences.parquet has one row per user and position: `position` = length of the train part, made from all of it,
    and the training targets 1 <= `position` < that, made only from the interactions before.

    Raises:
        ValueError: an unknown extractor, an unfinished data stage, or a stage of other settings stands there.
    """
    if args.extractor not in EXTRACTORS:
        raise ValueError(f"extractor is {args.extractor!r}; it must be one of {', '.join(EXTRACTORS)}.")

    def build(folder: Path) -> None:
        train = LeaveOneOut.load(data_folder).texts()
        extractor = EXTRACTORS[args.extractor](args).fit([train.texts[text] for text in train.text_ids if text >= 0])
        shown = train if args.evidence == "train" else LeaveOneOut.load(data_folder).texts(train.kind, train_only=False)
        _write(folder / "preferences.parquet", args, extractor, train, shown)

    inputs = {"data": stage_fingerprint(data_folder)}
    return run_stage(Path(output_dir) / "preferences", asdict(args), inputs, build, overwrite=overwrite)


def _write(
    path: Path, args: PreferenceArguments, extractor: PreferenceExtractor, train: UserTexts, shown: UserTexts
) -> None:
    empty = 0
    rows = _rows(train, args.train_positions)
    with atomic_path(path) as partial, pq.ParquetWriter(partial, SCHEMA, compression="zstd") as writer:
        while batch := list(itertools.islice(rows, _BATCH)):
            users, positions = zip(*batch, strict=True)
            if args.evidence == "train":
                texts = [[shown.texts[text] for text in shown.of_user(user, position)] for user, position in batch]
                preferences = extractor.extract(texts)
            else:  # everything a user wrote, whatever the position
                asked = sorted(set(users))
                texts = [[shown.texts[text] for text in shown.of_user(user)] for user in asked]
                by_user = dict(zip(asked, extractor.extract(texts), strict=True))
                preferences = [by_user[user] for user in users]
            empty += preferences.count(NO_PREFERENCE)
            count = len(batch)
            columns = {
                "user": users,
                "user_id": [train.user_ids[user] for user in users],
                "position": positions,
                "preference": preferences,
                "evidence": [args.evidence] * count,
                "extractor": [extractor.name] * count,
                "model": [extractor.model] * count,
                "prompt_hash": [extractor.prompt_hash] * count,
            }
            writer.write_table(pa.table(columns, SCHEMA))
    if empty:
        logger.warning("%d preferences are %s: their users have no words before that position", empty, NO_PREFERENCE)


def _rows(train: UserTexts, train_positions: int) -> Iterator[tuple[int, int]]:
    for user in range(len(train)):
        whole = int(train.offsets[user + 1] - train.offsets[user])
        first = 1 if train_positions == 0 else max(1, whole - train_positions)
        for position in range(first, whole):
            yield user, position
        yield user, whole
