"""The preferences stage: one row for every (user, position) that a prompt may show."""

import os
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq

from ..files import atomic_path
from ..stages import run_stage, stage_fingerprint
from ..tables import PREFERENCES, LeaveOneOut
from .arguments import PreferenceArguments
from .base import EXTRACTORS


def extract_preferences(
    args: PreferenceArguments, data: LeaveOneOut, output_dir: str | os.PathLike, *, overwrite: bool = False
) -> Path:
    """Writes what `PreferenceExtractor.extract` gives as the stage `output_dir/preferences`; returns its folder.

    Raises:
        ValueError: an unfinished data stage, or a stage of other settings stands there.
    """

    def build(folder: Path) -> None:
        extractor = EXTRACTORS[args.extractor].from_arguments(args)
        batches = extractor.batches(data, train_positions=args.train_positions, evidence=args.evidence)
        with (
            atomic_path(folder / "preferences.parquet") as partial,
            pq.ParquetWriter(partial, PREFERENCES, compression="zstd") as writer,
        ):
            for batch in batches:
                writer.write_batch(batch)

    inputs = {"data": stage_fingerprint(data.folder)}
    return run_stage(Path(output_dir) / "preferences", asdict(args), inputs, build, overwrite=overwrite)
