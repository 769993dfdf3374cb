"""The language model: loading a base, giving it user tokens and an adapter, and publishing what was tuned.

A base is extended by the user tokens once. Where it may be saved, the extended base lies beside the adapter; a base
that stays on the hub is extended in memory, and the adapter carries its user tokens' rows. Either way an adapter holds
rows of the embedding matrices, never whole matrices.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .files import write_json

if TYPE_CHECKING:
    from peft import PeftModel
    from trl import ModelConfig

    from .tokenization_user import UserTokenizer

ADAPTER, BASE, MERGED = "adapter", "base", "merged"
RANKER_FILE, USER_INDEX_FILE, ITEMS_FILE, TEMPLATES_FILE = (
    "ranker.json",
    "user_index.parquet",
    "items.parquet",
    "templates.yaml",
)


def base_is_saved(name_or_path: str, base_may_be_saved: bool | None = None) -> bool:
    """Whether the extended base is written beside the adapter: as the setting says; without one, if it is a folder."""
    return os.path.isdir(name_or_path) if base_may_be_saved is None else base_may_be_saved


def extend_base(
    name_or_path: str,
    tokenizer: "UserTokenizer",
    folder: str | os.PathLike,
    seed: int,
    *,
    dtype: str = "auto",
    revision: str | None = None,
) -> None:
    """Writes the base with its vocabulary extended by the user tokens, and the tokenizer, to `folder` (safetensors).

    Args:
        name_or_path: hub id or folder of a causal language model.
        tokenizer: that base's tokenizer with the user tokens added.
        folder: where the extended base goes; equal arguments give equal bytes.
        seed: of the new rows.
        dtype: what the weights are stored in; the one they are tuned in lets a plain reload compute the same.
        revision: branch, tag or commit of a hub id.

    Raises:
        ValueError: there is no such model.
    """
    model = _load(name_or_path, dtype=dtype, revision=revision)
    extend_vocabulary(model, tokenizer, name_or_path, seed, revision=revision)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_base(
    name_or_path: str, model_config: "ModelConfig", tokenizer: "UserTokenizer", *, seed: int = 0
) -> PreTrainedModel:
    """Loads the model to tune, as `trl.ModelConfig` says, with a row for each user token.

    An extended base comes as it lies on disk; any other is extended in memory, and then bears no `name_or_path`: its
    weights lie nowhere, so that checkpoints neither compare it with the original nor store its matrices.

    Args:
        name_or_path: hub id, folder, or a folder written by `extend_base`.
        model_config: dtype, quantisation, attention implementation and revision are read.
        tokenizer: the tokenizer with the user tokens.
        seed: of the new rows.

    Raises:
        ValueError: there is no such model, or 4- or 8-bit weights are asked for without an adapter.
    """
    from accelerate import PartialState
    from trl import get_quantization_config

    revision = None if os.path.isdir(name_or_path) else model_config.model_revision
    arguments = {"dtype": model_config.dtype, "revision": revision}
    if model_config.attn_implementation:
        arguments["attn_implementation"] = model_config.attn_implementation
    if (quantization := get_quantization_config(model_config)) is not None:
        if not model_config.use_peft:
            raise ValueError("load_in_4bit and load_in_8bit tune an adapter only: set use_peft to true.")
        arguments.update(quantization_config=quantization, device_map={"": PartialState().device})
    model = _load(name_or_path, **arguments)
    if extend_vocabulary(model, tokenizer, name_or_path, seed, revision=revision):
        model.name_or_path = ""
    return model


def extend_vocabulary(
    model: PreTrainedModel,
    tokenizer: "UserTokenizer",
    name_or_path: str,
    seed: int,
    *,
    revision: str | None = None,
) -> bool:
    """Gives the model a row for each token that the tokenizer has and the base's own has not; returns whether it did.

    New rows are drawn from a normal distribution with the old rows' own mean and deviation in each dimension, so that
    users differ from the first step on. A matrix that is large enough already (padded) keeps its size.

    Args:
        model: the base, in memory.
        tokenizer: the tokenizer with the user tokens.
        name_or_path: where the base's own tokenizer is.
        seed: of the new rows; the same rows come out on every device.
    """
    size = model.get_input_embeddings().weight.shape[0]
    known = _from_pretrained(AutoTokenizer, name_or_path, "tokenizer", revision=revision).get_vocab()
    new = sorted(index for token, index in tokenizer.get_vocab().items() if token not in known or index >= size)
    if not new:
        return False
    if len(tokenizer) > size:
        # The library's mean resizing draws from the global random state and makes all new rows nearly alike.
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    old = [index for index in range(size) if index not in set(new)]
    with torch.no_grad():
        for module in _embeddings(model).values():
            weight = module.weight
            rows = weight[old].float()
            noise = torch.randn(len(new), weight.shape[1], generator=generator).to(weight.device)
            weight[new] = (rows.mean(0) + rows.std(0) * noise).to(weight.dtype)
    return True


def add_adapter(
    model: PreTrainedModel, model_config: "ModelConfig", tokenizer: "UserTokenizer", *, seed: int = 0
) -> "PeftModel | PreTrainedModel":
    """Wraps the base so that only LoRA weights and the user tokens' rows are trained.

    Rows of the input embeddings and, where untied, of the output layer are trained: two of the tasks answer with user
    tokens. Without user tokens no row is. With `use_peft: false` the model comes back as it is, all of it trainable.

    Args:
        model: what `load_base` returned.
        model_config: the `lora_*` settings are read.
        tokenizer: tells which rows are the user tokens'.
        seed: of LoRA's initial weights.
    """
    if not model_config.use_peft:
        return model
    from peft import get_peft_model, prepare_model_for_kbit_training
    from trl import get_peft_config

    if getattr(model, "quantization_method", None) is not None:
        # The trainer turns gradient checkpointing on where its arguments ask for it; the embeddings' output then
        # requires a gradient, by the trained rows or, where there are none, by transformers' own hook.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    rows = [index for level in tokenizer.user_token_ids for index in level]
    config = get_peft_config(model_config)
    if rows:
        config.trainable_token_indices = dict.fromkeys(_embeddings(model), rows)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def publish_model(
    model: "PeftModel | PreTrainedModel",
    tokenizer: "UserTokenizer",
    folder: str | os.PathLike,
    *,
    base: str | os.PathLike,
    base_saved: bool,
    settings: Mapping[str, Any],
    merged: bool = False,
    revision: str | None = None,
    user_index: str | os.PathLike | None = None,
    items: str | os.PathLike | None = None,
    templates: str | os.PathLike | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    seed: int = 0,
) -> None:
    """Writes what a user loads: `adapter/`, `base/`, `merged/` as far as they apply, and what UserRanker reads.

    No absolute path is written: the folder may be moved. After full tuning there is no adapter; `merged/` is the model.

    Args:
        model: the tuned model (a PeftModel, or after full tuning a plain model), not wrapped for distributed training.
        tokenizer: saved with each of the models.
        folder: where all of it goes.
        base: what `load_base` was given: an extended base's folder, a hub id, or a folder that is not to be saved.
        base_saved: `base` is an extended base that is published; it is copied to `folder/base` unless it lies there.
            Otherwise the adapter names the hub id, or for a folder the word `base`: put the base there to load it.
        settings: written to ranker.json; see `ulmrec_hf.ranker.RankerSettings`.
        merged: write `merged/` too, the adapter merged into the base in the dtype it was tuned in (quantised bases are
            merged unquantised, since merging into 4 bits rounds anew).
        revision: branch, tag or commit of a hub id.
        user_index, items, templates: files to copy in. User ids are personal data: without `user_index` no user map
            is written.
        state_dict: the gathered weights, where the training was sharded.
        seed: of the rows of a base that is extended in memory, as given to `load_base`.
    """
    folder, base = Path(folder), os.fspath(base)
    folder.mkdir(parents=True, exist_ok=True)
    adapted = hasattr(model, "peft_config")
    on_hub = not os.path.isdir(base)
    dtype = _dtype(model)
    if adapted:
        if base_saved and Path(base).resolve() != (folder / BASE).resolve():
            shutil.copytree(base, folder / BASE, dirs_exist_ok=True)
        name = base if on_hub and not base_saved else BASE
        _save_adapter(model, tokenizer, folder / ADAPTER, name, revision if name != BASE else None, state_dict)
        if merged:
            _save_merged(folder / ADAPTER, base, tokenizer, folder / MERGED, dtype, seed, revision if on_hub else None)
    else:
        model.save_pretrained(folder / MERGED, state_dict=state_dict)
        tokenizer.save_pretrained(folder / MERGED)
    files = {USER_INDEX_FILE: user_index, ITEMS_FILE: items, TEMPLATES_FILE: templates}
    for target, source in files.items():
        if source is not None and Path(source).resolve() != (folder / target).resolve():
            shutil.copyfile(source, folder / target)
    write_json(
        folder / RANKER_FILE,
        {
            "base": name if adapted else None,
            "revision": revision if adapted and name != BASE else None,
            "dtype": str(dtype).removeprefix("torch."),
            **settings,
        },
    )


def load_user_tokenizer(
    name_or_path: str, levels: int, codebook_size: int, revision: str | None = None
) -> "UserTokenizer":
    """The base's tokenizer with user tokens added; see `UserTokenizer.from_base`.

    Raises:
        ValueError: there is no such tokenizer, or it cannot take the user tokens.
    """
    from .tokenization_user import UserTokenizer

    base = _from_pretrained(AutoTokenizer, name_or_path, "tokenizer", revision=revision)
    return UserTokenizer.from_base(base, levels, codebook_size)


def load_published(
    folder: str | os.PathLike, base: str | os.PathLike | None = None, **model_kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads what `publish_model` wrote, in the dtype it was tuned in, for inference.

    Args:
        folder: the published folder.
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
        return _load(os.fspath(folder / MERGED), **model_kwargs).eval(), tokenizer
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
    model = _load(os.fspath(base), **model_kwargs)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # the adapter brings the rows
    return PeftModel.from_pretrained(model, folder / ADAPTER).eval(), tokenizer


def read_ranker_file(folder: str | os.PathLike) -> dict[str, Any]:
    """The content of ranker.json; ValueError where there is none."""
    path = Path(folder) / RANKER_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is not a published model: {RANKER_FILE} is missing there.")
    return json.loads(path.read_text(encoding="utf-8"))


def _embeddings(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """The matrices with a row for each token, by the last part of their name: the input's and, untied, the output's."""
    modules = [model.get_input_embeddings()]
    output = model.get_output_embeddings()
    if output is not None and output.weight is not modules[0].weight:
        modules.append(output)
    return {name.rpartition(".")[2]: module for name, module in model.named_modules() if module in modules}


def _dtype(model: torch.nn.Module) -> torch.dtype:
    # Not the parameters' own: quantised ones are integers, and preparing for them widens the others.
    config = model.config
    quantization = getattr(config, "quantization_config", None)
    return getattr(quantization, "bnb_4bit_compute_dtype", None) or getattr(config, "dtype", None) or torch.float32


def _load(name_or_path: str, **arguments: Any) -> PreTrainedModel:
    return _from_pretrained(AutoModelForCausalLM, name_or_path, "model", **arguments)


def _from_pretrained(auto_class: type, name_or_path: str, kind: str, **arguments: Any):
    arguments = {name: value for name, value in arguments.items() if value is not None}
    try:
        return auto_class.from_pretrained(name_or_path, **arguments)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The {kind} of the base {name_or_path!r} could not be loaded; check the setting model_name_or_path "
            f"(a hub id or a folder with a causal language model and its tokenizer). {error}"
        ) from error


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
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update(base_model_name_or_path=base, revision=revision)
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # written from a set, whose order changes with every process
    write_json(path, config)


def _save_merged(
    adapter: Path,
    base: str,
    tokenizer: "UserTokenizer",
    folder: Path,
    dtype: torch.dtype,
    seed: int,
    revision: str | None,
) -> None:
    """Merges into a fresh, unquantised copy of the base, so that the tuned model stays as it is."""
    from peft import PeftModel

    model = _load(base, dtype=dtype, revision=revision)
    extend_vocabulary(model, tokenizer, base, seed, revision=revision)
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
