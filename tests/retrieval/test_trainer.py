import json
import tempfile
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from tests.retrieval.world import NUM_ITEMS, item_ids, make_data, make_lists, titles, write_data_stage
from ulmrec_hf.metrics import ranking_metrics, top_k_places
from ulmrec_hf.retrieval.arguments import RETRIEVERS, RetrieverArguments
from ulmrec_hf.retrieval.base import load_retriever
from ulmrec_hf.retrieval.item_knn import ItemKNN
from ulmrec_hf.retrieval.lrurec import LRURec
from ulmrec_hf.retrieval.rows import EqualBatches, TrainingRows, collate
from ulmrec_hf.retrieval.stage import cross_fit, protocol_notes, train_retriever
from ulmrec_hf.tables import LeaveOneOut, Sequences

FAST = {
    "hidden_size": 16,
    "num_layers": 1,
    "dropout": 0.1,
    "batch_size": 16,
    "learning_rate": 0.01,
}


def run(folder, lists=None, **settings):
    """The stage on these users, in a new folder."""
    data = write_data_stage(folder / "data", lists or make_lists())
    return train_retriever(RetrieverArguments(num_candidates=5, **{**FAST, **settings}), data, folder)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return run(tmp_path_factory.mktemp("run"), epochs=6, patience=3)


def test_stage_writes_its_files_and_nothing_else(stage):
    assert sorted(path.name for path in stage.iterdir()) == [
        "candidates.parquet",
        "config.json",
        "model.safetensors",
        "ranks.parquet",
        "stage.json",
        "training.json",
    ]
    assert not list(stage.parent.glob("*.partial"))


def test_loss_falls_and_the_best_epoch_is_kept(stage):
    history = json.loads((stage / "training.json").read_text())["history"]
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    ranks = load_retriever(stage).ranks(LeaveOneOut.load(stage.parent / "data"), ["validation"])
    kept = ranking_metrics(top_k_places(ranks["rank"], ranks["tied"]), ks=(10,))["ndcg@10"]
    assert kept == pytest.approx(max(row["ndcg@10"] for row in history))
    assert kept > 0.5  # the pattern is learned


def test_ranks_hold_every_system_once(stage):
    ranks = pq.read_table(stage / "ranks.parquet").to_pandas()
    assert ranks.groupby(["system", "split"]).size().to_dict() == {
        (system, split): 120 for system in ("popularity", "item_knn", "lrurec") for split in ("validation", "test")
    }
    candidates = pq.read_table(stage / "candidates.parquet").to_pandas()
    own = candidates[candidates["split"] == "test"].sort_values("user")["target_first"].tolist()
    assert ranks[(ranks["system"] == "lrurec") & (ranks["split"] == "test")].sort_values("user")["rank"].tolist() == own
    mean = ranks.groupby("system")["rank"].mean()
    assert mean["lrurec"] < mean["popularity"]


def test_other_test_items_change_nothing_that_is_trained(stage, tmp_path):
    lists = [[*items[:-1], items[-1] % NUM_ITEMS + 1] for items in make_lists()]
    other = run(tmp_path, lists, epochs=6, patience=3)
    for name in ("model.safetensors", "config.json", "training.json"):
        assert (other / name).read_bytes() == (stage / name).read_bytes(), name
    assert (other / "ranks.parquet").read_bytes() != (stage / "ranks.parquet").read_bytes()


def test_folder_and_memory_are_equal(stage, data):
    retriever = LRURec.fit(data, epochs=6, patience=3, **FAST)
    for name, weight in load_retriever(stage).state_dict().items():
        assert torch.equal(weight, retriever.state_dict()[name])
    assert retriever.training_history == json.loads((stage / "training.json").read_text())["history"]
    assert retriever.candidates(data, k=5).equals(pq.read_table(stage / "candidates.parquet"))
    ranks = pa.concat_tables(
        part.ranks(data, [split])
        for split in ("validation", "test")
        for part in (RETRIEVERS[name].fit(data) for name in ("popularity", "item_knn"))
    )
    assert pa.concat_tables([ranks, retriever.ranks(data)]).equals(pq.read_table(stage / "ranks.parquet"))


def test_without_selection_validation_items_change_nothing_either():
    weights = []
    for shift in (0, 1):
        lists = [items[:-2] + [(item + shift) % NUM_ITEMS + 1 for item in items[-2:]] for items in make_lists()]
        model = LRURec.fit(make_data(lists), epochs=1, patience=0, **FAST)
        assert "ndcg@10" not in model.training_history[0]
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("name", ["popularity", "item_knn", "text"])
def test_stage_without_training(name, tmp_path):
    stage, data = run(tmp_path, retriever=name), LeaveOneOut.load(tmp_path / "data")
    assert load_retriever(stage).name == name
    assert set(pq.read_table(stage / "ranks.parquet")["system"].to_pylist()) == {"popularity", "item_knn", name}
    before = (stage / "ranks.parquet").stat().st_mtime_ns
    train_retriever(RetrieverArguments(retriever=name, num_candidates=5, **FAST), data, tmp_path)
    assert (stage / "ranks.parquet").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="num_candidates was 5, is 6"):
        train_retriever(RetrieverArguments(retriever=name, num_candidates=6, **FAST), data, tmp_path)


def test_id_only_ranks_the_retriever_that_reads_no_title(tmp_path):
    settings = {"start_from_titles": True, "epochs": 1}
    stage, data = run(tmp_path, id_only=True, cross_fit=2, **settings), LeaveOneOut.load(tmp_path / "data")
    ranks = pq.read_table(stage / "ranks.parquet")
    assert set(ranks["system"].to_pylist()) == {"popularity", "item_knn", "lrurec", "lrurec_ids"}
    for name, titled in (("lrurec_ids", False), ("lrurec", True)):
        alone = LRURec.fit(data, epochs=1, start_from_titles=titled, **FAST)
        assert alone.ranks(data, system=name).equals(ranks.filter(pc.equal(ranks["system"], name)).combine_chunks())
    assert load_retriever(stage).name == "lrurec"
    notes = protocol_notes(RetrieverArguments(id_only=True, **settings))
    assert "lrurec_ids: the same retriever, fitted without titles (id_only)." in notes


def test_hybrid_stage_ranks_what_it_combines(tmp_path):
    components = ["lrurec", "item_knn", "text"]
    stage = run(tmp_path, retriever="hybrid", hybrid_components=components, epochs=2)
    ranks = pq.read_table(stage / "ranks.parquet")
    assert set(ranks["system"].to_pylist()) == {"popularity", "hybrid", *components}
    assert sorted(path.name for path in stage.iterdir() if path.is_dir()) == sorted(components)
    assert len(load_retriever(stage).weights) == 3


def test_refit_counts_validation_items_for_test_rows_alone(tmp_path):
    plain, refit = (run(tmp_path / str(refit), retriever="item_knn", refit=refit) for refit in (False, True))
    tables = [pq.read_table(stage / "candidates.parquet").to_pandas() for stage in (plain, refit)]
    for split, equal in (("train", True), ("validation", True), ("test", False)):
        scores = [np.concatenate(table[table["split"] == split]["scores"].tolist()) for table in tables]
        assert np.array_equal(*scores) is equal
    assert load_retriever(refit).arrays["counts"].sum() == sum(len(items) - 1 for items in make_lists())
    assert load_retriever(plain).arrays["counts"].sum() == sum(len(items) - 2 for items in make_lists())
    ranks = [pq.read_table(stage / "ranks.parquet").to_pandas() for stage in (plain, refit)]
    baseline = [table[(table["system"] == "popularity")].set_index("split")["rank"] for table in ranks]
    assert baseline[0]["validation"].tolist() == baseline[1]["validation"].tolist()
    assert baseline[0]["test"].tolist() != baseline[1]["test"].tolist()


def test_refit_never_counts_test_items(tmp_path):
    other = [[*items[:-1], 1 + items[-1] % NUM_ITEMS] for items in make_lists()]
    stages = [
        run(tmp_path / name, lists, retriever="item_knn", refit=True) for name, lists in (("a", None), ("b", other))
    ]
    assert (stages[0] / "model.safetensors").read_bytes() == (stages[1] / "model.safetensors").read_bytes()


def test_cross_fitted_candidates_come_from_a_retriever_without_that_user(tmp_path):
    lists = [*([items[0], items[0], *items[2:]] for items in make_lists(4)), *make_lists()]
    settings = {"retriever": "item_knn", "train_positions": 0}
    plain, crossed = (run(tmp_path / str(folds), lists, cross_fit=folds, **settings) for folds in (0, 3))
    tables = [pq.read_table(stage / "candidates.parquet").to_pandas() for stage in (plain, crossed)]
    for split in ("validation", "test"):
        assert tables[0][tables[0]["split"] == split].equals(tables[1][tables[1]["split"] == split])
    rows = [table[table["split"] == "train"].set_index(["user", "position"]).sort_index() for table in tables]
    assert rows[0].index.equals(rows[1].index)
    sequences = make_data(lists).sequences
    user, position = rows[1].index[-1]
    kept = np.where(np.arange(len(sequences)) % 3 == user % 3, 0, sequences.lengths)
    alone = ItemKNN.fit_sequences(sequences.select(kept), titles(), RetrieverArguments())
    expected = alone.score([sequences[user][:position]])[0]
    row = rows[1].loc[(user, position)]
    np.testing.assert_allclose(row["scores"], expected[row["items"].tolist()], rtol=1e-6)
    assert rows[0]["target_rank"].mean() < rows[1]["target_rank"].mean()  # having learned from the target helps


def test_no_folds_without_cross_fit(data):
    assert cross_fit(RetrieverArguments(), data) == []


def test_nan_loss_stops_with_the_step_and_the_setting(data, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ValueError, match=r"at step \d+: lower learning_rate \(it is 1e\+30\)"):
        LRURec.fit(data, epochs=3, **{**FAST, "learning_rate": 1e30})
    assert not list(tmp_path.iterdir())


def test_nothing_to_learn_from():
    with pytest.raises(ValueError, match="no user has two items in the train part"):
        LRURec.fit(make_data([[1, 2, 3]] * 3))
    with pytest.raises(ValueError, match="no user has a validation target"):
        LRURec.fit(make_data([[1, 2]] * 3))


def test_training_rows_label_every_item_but_the_first_once():
    train = Sequences.from_lists([list(range(1, 12)), [1], [2, 3]], item_ids(11))
    rows = TrainingRows(train, 4)
    labels = sorted(label for row in rows for label in row["labels"].tolist())
    assert labels == sorted([*range(2, 12), 3])
    assert max(rows.lengths) == 4
    for row in rows:
        assert row["input_ids"][1:].tolist() == row["labels"][:-1].tolist()


def test_batches_hold_one_length_and_as_many_labels_in_random_order():
    torch.manual_seed(0)
    lengths = np.array([9] * 40 + [1] * 360)
    sampler = EqualBatches(lengths, 40)
    batches, again = list(sampler), list(sampler)
    assert len(sampler) == len(batches) == len(again) == 10
    assert sorted(chain(*batches)) == list(range(400)) and batches != again
    assert [lengths[batch].sum() for batch in batches] == [72] * 10
    assert all(len({*lengths[batch].tolist()}) == 1 for batch in batches)
    order = [len(batch) for batch in batches]
    assert order != sorted(order) and order != sorted(order, reverse=True)


def test_a_row_that_is_longer_than_a_batch_stands_alone():
    batches = list(EqualBatches([1, 1, 1, 50, 60], 1))
    assert sorted(chain(*batches)) == list(range(5)) and [3] in batches and [4] in batches


def test_collate_pads_to_the_longest():
    batch = collate([{"input_ids": [1, 2], "labels": [2, 3]}, {"input_ids": [4], "labels": [5]}])
    assert batch["input_ids"].tolist() == [[1, 2], [4, 0]]
    assert batch["labels"].tolist() == [[2, 3], [5, 0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retriever": "nope"}, "retriever is 'nope'; it must be one of popularity, item_knn, "),
        (
            {"id_only": True},
            "id_only .* needs one neural retriever with start_from_titles true; got lrurec with .* false",
        ),
        ({"id_only": True, "start_from_titles": True, "retriever": "text"}, "id_only .* got text with .* true"),
        ({"id_only": True, "start_from_titles": True, "retriever": "hybrid"}, "id_only .* got hybrid with .* true"),
        ({"cross_fit": 1}, "cross_fit must be 0 or at least 2"),
        ({"hybrid_components": ["lrurec", "hybrid", "magic"]}, "hybrid_components holds hybrid, magic; it may hold"),
        ({"hybrid_components": ["text", "text"]}, "hybrid_components is .*; it must name some retrievers, each once"),
        ({"knn_recency": 1.5}, "knn_recency must be at most 1; got 1.5"),
        ({"retriever": "sasrec", "hidden_size": 9}, "hidden_size must be a multiple of num_heads; got 9, 2"),
        ({"epochs": 2.5}, "epochs is 2.5; it must be a whole number"),
        ({"num_candidates": 0}, "num_candidates must be at least 1; got 0"),
        ({"train_positions": -1}, "train_positions must be at least 0; got -1"),
        ({"dropout": 1.0}, "dropout must be below 1; got 1.0"),
        ({"mask_probability": 1.0}, "mask_probability must be below 1; got 1.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number of at least 0; got nan"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        RetrieverArguments(**settings)
