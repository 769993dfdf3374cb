import json

import numpy as np
import pytest
import torch

from ulmrec_hf.indexing.arguments import PRESETS, IndexArguments
from ulmrec_hf.indexing.assignment import count_collisions, nearest_codes
from ulmrec_hf.indexing.dataset import Input, UserDataset
from ulmrec_hf.indexing.encoder import TfidfEncoder
from ulmrec_hf.indexing.indexer import UserIndexer, UserIndexerConfig

SIZES = {"embedding_dim": 16, "codebook_size": 8, "levels": 3, "code_dim": 6, "hidden_sizes": (24,)}


@pytest.fixture(scope="module")
def dataset() -> UserDataset:
    """240 users of 8 tastes, with one to six texts each; the last one has none."""
    random = np.random.default_rng(0)
    tastes = random.normal(size=(8, 16))
    texts = tastes.repeat(60, axis=0) + 0.5 * random.normal(size=(480, 16))
    texts = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32)
    ids = [random.integers(60, size=1 + user % 6) + 60 * (user % 8) for user in range(239)] + [np.array([], int)]
    users = random.normal(size=(240, 16)).astype(np.float32) / 4
    offsets = np.cumsum([0, *map(len, ids)])
    inputs = [Input(texts, np.concatenate(ids).astype(np.int32))]
    return UserDataset(inputs, offsets, users, max_reviews=4)


TRAINING = {"steps": 40, "autoencoder_steps": 20, "batch_size": 64, "learning_rate": 5e-3, "refit_codebooks": False}


def make_indexer(**settings) -> UserIndexer:
    return UserIndexer(UserIndexerConfig(**SIZES, **settings))


def make_trained(dataset: UserDataset, **settings) -> UserIndexer:
    torch.manual_seed(0)
    indexer = make_indexer(**settings)
    indexer.train_on(dataset, IndexArguments(**TRAINING))
    return indexer


@pytest.fixture(scope="module", params=PRESETS)
def trained(request, dataset) -> UserIndexer:
    return make_trained(dataset, preset=request.param)


def test_newest_texts_padded(dataset):
    batch = dataset.collate([5, 0, 239])
    assert batch["texts"].shape == (3, 4, 16) and batch["user_ids"].shape == (3, 16)
    assert batch["mask"].tolist() == [[True] * 4, [True, False, False, False], [False] * 4]


def test_inputs_are_joined_by_weight_and_interactions_without_any_left_out():
    tables = np.array([[3, 0], [0, 1], [0, 0]], np.float32), np.ones((1, 1), np.float32)
    inputs = [Input(tables[0], np.array([0, -1, 1, -1, 2])), Input(tables[1], np.array([-1, -1, 0, 0, -1]), weight=0.5)]
    dataset = UserDataset(inputs, np.array([0, 3, 4, 5]), None, max_reviews=50)
    batch = dataset.collate([0, 1, 2])
    assert batch["texts"].tolist() == [[[1, 0, 0], [0, 1, 0.5]], [[0, 0, 0.5], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]]
    assert batch["mask"].tolist() == [[True, True], [True, False], [False, False]]  # the last has zeros alone


def test_attention_is_eq_1():
    indexer = make_indexer(preset="paper")
    torch.manual_seed(0)
    with torch.no_grad():
        indexer.attention.normal_()
    texts, users = torch.randn(2, 3, 16), torch.randn(2, 16)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    vectors = indexer.pool(texts, mask, users)
    for user, count in enumerate([3, 2]):
        scores = torch.stack([texts[user, i] @ indexer.attention @ users[user] for i in range(count)])
        expected = (scores.softmax(0)[:, None] * texts[user, :count]).sum(0)
        torch.testing.assert_close(vectors[user], expected)


def test_without_attention_a_user_is_the_mean(dataset):
    indexer = make_indexer(preset="paper", attention=False)
    batch = dataset.collate([5])
    torch.testing.assert_close(indexer.pool(**batch), batch["texts"].mean(dim=1))
    assert indexer.attention is None


def test_user_without_text_is_zero_and_harmless(dataset):
    indexer = make_indexer()
    assert not indexer.pool(**dataset.collate([239])).any()
    loss = indexer(**dataset.collate([0, 239]))["loss"]
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in indexer.parameters() if p.grad is not None)


def test_attention_receives_gradient(dataset):
    encoder = TfidfEncoder(16)
    batch = dataset.collate(list(range(64)))
    batch["user_ids"] = torch.from_numpy(encoder.encode_user_ids([f"A{user}XQ" for user in range(64)]))
    indexer = make_indexer()
    indexer(**batch)["loss"].backward()
    assert indexer.attention.grad.abs().max() > 1e-6
    batch["user_ids"] = torch.zeros_like(batch["user_ids"])  # what TF-IDF itself would make of an id
    indexer.zero_grad()
    indexer(**batch)["loss"].backward()
    assert not indexer.attention.grad.any()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("users", [240, 5])
def test_refitted_codebooks_are_the_means_of_those_nearest(preset, users):
    """Lloyd's fixed point, level by level; of 5 users each has a code of its own, and the rest are repeated."""
    torch.manual_seed(0)
    indexer, latents = make_indexer(preset=preset), torch.randn(users, 6)
    indexer.refit_codebooks(latents)
    codes, residuals = nearest_codes(latents.numpy(), indexer.codebooks.numpy()), latents.numpy().copy()
    for level, codebook in enumerate(indexer.codebooks.numpy()):
        for code in np.unique(codes[:, level]):
            mean = residuals[codes[:, level] == code].mean(axis=0)
            np.testing.assert_allclose(codebook[code], mean, atol=0.05 if users > 8 else 1e-5)
        residuals -= codebook[codes[:, level]]
    assert len(np.unique(codes[:, 0])) == min(users, 8)
    assert np.abs(residuals).max() < (3.0 if users > 8 else 1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_quantization_loss_is_eq_5(preset):
    torch.manual_seed(0)
    indexer = make_indexer(preset=preset, beta=0.25)
    indexer.start_codebooks(torch.randn(64, 6))
    latents = torch.randn(10, 6, requires_grad=True)
    codes = torch.from_numpy(nearest_codes(latents.detach().numpy(), indexer.codebooks.numpy()))
    loss = indexer.quantization_loss(latents, codes)
    loss.backward()
    residual, expected, gradient = latents.detach(), 0.0, torch.zeros(10, 6)
    for level in range(3):
        nearest = indexer.codebooks[level][codes[:, level]]
        squared = (residual - nearest).square().sum(1).mean()
        expected += (1.25 if preset == "paper" else 0.25) * squared
        gradient += 0.25 * 2 * (residual - nearest) / 10  # only the commitment term reaches the latent vectors
        residual = residual - nearest
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(latents.grad, gradient)
    for layer in indexer.quantizer.layers:
        codebook = layer._codebook.embed
        assert (codebook.grad is not None and bool(codebook.grad.any())) == (preset == "paper")


def test_training_learns_and_does_not_collapse(trained, dataset):
    fresh = make_indexer(preset=trained.settings.preset)
    batch = dataset.collate(list(range(240)))
    with torch.no_grad():
        before, after = (indexer.pool(**batch).var(dim=0).sum() for indexer in (fresh, trained))
    assert trained.attention.abs().max() > 1e-3  # A has moved, and with it the target of the reconstruction
    assert after > 0.7 * before
    assignment = trained.assign(dataset)
    assert assignment.errors[-1] < 0.8 * float(after) and assignment.errors[-1] < assignment.errors[0]
    assert all(len(np.unique(level)) >= 5 for level in assignment.nearest.T)


def test_one_pass_gives_what_each_step_gives(trained, dataset, monkeypatch):
    monkeypatch.setattr("ulmrec_hf.indexing.base._BATCH", 7)
    assignment, latents = trained.assign(dataset), trained.latents(dataset).numpy()
    assert assignment.silent == 1 and count_collisions(assignment.codes) == 0
    np.testing.assert_array_equal(assignment.latents, latents)
    np.testing.assert_array_equal(assignment.nearest, nearest_codes(latents, trained.codebooks.numpy()))
    vectors, quantized = torch.cat(list(trained.vectors(dataset))), torch.zeros(240, 6)
    for level, codebook in enumerate(trained.codebooks):
        quantized = quantized + codebook[assignment.nearest[:, level]]
        with torch.no_grad():
            error = (vectors - trained.decoder(quantized)).square().sum(dim=1).mean()
        assert assignment.errors[level] == pytest.approx(float(error), abs=1e-4)


def test_users_of_one_taste_share_first_codes(trained, dataset):
    codes = nearest_codes(trained.latents(dataset).numpy(), trained.codebooks.numpy())[:239, 0]
    tastes = np.arange(239) % 8
    same = tastes[:, None] == tastes
    agree = codes[:, None] == codes
    off_diagonal = ~np.eye(239, dtype=bool)
    assert agree[same & off_diagonal].mean() > 3 * agree[~same].mean()


def test_saves_and_loads_the_same_codes(trained, dataset, tmp_path):
    trained.save_pretrained(tmp_path)
    again = UserIndexer.from_pretrained(tmp_path).eval()
    latents = again.latents(dataset)
    torch.testing.assert_close(latents, trained.latents(dataset), rtol=0, atol=0)
    torch.testing.assert_close(again.codebooks, trained.codebooks, rtol=0, atol=0)
    torch.testing.assert_close(again.quantizer(latents)[1], trained.quantizer(latents)[1])
    config = json.loads((tmp_path / "config.json").read_text())
    assert (
        config["codebook_size"] == 8
        and config["preset"] == trained.settings.preset
        and config["encoder_name"] == "tfidf"
    )
    assert config["indexer"] == "rq_vae"
    assert not {file.suffix for file in tmp_path.iterdir()} & {".bin", ".pt", ".pkl"}


def test_equal_seeds_equal_weights(dataset):
    first, second = make_trained(dataset), make_trained(dataset)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset must be one of default, paper; got 'best'"):
        make_indexer(preset="best")
