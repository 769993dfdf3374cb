"""Publishing what was tuned: a folder that loads anywhere, with what ranking needs beside the weights."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers import AutoQuantizationConfig

from .files import read_json, write_json
from .modeling import (
    BaseSource,
    base_fingerprint,
    base_is_saved,
    extend_base,
    extend_vocabulary,
    load_causal_lm,
)

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
        merged: write `merged/` too, the adapter merged into the base in the dtype it was tuned in. A quantised base is
            merged unquantised, since merging into 4 bits rounds again: that is not quite the model that was tuned.
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
) -> None:
    """Writes what a user loads: `adapter/`, `base/`, `merged/` as far as they apply, and what UserRanker reads.

    No absolute path is written: the folder may be moved. After full tuning there is no adapter; `merged/` is the model.
    ranker.json has what decides the arithmetic (dtype, quantisation, autocast), and a hash of the adapter's base.

    Args:
        model: the tuned model (a PeftModel, or after full tuning a plain model), not wrapped for distributed training.
        tokenizer: saved with each of the models.
        folder: is made where it is missing.
        published: what is written beside the weights.
    """
    folder, source = Path(folder), published.base
    folder.mkdir(parents=True, exist_ok=True)
    adapted = hasattr(model, "peft_config")
    dtype = getattr(model.config, "dtype", None) or torch.float32
    if adapted and not source.extended and base_is_saved(source.path, published.save_base):
        extend_base(source.path, tokenizer, folder / BASE, source.seed, dtype=dtype, revision=source.revision)
        source = BaseSource(os.fspath(folder / BASE), extended=True)
    name = BASE if source.extended or os.path.isdir(source.path) else source.path
    revision = source.revision if name != BASE else None
    if adapted:
        if source.extended and Path(source.path).resolve() != (folder / BASE).resolve():
            shutil.copytree(source.path, folder / BASE, dirs_exist_ok=True)
        _save_adapter(model, tokenizer, folder / ADAPTER, name, revision)
        if published.merged:
            _save_merged(folder / ADAPTER, source, tokenizer, folder / MERGED, _merged_dtype(model, dtype))
    else:
        model.save_pretrained(folder / MERGED)
        tokenizer.save_pretrained(folder / MERGED)
    for target, file in published.files.items():
        if file is not None and Path(file).resolve() != (folder / target).resolve():
            shutil.copyfile(file, folder / target)
    record = {"base": name if adapted else None, "revision": revision if adapted else None}
    if adapted:
        record |= {"base_fingerprint": base_fingerprint(source.path, source.revision), "base_seed": source.seed}
    quantization = getattr(model.config, "quantization_config", None)
    record |= {"dtype": str(dtype).removeprefix("torch."), "autocast": _autocast(model)}
    record["quantization"] = quantization.to_dict() if hasattr(quantization, "to_dict") else quantization
    write_json(folder / RANKER_FILE, {**record, **published.settings})


def load_published(
    folder: str | os.PathLike, base: str | os.PathLike | None = None, **model_kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads what `publish_model` wrote for inference, to compute as the tuned model did.

    That is the adapter on its base, in the same dtype, with the same quantisation and, for `LetterVerbalizer.scores`,
    under the same autocast. `merged/` rounds otherwise and is never quantised: it is loaded where there is no adapter,
    or where the adapter's base/ is not there.

    Args:
        base: hub id or folder of the base to put the adapter on, instead of the one it names.
        model_kwargs: handed to `AutoModelForCausalLM.from_pretrained` (dtype, device_map, quantization_config), which
            wins over the tuning: `quantization_config=None` loads unquantised weights, `dtype` also ends the autocast.

    Raises:
        ValueError: the folder is no published model, or its base is not there or another than it was tuned on.
    """
    folder = Path(folder)
    record = read_ranker_file(folder)
    autocast = None if "dtype" in model_kwargs else record.get("autocast")
    quantization = None if "quantization_config" in model_kwargs else record.get("quantization")
    model_kwargs = {"dtype": record["dtype"], **model_kwargs}
    usable = (folder / ADAPTER).is_dir() and (record["base"] != BASE or (folder / BASE).is_dir())
    if base is None and (folder / MERGED).is_dir() and not usable:
        source, tokenizer = BaseSource(os.fspath(folder / MERGED)), AutoTokenizer.from_pretrained(folder / MERGED)
        model = load_causal_lm(source.path, **model_kwargs)
    else:
        source, tokenizer = _find_base(folder, record, base)
        if quantization:
            model_kwargs["quantization_config"] = AutoQuantizationConfig.from_dict(quantization)
        model = _load_adapted(folder / ADAPTER, source, tokenizer, model_kwargs, quantised=bool(quantization))
    model.base_source, model.autocast = source, autocast
    return model.eval(), tokenizer


def _find_base(
    folder: Path, record: Mapping[str, Any], base: str | os.PathLike | None
) -> tuple[BaseSource, PreTrainedTokenizerBase]:
    """The base of a published adapter, or the one that is to replace it, and the adapter's tokenizer."""
    if not (folder / ADAPTER).is_dir():
        raise ValueError(f"{folder} holds neither {ADAPTER}/ nor {MERGED}/, so it is no published model.")
    revision = record["revision"] if base is None else None
    if base is None:
        base = folder / BASE if record["base"] == BASE else record["base"]
        if record["base"] == BASE and not base.is_dir():
            raise ValueError(
                f"{base} does not exist: this adapter's base was not to be saved. Put the base model there, "
                "or name it with base=."
            )
    tokenizer = AutoTokenizer.from_pretrained(folder / ADAPTER)
    base, expected = os.fspath(base), record.get("base_fingerprint")
    if expected is not None and base_fingerprint(base, revision) != expected:
        raise ValueError(
            f"The base {base!r} has another architecture or vocabulary than the one that the adapter in {folder} was "
            f"tuned on ({record['base']!r} in its {RANKER_FILE}): name that one with base=."
        )
    return BaseSource(base, record["base"] == BASE, revision, record.get("base_seed", 0)), tokenizer


def _load_adapted(
    adapter: Path,
    source: BaseSource,
    tokenizer: PreTrainedTokenizerBase,
    model_kwargs: Mapping[str, Any],
    *,
    quantised: bool,
) -> "PeftModel":
    from peft import PeftModel, prepare_model_for_kbit_training

    model = load_causal_lm(source.path, **{"revision": source.revision, **model_kwargs})
    # the adapter brings the rows, but for those of an output layer with a bias
    extend_vocabulary(model, tokenizer, source.path, source.seed, revision=source.revision)
    if quantised:  # as in tuning: what is not quantised is float32
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return PeftModel.from_pretrained(model, adapter)


def read_ranker_file(folder: str | os.PathLike) -> dict[str, Any]:
    """The content of ranker.json; ValueError where there is none."""
    path = Path(folder) / RANKER_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is not a published model: {RANKER_FILE} is missing there.")
    return read_json(path)


def _merged_dtype(model: torch.nn.Module, loaded: torch.dtype) -> torch.dtype:
    """The dtype that 4-bit weights are multiplied in, else the one that the weights were loaded in."""
    quantization = getattr(model.config, "quantization_config", None)
    if not getattr(quantization, "load_in_4bit", False):
        return loaded
    return getattr(quantization, "bnb_4bit_compute_dtype", None) or loaded


def _autocast(model: torch.nn.Module) -> str | None:
    """The dtype that a Trainer autocasts this model to, or that it was published with; None without autocast."""
    if not hasattr(model, "_original_forward"):  # accelerate's, around which it casts
        return getattr(model, "autocast", None)
    from accelerate.state import AcceleratorState

    return {"bf16": "bfloat16", "fp16": "float16"}.get(AcceleratorState().mixed_precision)


def _save_adapter(
    model: "PeftModel",
    tokenizer: "UserTokenizer",
    folder: Path,
    base: str,
    revision: str | None,
) -> None:
    model.save_pretrained(folder, save_embedding_layers=False)
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
