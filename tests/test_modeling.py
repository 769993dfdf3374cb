"""Floor 3: what is trained, what is saved, and that it loads elsewhere without this package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM
from trl import ModelConfig

from tests.tiny_llama import make_base, make_tokenizer
from ulmrec_hf.modeling import BaseSource, add_adapter, base_is_saved, extend_base, load_base, load_model
from ulmrec_hf.publishing import Published, load_published, publish_model
from ulmrec_hf.tokenization_user import UserTokenizer
from ulmrec_hf.user_index import UserIndex
from ulmrec_hf.verbalizer import LetterVerbalizer

# peft 0.21 asks a transformers 5.23 model for a property of the old name; may go when peft no longer does.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PROMPT = "### User:\n<a_1><b_2>\n### Candidates:\nA. red soap\nB. green tea\nC. blue cup\n### Answer:\n"
HUB_ID = "someone/tiny-llama"
CASES = ("tied", "untied", "nf4", "hub", "full")

# Runs where ulmrec_hf cannot be imported, on folders that were moved, with the hub offline.
ELSEWHERE = """
import json, os, sys
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

moved, letters, prompt, hub_id = json.loads(sys.argv[1])
results = {}
for case in sorted(os.listdir(moved)):
    os.chdir(os.path.join(moved, case))
    tokenizer = AutoTokenizer.from_pretrained("merged" if case == "full" else "adapter")
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    options = {}
    if case == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype="float32",
            bnb_4bit_use_double_quant=True,
        )

    def base():
        model = AutoModelForCausalLM.from_pretrained(hub_id if case == "hub" else "base", **options)
        if case == "hub":
            model.resize_token_embeddings(len(tokenizer))
        return model

    def adapter_loaded():
        model = base()
        model.load_adapter("adapter")
        return model

    loaders = {
        "load_adapter": adapter_loaded,
        "PeftModel": lambda: PeftModel.from_pretrained(base(), "adapter"),
        "AutoPeftModel": lambda: AutoPeftModelForCausalLM.from_pretrained("adapter", **options),
        "merged": lambda: AutoModelForCausalLM.from_pretrained("merged"),
    }
    if case == "full":
        loaders = {"merged": loaders["merged"]}
    results[case] = {}
    for name, load in loaders.items():
        with torch.no_grad():
            scores = load().eval()(ids).logits[0, -1, letters[case]]
        results[case][name] = scores.tolist()
assert "ulmrec_hf" not in sys.modules
print(json.dumps(results))
"""


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[bool, Path]:
    """Folders of a 2-layer Llama, by whether its embeddings are tied."""
    return {tied: make_base(tmp_path_factory.mktemp("bases") / f"tied_{tied}", tied=tied) for tied in (True, False)}


@pytest.fixture(scope="session")
def user_tokenizer(bases) -> UserTokenizer:
    return UserTokenizer.from_base(bases[True], levels=2, codebook_size=16)


def lora_config(**settings) -> ModelConfig:
    defaults = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    defaults["lora_target_modules"] = ["q_proj", "v_proj"]
    return ModelConfig(**{**defaults, **settings})


def train(model, tokenizer, steps: int = 3) -> None:
    """A few steps on a text that holds user tokens in its prompt and in its answer."""
    ids = torch.tensor([tokenizer(PROMPT + "B <a_1><b_2><a_3>")["input_ids"]])
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def letter_scores(model, tokenizer, prompt: str = PROMPT) -> torch.Tensor:
    return LetterVerbalizer(tokenizer, prompt, 3).scores(
        model, {"input_ids": torch.tensor([tokenizer(prompt)["input_ids"]])}
    )[0]


@pytest.fixture(scope="session")
def hub_cache(tmp_path_factory, bases) -> Path:
    """The cache of huggingface_hub as after a download of HUB_ID."""
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / f"models--{HUB_ID.replace('/', '--')}"
    commit = "0" * 40
    shutil.copytree(bases[False], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return cache


@pytest.fixture(scope="session")
def published(tmp_path_factory, bases, user_tokenizer, hub_cache) -> dict:
    """Every case tuned and published, and the folders then moved: {"folder", "scores", "old"}."""
    old = tmp_path_factory.mktemp("trained_here")
    scores = {}
    for case in CASES:
        model_config = lora_config()
        if case == "nf4":
            model_config = lora_config(load_in_4bit=True, use_bnb_nested_quant=True)
        elif case == "full":
            model_config = ModelConfig(use_peft=False)
        folder = old / case
        with pytest.MonkeyPatch.context() as patch:
            if case == "hub":
                base = HUB_ID
                patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub_cache))
            else:
                base = str(folder / "base")
                extend_base(str(bases[case == "tied"]), user_tokenizer, base, seed=0)
            model = add_adapter(load_model(base, model_config, user_tokenizer), model_config, user_tokenizer)
            train(model, user_tokenizer)
            scores[case] = letter_scores(model, user_tokenizer)
            if model_config.use_peft:
                model.save_pretrained(folder / "checkpoint")  # as the Trainer does
            source = BaseSource(base, extended=case != "hub")
            publish_model(model, user_tokenizer, folder, Published(source, {"num_candidates": 3}, merged=True))
        if case == "full":
            shutil.rmtree(folder / "base")
    moved = tmp_path_factory.mktemp("elsewhere") / "moved"
    shutil.move(old, moved)
    return {"folder": moved, "scores": scores, "old": str(old)}


@pytest.fixture(scope="session")
def elsewhere(published, user_tokenizer, hub_cache, tmp_path_factory) -> dict:
    """Letter scores by case and loader, from a fresh process without ulmrec_hf."""
    letters = LetterVerbalizer(user_tokenizer, PROMPT, 3).ids
    arguments = json.dumps([str(published["folder"]), dict.fromkeys(CASES, letters), PROMPT, HUB_ID])
    result = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, arguments],
        cwd=tmp_path_factory.mktemp("cwd"),
        env={**os.environ, "HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_moved_model_scores_the_same_without_this_package(case, published, elsewhere):
    expected = published["scores"][case]
    assert expected.std() > 0.01
    assert set(elsewhere[case]) == (
        {"merged"} if case == "full" else {"load_adapter", "PeftModel", "AutoPeftModel", "merged"}
    )
    for loader, scores in elsewhere[case].items():
        if case == "nf4" and loader == "merged":
            continue  # merged unquantised: the base's own rounding is gone
        difference = (torch.tensor(scores) - expected).abs().max().item()
        print(f"{case} {loader}: {difference:.1e}")
        assert difference < 1e-4, loader


@pytest.mark.parametrize("case", CASES)
def test_published_folder_names_no_absolute_path(case, published, hub_cache):
    folder = published["folder"] / case
    for path in folder.rglob("*"):
        if path.is_file() and "checkpoint" not in path.parts:
            content = path.read_bytes()
            for place in (published["old"], str(Path(published["old"]).parent), str(hub_cache)):
                assert place.encode() not in content, path
    if case != "full":
        config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == (HUB_ID if case == "hub" else "base")
        assert (folder / "base").is_dir() == (case != "hub")
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))


@pytest.mark.parametrize(("case", "matrices"), [("tied", 1), ("untied", 2), ("hub", 2)])
def test_adapter_holds_rows_not_matrices(case, matrices, published, user_tokenizer):
    from safetensors.torch import load_file

    for name in ("adapter", "checkpoint"):
        tensors = load_file(published["folder"] / case / name / "adapter_model.safetensors")
        rows = [tensor for key, tensor in tensors.items() if "lora_" not in key]
        assert [list(tensor.shape) for tensor in rows] == [[32, 64]] * matrices
        size = (published["folder"] / case / name / "adapter_model.safetensors").stat().st_size
        print(f"{case} {name}: {size} bytes")
        assert size < 40_000


@pytest.mark.parametrize("tied", [True, False])
def test_only_user_rows_and_lora_move(tied, bases, user_tokenizer, tmp_path):
    extend_base(str(bases[tied]), user_tokenizer, tmp_path / "base", seed=0)
    model_config = lora_config()
    model = add_adapter(load_model(str(tmp_path / "base"), model_config, user_tokenizer), model_config, user_tokenizer)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        name
        for name, _ in model.named_parameters()
        if "lora_" in name or name.endswith("trainable_tokens_delta.default")
    }
    train(model, user_tokenizer)
    model = model.merge_and_unload()
    before = LlamaForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    users = torch.tensor(user_tokenizer.user_token_ids).flatten()
    others = torch.ones(len(user_tokenizer), dtype=torch.bool)
    others[users] = False
    for name, after in model.state_dict().items():
        moved = (after != before[name]).reshape(len(after), -1).any(1)
        if "embed_tokens" in name or "lm_head" in name:
            assert not moved[others].any(), name
            assert moved[user_tokenizer.encode_user([1, 2])].all(), name
        else:
            assert moved.any() == ("q_proj" in name or "v_proj" in name), name
    if not tied:  # every row of the output layer is in the softmax
        assert (model.lm_head.weight != before["lm_head.weight"])[users].any(1).all()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("tied", [True, False])
def test_without_user_tokens_lora_alone_is_trained_saved_and_merged(tied, bases, tmp_path):
    from safetensors.torch import load_file

    tokenizer = UserTokenizer.from_base(bases[tied], levels=0)
    folder, model_config = tmp_path / "model", lora_config()
    extend_base(str(bases[tied]), tokenizer, folder / "base", seed=0)
    base = {
        name: load_file(path / "model.safetensors") for name, path in (("old", bases[tied]), ("new", folder / "base"))
    }
    assert base["old"].keys() == base["new"].keys()
    assert all(torch.equal(weight, base["new"][name]) for name, weight in base["old"].items())

    model = add_adapter(load_model(str(folder / "base"), model_config, tokenizer), model_config, tokenizer)
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    untrained = letter_scores(model, tokenizer)
    train(model, tokenizer)
    expected = letter_scores(model, tokenizer)
    assert (expected - untrained).abs().max() > 1e-3
    published = Published(BaseSource(str(folder / "base"), extended=True), {}, merged=True)
    publish_model(model, tokenizer, folder, published)
    assert all("lora_" in name for name in load_file(folder / "adapter" / "adapter_model.safetensors"))
    torch.testing.assert_close(letter_scores(*load_published(folder)), expected, atol=1e-4, rtol=0)
    shutil.rmtree(folder / "merged")
    model, loaded = load_published(folder)
    torch.testing.assert_close(letter_scores(model, loaded), expected, atol=1e-4, rtol=0)
    assert loaded.get_vocab() == make_tokenizer().get_vocab()


@pytest.mark.parametrize("reentrant", [True, False])
def test_without_user_tokens_a_4_bit_base_is_tuned_with_checkpointed_activations(reentrant, bases):
    tokenizer = UserTokenizer.from_base(bases[False], levels=0)
    model_config = lora_config(load_in_4bit=True, use_bnb_nested_quant=True)
    model = add_adapter(load_model(str(bases[False]), model_config, tokenizer), model_config, tokenizer)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    train(model, tokenizer)
    moved = {name: parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name}
    assert len(moved) == 4 and all(moved.values())  # they start as zeros


def test_extension_is_seeded_and_keeps_old_rows(bases, user_tokenizer, tmp_path):
    for folder, seed in (("first", 0), ("again", 0), ("other", 1)):
        extend_base(str(bases[False]), user_tokenizer, tmp_path / folder, seed=seed)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again", "other")]
    assert weights[0] == weights[1] != weights[2]
    extended = LlamaForCausalLM.from_pretrained(tmp_path / "first")
    original = LlamaForCausalLM.from_pretrained(bases[False])
    size = original.config.vocab_size
    assert extended.config.vocab_size == len(user_tokenizer) == size + 32
    for new, old in ((extended.model.embed_tokens, original.model.embed_tokens), (extended.lm_head, original.lm_head)):
        assert torch.equal(new.weight[:size], old.weight)
        assert 0.5 < new.weight[size:].std() / old.weight.std() < 1.5
        assert len(new.weight[size:].unique(dim=0)) == 32


def test_extended_in_memory_equals_extended_on_disk(bases, user_tokenizer, tmp_path):
    extend_base(str(bases[True]), user_tokenizer, tmp_path / "base", seed=3)
    on_disk = load_model(str(tmp_path / "base"), lora_config(), user_tokenizer, seed=99)
    in_memory = load_model(str(bases[True]), lora_config(), user_tokenizer, seed=3)
    assert torch.equal(on_disk.model.embed_tokens.weight, in_memory.model.embed_tokens.weight)
    assert in_memory.name_or_path == "" and on_disk.name_or_path


def test_padded_matrix_keeps_its_size(bases, user_tokenizer, tmp_path):
    padded = LlamaForCausalLM.from_pretrained(bases[False])
    padded.resize_token_embeddings(1024, mean_resizing=False)
    with torch.no_grad():
        padded.model.embed_tokens.weight[len(user_tokenizer) - 32 :] = 0
    padded.save_pretrained(tmp_path / "padded")
    make_tokenizer().save_pretrained(tmp_path / "padded")
    model = load_model(str(tmp_path / "padded"), lora_config(), user_tokenizer)
    rows = model.model.embed_tokens.weight
    assert len(rows) == 1024
    assert rows[user_tokenizer.user_token_ids[1]].abs().sum(1).min() > 0
    assert rows[len(user_tokenizer) :].abs().sum() == 0


def test_base_that_is_not_saved_is_put_in_later(bases, user_tokenizer, tmp_path):
    private = shutil.copytree(bases[False], tmp_path / "private")
    assert base_is_saved(str(private)) and not base_is_saved(str(private), False) and not base_is_saved(HUB_ID)
    model_config = lora_config()
    model = add_adapter(load_model(str(private), model_config, user_tokenizer), model_config, user_tokenizer)
    train(model, user_tokenizer)
    folder = tmp_path / "model"
    publish_model(model, user_tokenizer, folder, Published(BaseSource(str(private)), {}, save_base=False))
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "ranker.json"]
    assert str(tmp_path) not in (folder / "adapter" / "adapter_config.json").read_text()
    expected = letter_scores(model, user_tokenizer)
    with pytest.raises(ValueError, match=r"base does not exist: .* name it with base="):
        load_published(folder)
    torch.testing.assert_close(letter_scores(*load_published(folder, base=private)), expected, atol=1e-4, rtol=0)
    shutil.move(private, folder / "base")
    torch.testing.assert_close(letter_scores(*load_published(folder)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("other", ["architecture", "vocabulary"])
def test_an_adapter_is_refused_on_another_base(other, published, bases, tmp_path):
    folder = published["folder"] / "tied"
    record = json.loads((folder / "ranker.json").read_text())
    wrong = shutil.copytree(bases[True], tmp_path / "wrong")
    if other == "architecture":
        wrong = bases[False]  # untied, else the same
    else:
        file = wrong / "tokenizer.json"
        content = json.loads(file.read_text())
        first, second = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)[40:42]
        vocabulary = content["model"]["vocab"]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        file.write_text(json.dumps(content))
    message = (
        rf"base '{wrong}' has another architecture or vocabulary .* adapter in {folder} was tuned on \('base' in its"
    )
    with pytest.raises(ValueError, match=message):
        load_published(folder, base=wrong)
    # the base without the user tokens is the same base, in whatever dtype
    LlamaForCausalLM.from_pretrained(bases[True]).bfloat16().save_pretrained(tmp_path / "narrow")
    make_tokenizer().save_pretrained(tmp_path / "narrow")
    load_published(folder, base=tmp_path / "narrow")
    # what older versions published names no base
    old = shutil.copytree(folder, tmp_path / "old")
    for name in ("base_fingerprint", "quantization", "autocast"):
        record.pop(name)
    (old / "ranker.json").write_text(json.dumps(record))
    load_published(old, base=wrong)
    model, tokenizer = load_published(old)
    torch.testing.assert_close(letter_scores(model, tokenizer), published["scores"]["tied"], atol=1e-4, rtol=0)


def test_a_tuned_model_without_user_tokens_is_published(bases, tmp_path):
    model_config, tokenizer = lora_config(), make_tokenizer()
    model = load_model(str(bases[True]), model_config, UserTokenizer.from_base(tokenizer, levels=0))
    model = add_adapter(model, model_config, UserTokenizer.from_base(tokenizer, levels=0))
    publish_model(model, tokenizer, tmp_path / "model", Published(BaseSource(str(bases[True])), {}))
    loaded = load_published(tmp_path / "model")
    torch.testing.assert_close(letter_scores(*loaded), letter_scores(model.eval(), tokenizer), atol=1e-5, rtol=0)


def test_modules_that_the_model_lacks_are_named(bases, user_tokenizer):
    model_config = lora_config(lora_target_modules=["query_key_value"])
    with pytest.raises(ValueError, match=r"llama model; check lora_target_modules \(all-linear, .*q_proj.*v_proj"):
        add_adapter(load_model(str(bases[True]), model_config, user_tokenizer), model_config, user_tokenizer)


def test_tied_embeddings_with_an_output_bias_are_refused(bases, user_tokenizer):
    model = load_model(str(bases[True]), lora_config(), user_tokenizer)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(user_tokenizer)))
    with pytest.raises(ValueError, match="bias on an output layer that is tied to its embeddings"):
        add_adapter(model, lora_config(), user_tokenizer)


def test_checkpoint_of_a_base_extended_in_memory_resumes(bases, user_tokenizer, tmp_path):
    model_config = lora_config()
    model, fresh = (
        add_adapter(
            load_model(str(bases[False]), model_config, user_tokenizer, seed=seed), model_config, user_tokenizer
        )
        for seed in (0, 1)
    )
    train(model, user_tokenizer)
    model.save_pretrained(tmp_path / "checkpoint")
    fresh.load_adapter(tmp_path / "checkpoint", "default", is_trainable=True)
    torch.testing.assert_close(letter_scores(fresh.eval(), user_tokenizer), letter_scores(model, user_tokenizer))
    ids = torch.tensor([user_tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(fresh(ids).logits, model(ids).logits)  # user tokens' output rows too


@pytest.mark.parametrize("case", ["tied", "untied", "full"])
def test_load_published(case, published):
    model, tokenizer = load_published(published["folder"] / case)
    torch.testing.assert_close(letter_scores(model, tokenizer), published["scores"][case], atol=1e-4, rtol=0)


def test_bad_input_is_named(bases, user_tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"'no/such-model' could not be loaded; check the setting model_name_or_path"):
        load_model("no/such-model", lora_config(), user_tokenizer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="could not be loaded"):
        extend_base(str(tmp_path / "empty"), user_tokenizer, tmp_path / "out", seed=0)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="set use_peft to true"):
        load_model(str(bases[True]), ModelConfig(load_in_4bit=True), user_tokenizer)
    with pytest.raises(ValueError, match=r"is not a published model: ranker\.json is missing"):
        load_published(tmp_path)


def test_a_base_in_memory_is_tuned_published_and_loaded(bases, user_tokenizer, tmp_path):
    users = UserIndex(["u1"], np.array([[1, 2]]), 16)
    model, tokenizer = load_base(str(bases[True]), users, seed=3, lora_r=4)
    assert tokenizer.get_vocab() == user_tokenizer.get_vocab()
    on_disk = tmp_path / "on_disk"
    extend_base(str(bases[True]), tokenizer, on_disk, seed=3)
    base = LlamaForCausalLM.from_pretrained(on_disk).model.embed_tokens.weight
    assert torch.equal(model.get_input_embeddings().weight, base)
    train(model, tokenizer)
    publish_model(model, tokenizer, tmp_path / "model", Published(model.base_source, {}))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["adapter", "base", "ranker.json"]
    loaded, _ = load_published(tmp_path / "model")
    torch.testing.assert_close(letter_scores(loaded, tokenizer), letter_scores(model, tokenizer), atol=1e-4, rtol=0)
    assert loaded.base_source.extended
    plain, tokenizer = load_base(str(bases[True]), UserIndex(["u1"], np.array([[1, 2]]), 16, kind="text"))
    assert tokenizer.levels == 0 and all("lora" in name for name, row in plain.named_parameters() if row.requires_grad)
