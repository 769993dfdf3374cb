"""What holds for every retriever: one face, save and load, catalogue check, bad histories."""

import json
import logging

import numpy as np
import pytest
import torch

from tests.retrieval.world import NUM_ITEMS, item_ids, titles
from ulmrec_hf.retrieval.base import RETRIEVERS, load_retriever, retriever_class
from ulmrec_hf.retrieval.hybrid import HybridRetriever
from ulmrec_hf.retrieval.item_knn import ItemKNNRetriever
from ulmrec_hf.retrieval.popularity import PopularityRetriever
from ulmrec_hf.retrieval.text import TextRetriever
from ulmrec_hf.tables import Sequences

HISTORIES = [[1, 2, 3], [5], [], [7, 7, 8, 9, 10, 11, 12, 13, 14, 15]]


def make(name: str, sequences: Sequences):
    if name == "popularity":
        return PopularityRetriever.fit(sequences.train_part())
    if name == "item_knn":
        return ItemKNNRetriever.fit(sequences.train_part())
    if name == "text":
        return TextRetriever.fit(sequences.train_part(), titles())
    if name == "hybrid":
        return HybridRetriever.fit([make(part, sequences) for part in ("lrurec", "item_knn", "text")], sequences)
    torch.manual_seed(0)
    model = retriever_class(name)
    sizes = {"num_items": sequences.num_items, "hidden_size": 16, "initializer_range": 0.3}
    return model(model.config_class(catalogue=sequences.catalogue, **sizes)).eval()


@pytest.fixture(scope="module", params=sorted(RETRIEVERS))
def retriever(request, sequences):
    return make(request.param, sequences)


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


def test_saved_bytes_are_deterministic(retriever, sequences, tmp_path):
    retriever.save_pretrained(tmp_path / "a")
    make(retriever.name, sequences).save_pretrained(tmp_path / "b")
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


def test_unknown_items_are_skipped_and_told(retriever, caplog):
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
    with pytest.raises(ValueError, match="model_type 'llama' is not a retriever"):
        load_retriever(tmp_path)


def test_popularity_counts_the_train_part_alone():
    sequences = Sequences.from_lists([[1, 1, 2, 3, 3], [1, 3, 2]], item_ids(3))
    scores = PopularityRetriever.fit(sequences.train_part()).score([[3], []])
    np.testing.assert_array_equal(scores[:, 1:], [[3, 1, 0]] * 2)


def test_train_part_of_short_users():
    sequences = Sequences.from_lists([[1], [1, 2], [1, 2, 3], []], item_ids(3))
    assert [part.tolist() for part in map(sequences.train_part().__getitem__, range(4))] == [[], [], [1], []]


def test_items_outside_the_catalogue_are_refused():
    with pytest.raises(ValueError, match=r"items 1\.\.4, but the catalogue has items 1\.\.3"):
        Sequences.from_lists([[1, 4]], item_ids(3))
    with pytest.raises(ValueError, match="no items"):
        Sequences.from_lists([[]], [])
