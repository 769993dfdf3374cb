"""What holds for every retriever: one face, save and load, catalogue check, bad histories."""

import json
import logging

import numpy as np
import pytest
import torch

from tests.retrieval.world import NUM_ITEMS, item_ids, make_data, make_lists, write_data_stage
from ulmrec_hf.retrieval.arguments import RETRIEVERS, RetrieverArguments
from ulmrec_hf.retrieval.base import CountingRetriever, RetrieverConfig, load_retriever
from ulmrec_hf.retrieval.hybrid import Hybrid
from ulmrec_hf.retrieval.popularity import Popularity
from ulmrec_hf.retrieval.stage import train_retriever
from ulmrec_hf.tables import Sequences

HISTORIES = [[1, 2, 3], [5], [], [7, 7, 8, 9, 10, 11, 12, 13, 14, 15]]


def make(name: str, data):
    if name == "hybrid":
        parts = [make(part, data) for part in ("lrurec", "item_knn", "text")]
        return Hybrid.combine(parts, data.sequences)
    retriever_class = RETRIEVERS[name]
    if issubclass(retriever_class, CountingRetriever):
        return retriever_class.fit(data)
    torch.manual_seed(0)
    sizes = {"num_items": NUM_ITEMS, "hidden_size": 16, "initializer_range": 0.3}
    return retriever_class(retriever_class.config_class(catalogue=data.sequences.catalogue, **sizes)).eval()


@pytest.fixture(scope="module", params=sorted(RETRIEVERS))
def retriever(request, data):
    return make(request.param, data)


def test_scores_the_whole_catalogue(retriever):
    scores = retriever.score(HISTORIES)
    assert scores.shape == (len(HISTORIES), NUM_ITEMS + 1)
    assert scores.dtype == torch.float32
    assert torch.isneginf(scores[:, 0]).all()
    assert torch.isfinite(scores[:, 1:]).all()


def test_save_and_load_are_equal(retriever, tmp_path):
    retriever.save_pretrained(tmp_path)
    loaded = load_retriever(tmp_path, catalogue=retriever.config.catalogue)
    assert type(loaded) is type(retriever)
    torch.testing.assert_close(loaded.score(HISTORIES), retriever.score(HISTORIES), atol=1e-6, rtol=1e-6)
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"config.json", "model.safetensors"}
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == retriever.name


def test_saved_bytes_are_deterministic(retriever, data, tmp_path):
    retriever.save_pretrained(tmp_path / "a")
    make(retriever.name, data).save_pretrained(tmp_path / "b")
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_batch_of_one_equals_batch_of_many(retriever):
    many = retriever.score(HISTORIES)
    for row, history in enumerate(HISTORIES):
        torch.testing.assert_close(retriever.score([history])[0], many[row], atol=1e-5, rtol=1e-5)


def test_other_catalogue_is_refused(retriever, tmp_path):
    retriever.save_pretrained(tmp_path)
    other = Sequences.from_lists([[1, 2, 3]], item_ids(NUM_ITEMS - 1))
    with pytest.raises(ValueError, match="belongs to another catalogue"):
        load_retriever(tmp_path, catalogue=other.catalogue)


def test_unknown_items_are_skipped_and_logged(retriever, caplog):
    with caplog.at_level(logging.WARNING):
        scores = retriever.score([[1, NUM_ITEMS + 5, 2, -3]])
    assert torch.equal(scores, retriever.score([[1, 2]]))
    if retriever.name != "popularity":  # which reads no history
        assert "skipped 2 history items outside the catalogue" in caplog.text


def test_only_the_newest_items_are_read(retriever):
    long = list(range(1, NUM_ITEMS + 1)) * 2
    assert torch.equal(retriever.score([long]), retriever.score([long[-retriever.config.max_history :]]))


def test_folder_without_or_with_another_model(tmp_path):
    with pytest.raises(ValueError, match="holds no retriever"):
        load_retriever(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type is 'llama'; it must be one of popularity, "):
        load_retriever(tmp_path)


def test_test_targets_are_never_read(data, tmp_path):
    other = make_data([[*items[:-1], 1 + items[-1] % NUM_ITEMS] for items in make_lists()])
    for name, retriever_class in RETRIEVERS.items():
        for folder, variant in (("a", data), ("b", other)):
            settings = {"hidden_size": 8, "epochs": 2, "hybrid_components": ["lrurec", "item_knn", "text"]}
            retriever_class.fit(variant, **settings).save_pretrained(tmp_path / name / folder)
        for path in (tmp_path / name / "a").rglob("*.*"):
            assert path.read_bytes() == (tmp_path / name / "b" / path.relative_to(tmp_path / name / "a")).read_bytes()


def test_settings_replace_those_of_the_arguments(data):
    args = RetrieverArguments(max_history=7, knn_window=3)
    fitted = RETRIEVERS["item_knn"].fit(data, args, knn_window=4)
    assert (fitted.config.max_history, fitted.config.window) == (7, 4)
    with pytest.raises(ValueError, match="cross_fit, refit: a setting of the retrieval stage that fit does not read"):
        Popularity.fit(data, refit=True, cross_fit=3)


def test_a_retriever_from_outside(tmp_path, monkeypatch):
    monkeypatch.setattr(RETRIEVERS, "_entries", dict(RETRIEVERS._entries))  # so that the toy is gone afterwards

    class LastItemConfig(RetrieverConfig):
        model_type = "last_item"

    @RETRIEVERS.register("last_item")
    class LastItem(CountingRetriever):
        """What followed the newest item most often."""

        config_class, array_names = LastItemConfig, ("follows",)

        @classmethod
        def fit_sequences(cls, sequences, titles, args):
            follows = np.zeros((sequences.num_items + 1,) * 2, np.float32)
            for items in map(sequences.train_part().__getitem__, range(len(sequences))):
                np.add.at(follows, (items[:-1], items[1:]), 1)
            follows[:, 0] = -np.inf
            return cls(cls.make_config(sequences, args), {"follows": follows})

        def score(self, histories):
            newest = [items[-1] if len(items) else 0 for items in self.newest_items(histories)]
            return torch.from_numpy(self.arrays["follows"][newest])

    data = write_data_stage(tmp_path / "data", make_lists())
    folder = train_retriever(RetrieverArguments(retriever="last_item", num_candidates=3), data, tmp_path)
    loaded = load_retriever(folder, catalogue=data.sequences.catalogue)
    assert isinstance(loaded, LastItem)
    assert loaded.top([[1]], 3)[0].tolist() == LastItem.fit(data).top([[1]], 3)[0].tolist() == [[2, 3, 4]]
    hybrid = Hybrid.fit(data, hybrid_components=["last_item", "popularity"])
    assert hybrid.weights["last_item"] > hybrid.weights["popularity"]


def test_popularity_counts_the_train_part_alone():
    scores = Popularity.fit(make_data([[1, 1, 2, 3, 3], [1, 3, 2]], 3)).score([[3], []])
    np.testing.assert_array_equal(scores[:, 1:], [[3, 1, 0]] * 2)


def test_train_part_of_short_users():
    sequences = Sequences.from_lists([[1], [1, 2], [1, 2, 3], []], item_ids(3))
    assert [part.tolist() for part in map(sequences.train_part().__getitem__, range(4))] == [[], [], [1], []]


def test_items_outside_the_catalogue_are_refused():
    with pytest.raises(ValueError, match=r"items 1\.\.4, but the catalogue has items 1\.\.3"):
        Sequences.from_lists([[1, 4]], item_ids(3))
    with pytest.raises(ValueError, match="no items"):
        Sequences.from_lists([[]], [])
