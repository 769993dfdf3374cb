"""Embeddings of texts on disk: written in shards that a killed run keeps, read back by rows."""

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..files import atomic_path, hash_value, write_json
from ..stages import differences
from .encoder import TextEncoder

logger = logging.getLogger(__name__)
MANIFEST = "embeddings.json"
SHARD_TEXTS = 4096  # a kill loses one for each process; in smaller ones there are fewer texts of equal length to batch
_TENSOR = "embeddings"
# One key for all: safetensors writes several in an order that differs from process to process.
_METADATA = "ulmrec_hf"


class Embeddings:
    """The embeddings of texts in a folder that `write_embeddings` filled; shards are mapped into memory on demand.

    Attributes:
        shape: how many texts, and the length of a vector.

    Raises:
        ValueError: the folder holds no embeddings, or unfinished ones.
    """

    def __init__(self, folder: str | os.PathLike):
        self._folder = Path(folder)
        manifest = _read_manifest(self._folder)
        if manifest is None or "texts" not in manifest:
            what = "holds no embeddings" if manifest is None else "holds unfinished embeddings"
            raise ValueError(f"{self._folder} {what}: write them by write_embeddings, which resumes where it stopped.")
        self.shape, self._shard_texts = (manifest["texts"], manifest["dim"]), manifest["shard_texts"]
        self._shards: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, ids: np.ndarray) -> np.ndarray:
        """float32 [n, dim]: the embeddings of the texts `ids`, int [n], in that order.

        Raises:
            IndexError: an id is negative or past the last text.
            ValueError: a shard is missing or not whole.
        """
        ids = np.asarray(ids, np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self):
            raise IndexError(
                f"{self._folder} has the texts 0 to {len(self) - 1}; asked for {ids.min()} to {ids.max()}."
            )
        rows = np.empty((len(ids), self.shape[1]), np.float32)
        order = ids.argsort(kind="stable")
        shards, starts = np.unique(ids[order] // self._shard_texts, return_index=True)
        for shard, places in zip(shards.tolist(), np.split(order, starts[1:]), strict=False):
            rows[places] = self._shard(shard)[ids[places] - shard * self._shard_texts]
        return rows

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._shards:
            begin = number * self._shard_texts
            end = min(begin + self._shard_texts, len(self))
            path = _shard_path(self._folder, begin, end)
            try:
                self._shards[number] = _map_shard(path, (end - begin, self.shape[1]))[0]
            except (_BrokenShard, FileNotFoundError) as error:
                raise ValueError(f"{path} cannot be read: {error}. Run write_embeddings again.") from error
        return self._shards[number]


def embed_in_memory(encoder: TextEncoder, name: str, texts: Sequence[str]) -> np.ndarray:
    """What `write_embeddings` writes, float32 [texts, dim]: in blocks of a shard each, so that the vectors are equal.

    Args:
        name: what the texts are; "user_ids" are encoded as such.
    """
    blocks = (texts[begin : begin + SHARD_TEXTS] for begin in range(0, len(texts), SHARD_TEXTS))
    vectors = [_encode(block, encoder, name == "user_ids") for block in blocks]
    return np.concatenate([np.zeros((0, encoder.dim), np.float32), *vectors])


def write_embeddings(
    folder: str | os.PathLike,
    texts: Iterable[str],
    encoder: TextEncoder,
    *,
    user_ids: bool = False,
    shard_texts: int = SHARD_TEXTS,
    state: PartialState | None = None,
) -> Embeddings:
    """Encodes texts into shards of a folder, by all processes of `accelerate` together, and opens the result.

    Shard i is made by process i modulo their number, and whole shards of an earlier, killed run are kept. A batch never
    crosses a shard, so that on one kind of machine, with one number of threads, equal texts give equal bytes. Float32
    is written: rounded to float16, which would halve the files, two or three of 1,429 users had other codes.

    Args:
        folder: all processes see it. `embeddings.json` there says what the shards are.
        texts: read once, a shard at a time; every process is given all of them.
        encoder: fitted. Processes that use accelerators start `PartialState` before they load it.
        user_ids: encode the texts as ids of users, by `TextEncoder.encode_user_ids`.
        shard_texts: texts in a shard.
        state: the processes; those of the launcher by default.

    Raises:
        ValueError: an embedding is not finite; or the folder holds embeddings of another encoder, other settings or
            other texts.
    """
    # without `cpu`, processes launched on a machine that has nothing else would not know of each other
    state = state or PartialState(cpu=not torch.accelerator.is_available())
    folder = Path(folder)
    record = {"encoder": encoder.identity(), "user_ids": user_ids, "dim": encoder.dim, "shard_texts": shard_texts}
    folder.mkdir(parents=True, exist_ok=True)
    if state.is_main_process and _read_manifest(folder) is None:
        write_json(folder / MANIFEST, record)
    state.wait_for_everyone()
    _check_manifest(folder, record)

    texts, count, of_all = iter(texts), 0, hashlib.sha256()
    for number in itertools.count():
        shard = list(itertools.islice(texts, shard_texts))
        if not shard:
            break
        hash_of_texts = hash_value(shard)
        of_all.update(hash_of_texts.encode())
        source = hash_value([record, hash_of_texts])
        if number % state.num_processes == state.process_index:
            path = _shard_path(folder, count, count + len(shard))
            if not _is_whole(path, (len(shard), encoder.dim), source):
                _write_shard(path, shard, encoder, user_ids, source)
        count += len(shard)
    state.wait_for_everyone()
    if state.is_main_process:
        write_json(folder / MANIFEST, {**record, "texts": count, "texts_sha256": of_all.hexdigest()})
    state.wait_for_everyone()
    return Embeddings(folder)


def _encode(texts: Sequence[str], encoder: TextEncoder, user_ids: bool) -> np.ndarray:
    vectors = encoder.encode_user_ids(texts) if user_ids else encoder.encode(texts)
    broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(broken):
        raise ValueError(
            f"The encoder {encoder.name!r} gave NaN or infinite embeddings for {len(broken)} of {len(texts)} texts, "
            f"the first {texts[broken[0]][:80]!r}: use another encoder, or its weights in another precision."
        )
    return vectors


def _write_shard(path: Path, texts: list[str], encoder: TextEncoder, user_ids: bool, source: str) -> None:
    vectors = _encode(texts, encoder, user_ids)
    stored = json.dumps({"source": source, "sha256": _hash(vectors)})
    with atomic_path(path) as partial:
        save_file({_TENSOR: vectors}, partial, metadata={_METADATA: stored})
    logger.info("Encoded %s", path)


def _is_whole(path: Path, shape: tuple[int, int], source: str) -> bool:
    """Whether an earlier run left this shard; a broken one is logged.

    Raises:
        ValueError: it is whole, but of other texts or another encoder.
    """
    try:
        vectors, stored = _map_shard(path, shape)
        if stored["sha256"] != _hash(vectors):
            raise _BrokenShard("its numbers were changed")
    except FileNotFoundError:
        return False
    except _BrokenShard as error:
        logger.warning("%s is made again: %s", path, error)
        return False
    if stored["source"] != source:
        raise ValueError(
            f"{path} holds embeddings of other texts or another encoder: remove it, or use another folder."
        )
    return True


class _BrokenShard(Exception):
    """A file is not a whole shard of the shape that was asked for."""


def _map_shard(path: Path, shape: tuple[int, int]) -> tuple[np.ndarray, dict[str, str]]:
    """The numbers of a shard, mapped into memory, and what is stored about them."""
    try:
        with safe_open(path, framework="pt") as file:  # torch's tensors are mapped, numpy's would be copies
            stored, vectors = json.loads((file.metadata() or {})[_METADATA]), file.get_tensor(_TENSOR)
    except (SafetensorError, KeyError) as error:
        raise _BrokenShard(f"it is not a whole shard ({error})") from error
    if tuple(vectors.shape) != shape or vectors.dtype != torch.float32:
        found = f"{vectors.dtype} {list(vectors.shape)}"
        raise _BrokenShard(f"it holds {found}, not torch.float32 {list(shape)}")
    return vectors.numpy(), stored


def _shard_path(folder: Path, begin: int, end: int) -> Path:
    return folder / f"embeddings-{begin:010d}-{end:010d}.safetensors"


def _hash(vectors: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(vectors)).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """None where there is none, or a damaged one: each shard itself says what it is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "encoder" in manifest else None


def _check_manifest(folder: Path, record: dict[str, Any]) -> None:
    old = _read_manifest(folder)
    if old is None:
        raise ValueError(f"{folder / MANIFEST}, which the first process wrote, is missing: all processes must see it.")
    names = record.keys() - {"encoder"}
    changes = differences(*({name: each.get(name) for name in names} | each["encoder"] for each in (old, record)))
    if changes:
        raise ValueError(
            f"{folder / MANIFEST} describes other embeddings: {'; '.join(changes)}. "
            "Use another folder, or remove this one."
        )
