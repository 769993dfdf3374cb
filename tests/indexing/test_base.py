import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.data_stage import TASTES, data_tables, write_data_stage
from ulmrec_hf.files import write_table
from ulmrec_hf.indexing.arguments import IndexArguments
from ulmrec_hf.indexing.assignment import nearest_codes
from ulmrec_hf.indexing.base import INDEXERS, Indexer, IndexerConfig, load_indexer
from ulmrec_hf.indexing.encoder import TfidfEncoder
from ulmrec_hf.indexing.indexer import UserIndexer
from ulmrec_hf.indexing.residual_kmeans import ResidualKMeans
from ulmrec_hf.indexing.stage import index_users
from ulmrec_hf.tables import LeaveOneOut
from ulmrec_hf.user_index import UserIndex, spell_codes

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


def other_newest(folder, tmp_path, users):
    """The same data with the newest train interaction of these users another one."""
    tables = {name: pq.read_table(folder / f"{name}.parquet").to_pandas() for name in ("interactions", "sequences")}
    lists = [items.copy() for items in tables["sequences"]["items"]]
    rows, interactions = 0, tables["interactions"]
    for user, items in enumerate(lists):
        rows += len(items)
        if user not in users:
            continue
        items[-3] = (items[-3] + 19) % 40 + 1
        interactions.loc[rows - 3, ["item", "item_id"]] = items[-3], f"item{items[-3]:04d}"
        interactions.loc[rows - 3, "review"] = "elegant garden lamp" if items[-3] < 20 else "sturdy camping tent"
    tables["sequences"]["items"] = lists
    for name, frame in tables.items():
        schema = pq.read_schema(folder / f"{name}.parquet").remove_metadata()
        write_table(tmp_path / f"{name}.parquet", pa.Table.from_pandas(frame, schema, preserve_index=False))
    write_table(tmp_path / "items.parquet", pq.read_table(folder / "items.parquet"))
    return in_memory(tmp_path)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", ["rq_vae", "residual_kmeans"])
def test_the_target_of_a_training_row_does_not_change_its_index(name, inputs, folder, tmp_path):
    changed = range(0, 60, 5)  # of one group of `InputEncoder.without_own_choices`
    given, other = in_memory(folder), other_newest(folder, tmp_path, changed)
    INDEXERS[name].fit(given, **all_settings(name, **inputs)).save_pretrained(tmp_path / "indexer")
    indexer = load_indexer(tmp_path / "indexer")  # frozen, and with no vectors kept
    before, after = indexer.index(given, train_positions=3), indexer.index(other, train_positions=3)
    np.testing.assert_array_equal(before.earlier.offsets, np.concatenate([[0], np.cumsum([2, 3, 3, 3] * 15)]))
    rows = [row for user in changed for row in range(*before.earlier.offsets[user : user + 2])]
    np.testing.assert_array_equal(before.earlier.codes[rows], after.earlier.codes[rows])
    names = [before.user_ids[user] for user in changed]
    assert [before.spell(user, 1) for user in names] == [after.spell(user, 1) for user in names]
    assert (before.codes != after.codes).any(axis=1)[changed].mean() > 0.2


def test_earlier_codes_are_those_of_users_who_stopped_there(folder):
    data = in_memory(folder)
    indexer = ResidualKMeans.fit(data, **SETTINGS)
    index, texts = indexer.index(data, train_positions=0), data.texts()
    for user in (0, 7, 30):
        for before in (1, 2):
            ids = texts.of_user(user)[: -before or None]
            vectors = torch.from_numpy(indexer.inputs.encode(reviews=[texts.texts[text] for text in ids]))[None]
            mask = torch.ones(vectors.shape[:2], dtype=bool)
            latents = indexer.encode(indexer.pool(vectors, mask, torch.zeros(1, 0)))
            expected = nearest_codes(latents.numpy(), indexer.codebooks.numpy())[0]
            assert index.spell(index.user_ids[user], before) == spell_codes(expected)
    assert len(index.earlier.codes) == sum(len(items) - 3 for items in data.sequences)


def test_users_with_one_train_item_have_no_earlier_codes():
    tables = data_tables(20)
    short = [items if user % 2 else items[:3] for user, items in enumerate(tables["sequences"]["items"].to_pylist())]
    kept = [row < 3 or user % 2 for user, items in enumerate(tables["sequences"]["items"]) for row in range(len(items))]
    tables["interactions"] = tables["interactions"].filter(pa.array([bool(each) for each in kept]))
    lists = pa.array(short, pa.list_(pa.int32()))
    tables["sequences"] = tables["sequences"].set_column(2, "items", lists)
    data = LeaveOneOut(tables)
    index = ResidualKMeans.fit(data, **SETTINGS).index(data, train_positions=1)
    assert np.diff(index.earlier.offsets).tolist() == [0, 1] * 10
    assert index.shuffled(0).spell("user0001", 1)


def test_all_evidence_is_one_index_for_all_rows(folder, tmp_path):
    leaky, given = in_memory(folder), in_memory(folder)
    indexer = ResidualKMeans.fit(leaky, **SETTINGS, evidence="all")
    index = indexer.index(leaky)
    assert index.earlier is None and index.spell("user0000", 3) == index.spell("user0000")
    assert (index.codes != ResidualKMeans.fit(given, **SETTINGS).index(given).codes).any()
    indexer.save_pretrained(tmp_path / "indexer")
    np.testing.assert_array_equal(load_indexer(tmp_path / "indexer").index(given).codes, index.codes)
    stage = index_users(
        IndexArguments(indexer="residual_kmeans", **SETTINGS, evidence="all"), LeaveOneOut.load(folder), tmp_path
    )
    np.testing.assert_array_equal(UserIndex.from_parquet(stage / "user_index.parquet").codes, index.codes)
    assert "were SEEN by the index (evidence: all): it leaks" in (stage / "report.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="evidence is 'some'; it must be one of train, all"):
        IndexArguments(evidence="some")


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
