"""Any causal language model: each family is extended, tuned, published, merged, and scores the same when reloaded."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tests.byte_bpe import byte_bpe, sentence_bpe
from ulmrec_hf import ULMRecTrainer, ULMRecTrainingArguments, UserIndex, UserRanker, load_base
from ulmrec_hf.publishing import Published, load_published, publish_model

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

USERS = UserIndex(["u1", "u2"], np.array([[1, 2], [3, 4]]), 16)
CORPUS = ["red soap green tea blue cup", "User History Candidates Answer"] * 5
TITLES = ["red soap", "green tea", "blue cup"]
# model type, tied embeddings, tokenizer, what its configuration calls differently
FAMILIES = {
    "llama": (True, sentence_bpe, {}),
    "mistral": (False, sentence_bpe, {"sliding_window": 64}),
    "qwen3": (True, byte_bpe, {"head_dim": 16}),
    "gemma3_text": (True, sentence_bpe, {"head_dim": 16, "sliding_window": 64, "final_logit_softcapping": 4.0}),
    "phi": (False, byte_bpe, {}),  # its output layer has a bias
    "gpt_neox": (False, byte_bpe, {}),
    "olmo": (True, byte_bpe, {}),
    "olmo2": (False, byte_bpe, {}),
    "smollm3": (True, byte_bpe, {}),
    "gpt2": (True, byte_bpe, {"n_embd": 64, "n_inner": 128, "n_layer": 2, "n_head": 4, "n_positions": 512}),
}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


def save_base(family: str, folder: Path) -> None:
    """A tiny random model of the family and its tokenizer."""
    tied, make_tokenizer, settings = FAMILIES[family]
    tokenizer = make_tokenizer(CORPUS)
    sizes = {"initializer_range": 0.2} if family == "gpt2" else SIZES
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    config = CONFIG_MAPPING[family](
        vocab_size=len(tokenizer), tie_word_embeddings=tied, **ends, **{**sizes, **settings}
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    assert (head.weight is model.get_input_embeddings().weight) == tied
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tune(model, tokenizer, folder: Path, prompts: list[str]) -> ULMRecTrainer:
    """Two steps on rows that answer with letters, and with user tokens."""
    rows = {"prompt": prompts, "completion": [*"ABC" * 9, "<a_1><b_2>"][-len(prompts) :]}
    args = {"use_cpu": True, "bf16": False, "eval_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
    args |= {"load_best_model_at_end": False, "max_steps": 2, "learning_rate": 0.01, "logging_strategy": "no"}
    arguments = ULMRecTrainingArguments(str(folder), **args)
    trainer = ULMRecTrainer(model, arguments, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer)
    trainer.train()
    return trainer


def plain_scores(model, folder: str, prompts: list[str], letters: list[int]) -> np.ndarray:
    """Letter logits as anybody computes them, a prompt at a time."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), model.eval()
    with torch.no_grad():
        rows = [model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1, letters] for prompt in prompts]
    return torch.stack(rows).float().numpy()


@pytest.mark.parametrize("quantised", [False, True], ids=["float32", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_tuned_published_and_reloaded(family, quantised, tmp_path, monkeypatch):
    save_base(family, tmp_path / "source")
    options = {"load_in_4bit": True, "use_bnb_nested_quant": True} if quantised else {}
    model, tokenizer = load_base(str(tmp_path / "source"), USERS, lora_r=4, lora_alpha=16, **options)
    ranker = UserRanker(model, tokenizer, user_index=USERS)
    prompts = [ranker.prompt("u1", TITLES[:count], TITLES) for count in range(3)] + [ranker.prompt(None, [], TITLES)]
    untuned = ranker.scores(prompts, 3)
    rows = {name: weight.detach().clone() for name, weight in model.named_parameters() if "trainable_tokens" in name}
    tune(model, tokenizer, tmp_path / "work", prompts)
    assert rows and all((weight != model.get_parameter(name)).any() for name, weight in rows.items())
    assert all(weight.any() for name, weight in model.named_parameters() if "lora_B" in name)  # they start as zeros
    expected = UserRanker(model, tokenizer).scores(prompts, 3)
    assert np.abs(expected - untuned).max() > 0.01 and expected.std(1).min() > 0.01
    published = Published(model.base_source, {"num_candidates": 3}, merged=True)
    publish_model(model, tokenizer, tmp_path / "model", published)

    monkeypatch.chdir(tmp_path / "model")
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "ABC"]
    config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    kwargs = {"quantization_config": BitsAndBytesConfig(**config)} if quantised else {}
    scores = plain_scores(AutoPeftModelForCausalLM.from_pretrained("adapter", **kwargs), "adapter", prompts, letters)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    if not quantised:  # merged into what is not rounded to 4 bits
        scores = plain_scores(AutoModelForCausalLM.from_pretrained("merged"), "merged", prompts, letters)
        np.testing.assert_allclose(scores, expected, atol=1e-5)
    scores = UserRanker.from_pretrained(".", device="cpu").scores(prompts, 3)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_output_rows_that_no_adapter_holds_come_back(tmp_path):
    """Phi's, on a base that is not saved beside the adapter."""
    save_base("phi", tmp_path / "source")
    model, tokenizer = load_base(str(tmp_path / "source"), USERS, seed=3)
    publish_model(model, tokenizer, tmp_path / "model", Published(model.base_source, {}, save_base=False))
    loaded, _ = load_published(tmp_path / "model", base=tmp_path / "source")
    rows = [each.get_output_embeddings().weight[tokenizer.user_token_ids[0]] for each in (model, loaded)]
    torch.testing.assert_close(*rows)
