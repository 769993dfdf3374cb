"""The language model: loading a base, giving it user tokens and an adapter.

Where a base may be saved, it is extended by the user tokens once and saved beside the adapter; a base that stays on
the hub is extended in memory. Either way an adapter holds the user tokens' rows of the embeddings, not whole matrices.
"""

import copy
import hashlib
import json
import os
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .user_index import KINDS, USER_INDEX_PATTERN, UserIndex
from .user_token_rows import newest_preferences, start_from_texts

if TYPE_CHECKING:
    import pyarrow as pa
    from peft import PeftModel
    from trl import ModelConfig

    from .tokenization_user import UserTokenizer

_ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)
EMBEDDED_BASE = "embedded"  # the small Llama that comes with the package


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
        folder: is made where it is missing; equal arguments give equal bytes.
        seed: of the new rows.
        dtype: of the stored weights; with the one they are tuned in, a plain reload computes the same.
        revision: branch, tag or commit of a hub id.

    Raises:
        ValueError: there is no such model.
    """
    model = load_causal_lm(name_or_path, dtype=dtype, revision=revision)
    extend_vocabulary(model, tokenizer, name_or_path, seed, revision=revision)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class BaseSource:
    """Where the base of a model came from, which saving it needs; `load_base` puts it on the model as `base_source`.

    Attributes:
        path, revision: hub id and its branch, tag or commit; or folder.
        extended: the folder was written by `extend_base`.
        seed: of the rows of new tokens.
    """

    path: str
    extended: bool = False
    revision: str | None = None
    seed: int = 0


def resolve_base(name_or_path: str) -> str:
    """A base's hub id or folder; `embedded` stands for the small Llama that comes with the package."""
    if name_or_path == EMBEDDED_BASE:
        return str(resources.files("ulmrec_hf") / "models" / "tiny_llama")
    return name_or_path


def load_base(
    name_or_path: str,
    users: UserIndex | None = None,
    preferences: "pa.Table | None" = None,
    *,
    seed: int = 0,
    **settings: Any,
) -> "tuple[PeftModel | PreTrainedModel, UserTokenizer]":
    """A base that knows the user tokens, with an adapter to tune, and its tokenizer.

    Args:
        name_or_path: hub id or folder of a causal language model, or "embedded" for the package's small one.
        users: the index whose tokens it is to know; None, or an index without tokens, adds none.
        preferences: what the users like (schema `tables.PREFERENCES`), from which their tokens' rows start, see
            `start_from_texts`; without it they start from noise.
        seed: of the new rows and of the adapter.
        settings: fields of `trl.ModelConfig` (lora_r, lora_target_modules, dtype, load_in_4bit, ...); an adapter is
            added unless `use_peft=False`.

    Raises:
        ValueError: there is no such model, or it cannot take the user tokens.
    """
    from trl import ModelConfig

    base = resolve_base(name_or_path)
    config = ModelConfig(**{"model_name_or_path": base, "use_peft": True, **settings})
    revision = None if os.path.isdir(base) else config.model_revision
    # an index in plain text has no tokens; unused rows would cost memory and, where they are outputs, probability
    levels = users.levels if users is not None and KINDS[users.kind].adds_tokens else 0
    tokenizer = load_user_tokenizer(base, levels, users.codebook_size if levels else 1, revision)
    model = load_model(base, config, tokenizer, seed=seed)
    if levels and preferences is not None:
        start_user_tokens(model, tokenizer, users, preferences)
    model = add_adapter(model, config, tokenizer, seed=seed)
    model.base_source = BaseSource(base, revision=revision, seed=seed)
    return model, tokenizer


def load_model(
    name_or_path: str, model_config: "ModelConfig", tokenizer: "UserTokenizer", *, seed: int = 0
) -> PreTrainedModel:
    """Loads the model to tune, as `trl.ModelConfig` says, with a row for each user token.

    A base that is not yet extended is extended in memory, and then has no `name_or_path`: its weights are nowhere on
    disk, so that checkpoints neither compare it with the original nor store its matrices.

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
    model = load_causal_lm(name_or_path, **arguments)
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
    users differ from the first step on; they are the same on every device. A matrix that is large enough already
    (padded) keeps its size. `name_or_path` is where the base's own tokenizer is.
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
        for module in token_matrices(model).values():
            weight = module.weight
            rows = weight[old].float()
            noise = torch.randn(len(new), weight.shape[1], generator=generator).to(weight.device)
            weight[new] = (rows.mean(0) + rows.std(0) * noise).to(weight.dtype)
    return True


def start_user_tokens(
    model: PreTrainedModel, tokenizer: "UserTokenizer", users: UserIndex, preferences: "pa.Table"
) -> None:
    """`start_from_texts` for a model that `load_model` returned, from a table of preferences.

    An output layer with a bias is left out: its rows are not in the adapter, see `add_adapter`.
    """
    matrices = [module for module in token_matrices(model).values() if getattr(module, "bias", None) is None]
    start_from_texts(matrices, tokenizer, users, newest_preferences(preferences, users))


def add_adapter(
    model: PreTrainedModel, model_config: "ModelConfig", tokenizer: "UserTokenizer", *, seed: int = 0
) -> "PeftModel | PreTrainedModel":
    """Wraps what `load_model` returned so that only LoRA weights and the user tokens' rows are trained.

    Rows of the input embeddings and, where untied, of the output layer are trained: two of the tasks answer with user
    tokens. An output layer with a bias (Phi) keeps the rows it was given: peft would leave out the bias. Without user
    tokens no row is trained. With `use_peft: false` the model is returned as it is, all of it trainable.

    Args:
        model_config: the `lora_*` settings are read; without lora_target_modules LoRA goes where peft says for the
            model's family, or to all linear layers of a family that it does not know.
        tokenizer: which rows are the user tokens'.
        seed: of LoRA's initial weights.

    Raises:
        ValueError: lora_target_modules names nothing in this model, or its tied embeddings have an output bias.
    """
    if not model_config.use_peft:
        return model
    from peft import get_peft_model, prepare_model_for_kbit_training
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    from trl import get_peft_config

    if getattr(model, "quantization_method", None) is not None:
        # The trainer turns gradient checkpointing on where its arguments ask for it; the embeddings' output then
        # requires a gradient, by the trained rows or, where there are none, by transformers' own hook.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    rows = [index for level in tokenizer.user_token_ids for index in level]
    config = get_peft_config(model_config)
    if not config.target_modules and model.config.model_type not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        config.target_modules = "all-linear"
    if rows:
        config.trainable_token_indices = dict.fromkeys(_trainable_embeddings(model), rows)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            names = {name.rpartition(".")[2] for name, module in model.named_modules() if not [*module.children()]}
            raise ValueError(
                f"The adapter could not be put on the {model.config.model_type} model; check lora_target_modules "
                f"(all-linear, or any of the matrices among {', '.join(sorted(names))}). {error}"
            ) from error


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


def base_fingerprint(name_or_path: str, revision: str | None = None) -> str:
    """A hash of a base's architecture and vocabulary, the same before and after it is extended by user tokens.

    Raises:
        ValueError: there is no such model or tokenizer.
    """
    config = _from_pretrained(AutoConfig, name_or_path, "configuration", revision=revision).get_text_config()
    vocabulary = _from_pretrained(AutoTokenizer, name_or_path, "tokenizer", revision=revision).get_vocab()
    # not all fields: new releases add some, and saving changes others
    described = {name: getattr(config, name, None) for name in _ARCHITECTURE}
    words = ((index, token) for token, index in vocabulary.items() if not USER_INDEX_PATTERN.fullmatch(token))
    described["vocabulary"] = sorted(words)
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def token_matrices(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """The matrices with a row for each token, by the last part of their name: the input's and, untied, the output's."""
    modules = [model.get_input_embeddings()]
    output = model.get_output_embeddings()
    if output is not None and output.weight is not modules[0].weight:
        modules.append(output)
    return {name.rpartition(".")[2]: module for name, module in model.named_modules() if module in modules}


def _trainable_embeddings(model: PreTrainedModel) -> list[str]:
    """The names of `token_matrices` whose rows peft can train; it multiplies with them without the layer's bias."""
    names, output = token_matrices(model), model.get_output_embeddings()
    if getattr(output, "bias", None) is None:
        return list(names)
    if output not in names.values():
        raise ValueError(
            f"The {model.config.model_type} model has a bias on an output layer that is tied to its embeddings, which "
            "the rows of user tokens cannot be trained with: choose another base, use_peft false, or an index_kind "
            "that is plain text."
        )
    return [name for name, module in names.items() if module is not output]


def load_causal_lm(name_or_path: str, **arguments: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`; ValueError, naming the setting, where there is no such model."""
    model = _from_pretrained(AutoModelForCausalLM, name_or_path, "model", **arguments)
    for module in model.modules() if model.device.type == "cpu" else ():
        if hasattr(getattr(module, "weight", None), "quant_state"):
            module.register_forward_pre_hook(_restore_unless_packed)
    return model


def _restore_unless_packed(module: torch.nn.Module, _: tuple) -> None:
    """A forward pre-hook for 4-bit weights on a CPU, which keeps them as they were loaded.

    Evaluation packs them in a form that no gradient passes through, bitsandbytes 0.50 leaves them so when training goes
    on (the layers below would stand still), and unpacking, which saving does, rounds them again.
    """
    weight = module.weight
    data, state = module.__dict__.setdefault("loaded_weight", (weight.data, copy.copy(weight.quant_state)))
    if module.training or not getattr(weight.quant_state, "packing_format_for_cpu", False):
        weight.data, weight.quant_state = data, copy.copy(state)


def _from_pretrained(auto_class: type, name_or_path: str, kind: str, **arguments: Any):
    arguments = {name: value for name, value in arguments.items() if value is not None}
    try:
        return auto_class.from_pretrained(name_or_path, **arguments)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The {kind} of the base {name_or_path!r} could not be loaded; check the setting model_name_or_path "
            f"(a hub id or a folder with a causal language model and its tokenizer). {error}"
        ) from error
