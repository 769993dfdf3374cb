"""The data stage: from a source of interactions to the three tables that every later stage reads.

One pass over the source writes texts to a temporary file; filters and order are then computed on arrays, and a second
pass, over that file, brings the texts into their final order bucket by bucket. Memory thus grows with the number of ids
and interactions, never with the texts.
"""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from ..files import hash_file, write_json, write_table
from ..stages import run_stage
from ..tables import INTERACTIONS
from .arguments import DataArguments
from .readers import READERS, check_source, read_source, source_settings
from .selection import TEXTS, Numbered, Selection, log_summary, read_selection

BUCKET_ROWS = 2**17  # interactions sorted in memory at a time
MAX_BUCKETS = 256  # all are open at once


def prepare_data(args: DataArguments, output_dir: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """Reads, filters, numbers and writes a source of interactions; returns the stage's folder, `output_dir/data`.

    It holds `interactions.parquet`, `items.parquet`, `sequences.parquet` and `summary.json`, which counts what was left
    out: see `Interactions`. Equal sources and settings give equal bytes.

    Raises:
        ValueError: the source cannot be used, or nothing of it is left; the message says why and what to change.
        OSError: the disk refuses the write. In either case what stood in the folder before is untouched.
    """
    check_source(args)
    folder = Path(output_dir) / "data"
    settings: dict[str, Any] = {"data_format": args.data_format, "k_core": args.k_core}
    if READERS[args.data_format].generate is not None:
        settings |= {"synthetic_users": args.synthetic_users, "synthetic_seed": args.synthetic_seed}
    inputs = {
        name: hash_file(source) if Path(source).is_file() else source
        for name, source in (("interactions", args.interactions), ("items", args.items))
        if source is not None
    }
    try:
        return run_stage(folder, settings, inputs, lambda partial: _build(args, partial), overwrite=overwrite)
    except OSError as error:
        if error.filename is not None:
            raise
        # Arrow's errors do not say which file was being written
        raise OSError(error.errno, f"could not write ({error})", str(folder)) from error


def _build(args: DataArguments, folder: Path) -> None:
    work = folder / "work"
    work.mkdir()
    selection = _read(args, work / "texts.arrow").k_core(args.k_core)
    numbered, left_out = selection.number(), selection.left_out
    del selection  # 20 bytes an interaction that nothing below needs
    empty_reviews = _write_interactions(folder / "interactions.parquet", work, numbered)
    shutil.rmtree(work)
    write_table(folder / "sequences.parquet", numbered.sequences())
    write_table(folder / "items.parquet", numbered.catalogue)
    summary = {**numbered.counts(), "empty_reviews": empty_reviews, **left_out}
    write_json(folder / "summary.json", summary)
    log_summary(summary)


def _read(args: DataArguments, texts: Path) -> Selection:
    """Pass 1: everything but the texts into memory, the texts into a file."""
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with (
        pa.OSFile(str(texts), "wb") as file,
        pa.ipc.new_stream(file, TEXTS, options=options) as writer,
        tqdm(desc="Reading interactions", unit=" rows", unit_scale=True) as progress,
    ):

        def put_aside(batch: pa.RecordBatch) -> None:
            writer.write_batch(batch)
            progress.update(len(batch))

        return read_selection(*read_source(args), put_aside, **source_settings(args))


def _write_interactions(path: Path, work: Path, numbered: Numbered) -> int:
    """Pass 2: distributes the texts to buckets of final places, then sorts and appends them bucket by bucket.

    Returns:
        How many of the interactions have an empty review.
    """
    rows = len(numbered.rows)
    size = max(BUCKET_ROWS, -(-rows // MAX_BUCKETS))
    place = np.full(numbered.source_rows, -1, np.int64)
    place[numbered.rows] = np.arange(rows)
    empty = 0
    with tqdm(total=2 * rows, desc="Writing interactions", unit=" rows", unit_scale=True) as progress:
        buckets = [work / f"{bucket}.arrow" for bucket in range(-(-rows // size))]
        _distribute(work / "texts.arrow", buckets, place, size, progress)
        with pq.ParquetWriter(path, INTERACTIONS, compression="zstd") as writer:
            for number, bucket in enumerate(buckets):
                with pa.OSFile(str(bucket)) as file:
                    texts = pa.ipc.open_stream(file).read_all().sort_by("place")
                bucket.unlink()
                writer.write_table(numbered.interactions(texts, slice(number * size, (number + 1) * size)))
                trimmed = pc.fill_null(pc.utf8_trim_whitespace(texts["review"]), "")
                empty += pc.sum(pc.equal(trimmed, "")).as_py()
                progress.update(len(texts))
    return empty


def _distribute(texts: Path, buckets: list[Path], place: np.ndarray, size: int, progress: tqdm) -> None:
    schema = TEXTS.insert(0, pa.field("place", pa.int64()))
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with contextlib.ExitStack() as stack:
        writers = []
        for bucket in buckets:
            file = stack.enter_context(pa.OSFile(str(bucket), "wb"))
            writers.append(stack.enter_context(pa.ipc.new_stream(file, schema, options=options)))
        start = 0
        for batch in pa.ipc.open_stream(stack.enter_context(pa.OSFile(str(texts)))):
            places = place[start : start + len(batch)]
            start += len(batch)
            order = np.argsort(places)
            order = order[np.searchsorted(places[order], 0) :]  # -1 = left out
            batch = batch.take(pa.array(order)).add_column(0, "place", pa.array(places[order]))
            edges = np.searchsorted(places[order], np.arange(len(writers) + 1) * size)
            for bucket in np.flatnonzero(np.diff(edges)):
                writers[bucket].write_batch(batch.slice(edges[bucket], edges[bucket + 1] - edges[bucket]))
            progress.update(len(order))
    texts.unlink()
