import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.data_stage import TASTES, write_data_stage
from ulmrec_hf.indexing.arguments import IndexArguments
from ulmrec_hf.indexing.base import INDEXERS, Indexer, IndexerConfig, load_indexer
from ulmrec_hf.indexing.encoder import TfidfEncoder
from ulmrec_hf.indexing.indexer import UserIndexer
from ulmrec_hf.indexing.residual_kmeans import ResidualKMeans
from ulmrec_hf.indexing.stage import index_users
from ulmrec_hf.tables import LeaveOneOut
from ulmrec_hf.user_index import UserIndex

SETTINGS = {"codebook_size": 8, "levels": 3, "embedding_dim": 16}
TRAINING = {"code_dim": 6, "steps": 10, "autoencoder_steps": 10}
INPUTS = (
    {},
    {"inputs": ["titles", "cooccurrence"], "input_weights": [1.0, 2.0], "cooccurrence_dim": 8},
    {"inputs": ["cooccurrence"], "attention": True, "index_kind": "number"},
)


class RandomPoints(Indexer):
    """Each level's codes are random users: no level knows of the others."""

    name = "random_points"

    def __init__(self, config: IndexerConfig):
        super().__init__(config)
        self.register_buffer("codebooks", torch.zeros(config.levels, config.codebook_size, config.code_dim))

    def train_on(self, dataset, args):
        latents = self.latents(dataset)
        self.codebooks.copy_(latents[torch.randint(len(latents), self.codebooks.shape[:2])])


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(INDEXERS, "_entries", dict(INDEXERS._entries))
    INDEXERS.register("random_points")(RandomPoints)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data_stage(tmp_path_factory.mktemp("run") / "data")


def in_memory(folder):
    names = ("interactions", "items", "sequences")
    return LeaveOneOut({name: pq.read_table(folder / f"{name}.parquet") for name in names})


def all_settings(name, **others):
    return SETTINGS | (TRAINING if name == "rq_vae" else {}) | others


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", ["rq_vae", "residual_kmeans", "random_points"])
def test_folder_and_memory_give_the_same(name, inputs, folder, tmp_path):
    settings = all_settings(name, **inputs)
    stage = index_users(IndexArguments(indexer=name, **settings), LeaveOneOut.load(folder), tmp_path)
    expected = UserIndex.from_parquet(stage / "user_index.parquet")
    data = in_memory(folder)
    indexer = INDEXERS[name].fit(data, **settings)
    loaded = load_indexer(stage / "indexer")
    assert type(loaded) is INDEXERS[name] and json.loads((stage / "report.json").read_text())["indexer"] == name
    for index in (indexer.index(data), loaded.index(data)):
        assert (index.user_ids, index.kind) == (expected.user_ids, expected.kind)
        np.testing.assert_array_equal(index.codes, expected.codes)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, indexer.state_dict()[key]), key


@pytest.mark.parametrize("name", ["rq_vae", "residual_kmeans", "random_points"])
def test_new_users_are_indexed_near_their_like(name, folder, tmp_path):
    data = in_memory(folder)
    indexer = INDEXERS[name].fit(data, **all_settings(name))
    index = indexer.index(data)
    indexer.save_pretrained(tmp_path)
    texts = data.texts()
    for one in (indexer, load_indexer(tmp_path)):
        for user in (0, 5):
            reviews = [texts.texts[text] for text in texts.of_user(user)]
            new = one.index_new(reviews, used=index, user_id="new")
            assert new.codes[0, 0] == index.codes[user, 0] and tuple(new.codes[0]) not in set(map(tuple, index.codes))


def test_nothing_is_encoded_again_before_the_indexer_is_saved(folder, tmp_path, monkeypatch):
    encoded, encode = [], TfidfEncoder.encode
    monkeypatch.setattr(TfidfEncoder, "encode", lambda self, texts: encoded.append(len(texts)) or encode(self, texts))
    data = in_memory(folder)
    indexer = ResidualKMeans.fit(data, **SETTINGS)
    assert len(encoded) == 1
    first = indexer.index(data)
    assert len(encoded) == 1
    indexer.save_pretrained(tmp_path)
    np.testing.assert_array_equal(indexer.index(data).codes, first.codes)
    assert len(encoded) == 2


def test_residual_kmeans_finds_the_tastes(folder):
    data = in_memory(folder)
    codes = ResidualKMeans.fit(data, **SETTINGS).index(data).codes[:, 0]
    tastes = np.arange(60) % len(TASTES)
    same = (tastes[:, None] == tastes) & ~np.eye(60, dtype=bool)
    agree = codes[:, None] == codes
    assert agree[same].mean() > 3 * agree[tastes[:, None] != tastes].mean()


def test_bad_input_is_refused(folder, tmp_path):
    data = in_memory(folder)
    with pytest.raises(ValueError, match="give args or single settings, not both; got args and levels"):
        ResidualKMeans.fit(data, IndexArguments(), levels=3)
    with pytest.raises(ValueError, match="60 users do not fit into 2 levels of 4 codes"):
        ResidualKMeans.fit(data, codebook_size=4, levels=2)
    bare = ResidualKMeans(IndexerConfig(16, 8, 3, 16))
    for call in (lambda: bare.index(data), lambda: bare.index_new(["a"], used=None)):
        with pytest.raises(ValueError, match="this ResidualKMeans has no inputs to read texts with"):
            call()
    with pytest.raises(ValueError, match=r"holds no indexer: config\.json is missing"):
        load_indexer(tmp_path)
    (tmp_path / "config.json").write_text('{"indexer": "magic"}')
    with pytest.raises(ValueError, match=r"config\.json is 'magic'; it must be one of rq_vae, residual_kmeans"):
        load_indexer(tmp_path)


def test_another_class_than_the_saved_one_is_refused(folder, tmp_path):
    ResidualKMeans.fit(in_memory(folder), **SETTINGS).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds an indexer residual_kmeans, not rq_vae: load it by load_indexer"):
        INDEXERS["rq_vae"].from_pretrained(tmp_path)


def test_few_users_repeat_codes(tmp_path):
    data = in_memory(write_data_stage(tmp_path / "data", 5))
    for indexer in (
        ResidualKMeans.fit(data, **SETTINGS),
        UserIndexer.fit(data, **SETTINGS, code_dim=6, autoencoder_steps=5),
    ):
        assert len(np.unique(indexer.index(data).codes[:, 0])) == 5
