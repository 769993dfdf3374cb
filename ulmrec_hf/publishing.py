"""Publishing what was tuned: a folder that loads anywhere, with what ranking needs beside the weights."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .files import read_json, write_json
from .modeling import BaseSource, base_is_saved, extend_base, extend_vocabulary, load_causal_lm

if TYPE_CHECKING:
    from peft import PeftModel

    from .tokenization_user import UserTokenizer

ADAPTER, BASE, MERGED = "adapter", "base", "merged"
RANKER_FILE, TEMPLATES_FILE = "ranker.json", "templates.yaml"
USER_INDEX_FILE, ITEMS_FILE = "user_index.parquet", "items.parquet"


@dataclass(frozen=True)
class Published:
    """What a published folder holds beside the tuned weights.

    Attributes:
        base: where the base came from.
        settings: written to ranker.json; see `ulmrec_hf.ranker.RankerSettings`.
        save_base: publish the base with its user tokens as `base/`; by default if it is a folder, or was extended in
            one. Otherwise the adapter names the hub id, or for a folder the word `base`: put the base there to load it.
        merged: write `merged/` too, the adapter merged into the base in the dtype it was tuned in (quantised bases are
            merged unquantised, since merging into 4 bits rounds again).
        files: further files, by their name in the folder: `USER_INDEX_FILE`, `ITEMS_FILE`, `TEMPLATES_FILE`. User ids
            are personal data: no user map is written that is not given here. None is left out.
    """

    base: BaseSource
    settings: Mapping[str, Any]
    merged: bool = False
    save_base: bool | None = None
    files: Mapping[str, str | os.PathLike | None] = field(default_factory=dict)


def publish_model(
    model: "PeftModel | PreTrainedModel",
    tokenizer: "UserTokenizer",
    folder: str | os.PathLike,
    published: Published,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes what a user loads: `adapter/`, `base/`, `merged/` as far as they apply, and what UserRanker reads.

    No absolute path is written: the folder may be moved. After full tuning there is no adapter; `merged/` is the model.

    Args:
        model: the tuned model (a PeftModel, or after full tuning a plain model), not wrapped for distributed training.
        tokenizer: saved with each of the models.
        folder: is made where it is missing.
        published: what is written beside the weights.
        state_dict: the gathered weights, where the training was sharded.
    """
    folder, source = Path(folder), published.base
    folder.mkdir(parents=True, exist_ok=True)
    adapted = hasattr(model, "peft_config")
    dtype = _dtype(model)
    if adapted and not source.extended and base_is_saved(source.path, published.save_base):
        extend_base(source.path, tokenizer, folder / BASE, source.seed, dtype=dtype, revision=source.revision)
        source = BaseSource(os.fspath(folder / BASE), extended=True)
    name = BASE if source.extended or os.path.isdir(source.path) else source.path
    revision = source.revision if name != BASE else None
    if adapted:
        if source.extended and Path(source.path).resolve() != (folder / BASE).resolve():
            shutil.copytree(source.path, folder / BASE, dirs_exist_ok=True)
        _save_adapter(model, tokenizer, folder / ADAPTER, name, revision, state_dict)
        if published.merged:
            _save_merged(folder / ADAPTER, source, tokenizer, folder / MERGED, dtype)
    else:
        model.save_pretrained(folder / MERGED, state_dict=state_dict)
        tokenizer.save_pretrained(folder / MERGED)
    for target, file in published.files.items():
        if file is not None and Path(file).resolve() != (folder / target).resolve():
            shutil.copyfile(file, folder / target)
    record = {"base": name if adapted else None, "revision": revision if adapted else None}
    record |= {"dtype": str(dtype).removeprefix("torch."), **published.settings}
    write_json(folder / RANKER_FILE, record)


def load_published(
    folder: str | os.PathLike, base: str | os.PathLike | None = None, **model_kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads what `publish_model` wrote, in the dtype it was tuned in, for inference.

    Args:
        base: hub id or folder of the base to put the adapter on, instead of the one it names; `merged/` is used where
            it exists and no base is given.
        model_kwargs: handed to `AutoModelForCausalLM.from_pretrained` (dtype, device_map, quantization_config).

    Raises:
        ValueError: the folder is no published model, or its base is not there.
    """
    folder = Path(folder)
    record = read_ranker_file(folder)
    model_kwargs = {"dtype": record["dtype"], **model_kwargs}
    if base is None and (folder / MERGED).is_dir():
        tokenizer = AutoTokenizer.from_pretrained(folder / MERGED)
        model = load_causal_lm(os.fspath(folder / MERGED), **model_kwargs).eval()
        model.base_source = BaseSource(os.fspath(folder / MERGED))
        return model, tokenizer
    if not (folder / ADAPTER).is_dir():
        raise ValueError(f"{folder} holds neither {ADAPTER}/ nor {MERGED}/, so it is no published model.")
    from peft import PeftModel

    if base is None:
        base = folder / BASE if record["base"] == BASE else record["base"]
        if record["base"] == BASE and not base.is_dir():
            raise ValueError(
                f"{base} does not exist: this adapter's base was not to be saved. Put the base model there, "
                "or name it with base=."
            )
        if record["revision"]:
            model_kwargs.setdefault("revision", record["revision"])
    tokenizer = AutoTokenizer.from_pretrained(folder / ADAPTER)
    model = load_causal_lm(os.fspath(base), **model_kwargs)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # the adapter brings the rows
    model = PeftModel.from_pretrained(model, folder / ADAPTER).eval()
    model.base_source = BaseSource(os.fspath(base), record["base"] == BASE, record["revision"])
    return model, tokenizer


def read_ranker_file(folder: str | os.PathLike) -> dict[str, Any]:
    """The content of ranker.json; ValueError where there is none."""
    path = Path(folder) / RANKER_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is not a published model: {RANKER_FILE} is missing there.")
    return read_json(path)


def _dtype(model: torch.nn.Module) -> torch.dtype:
    # Not the parameters' own: quantised ones are integers, and preparing for them widens the others.
    config = model.config
    quantization = getattr(config, "quantization_config", None)
    return getattr(quantization, "bnb_4bit_compute_dtype", None) or getattr(config, "dtype", None) or torch.float32


def _save_adapter(
    model: "PeftModel",
    tokenizer: "UserTokenizer",
    folder: Path,
    base: str,
    revision: str | None,
    state_dict: Mapping[str, torch.Tensor] | None,
) -> None:
    model.save_pretrained(folder, save_embedding_layers=False, state_dict=state_dict)
    (folder / "README.md").unlink(missing_ok=True)  # peft's card names the base by its path on this machine
    tokenizer.save_pretrained(folder)
    path = folder / "adapter_config.json"
    config = read_json(path)
    config.update(base_model_name_or_path=base, revision=revision)
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # written from a set, whose order changes with every process
    write_json(path, config)


def _save_merged(
    adapter: Path, source: BaseSource, tokenizer: "UserTokenizer", folder: Path, dtype: torch.dtype
) -> None:
    """Merges into a fresh, unquantised copy of the base, so that the tuned model stays as it is."""
    from peft import PeftModel

    model = load_causal_lm(source.path, dtype=dtype, revision=source.revision)
    extend_vocabulary(model, tokenizer, source.path, source.seed, revision=source.revision)
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
