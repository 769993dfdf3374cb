import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.retrieval.world import item_ids, make_lists
from ulmrec_hf.retrieval.candidates import retrieve_candidates, split_positions, target_ranks
from ulmrec_hf.retrieval.item_knn import ItemKNNRetriever
from ulmrec_hf.retrieval.lrurec import LRURecConfig, LRURecModel
from ulmrec_hf.retrieval.popularity import PopularityRetriever
from ulmrec_hf.retrieval.topk import ranks_of, seen_places, top_items
from ulmrec_hf.tables import Sequences


def rows_of(path):
    return pq.read_table(path).to_pylist()


@pytest.fixture(scope="module")
def lrurec(sequences):
    torch.manual_seed(0)
    return LRURecModel(LRURecConfig(num_items=sequences.num_items, catalogue=sequences.catalogue, hidden_size=16))


def test_rows_agree_with_a_plain_computation(lrurec, sequences, tmp_path, monkeypatch):
    monkeypatch.setattr("ulmrec_hf.retrieval.candidates._BLOCK", 50)
    rows = rows_of(retrieve_candidates(lrurec, sequences, tmp_path / "c.parquet", k=5, train_positions=2))
    assert {row["split"] for row in rows} == {"train", "validation", "test"}
    for row in rows[::7]:
        items = sequences[row["user"]].tolist()
        assert row["target"] == items[row["position"]]
        history = items[: row["position"]]
        scores = lrurec.score([history])[0].numpy()
        order = [item for item in np.argsort(-scores, kind="stable").tolist() if item and item not in history]
        assert row["items"] == order[:5]
        np.testing.assert_allclose(row["scores"], scores[order[:5]], atol=1e-5)
        assert row["target_rank"] == (order.index(row["target"]) + 1 if row["target"] in order else 0)


def test_columns_and_order(lrurec, sequences, tmp_path):
    table = pq.read_table(retrieve_candidates(lrurec, sequences, tmp_path / "c.parquet", k=5))
    types = {field.name: str(field.type) for field in table.schema}
    assert types == {
        "user": "int32",
        "split": "string",
        "position": "int32",
        "items": "list<element: int32>",
        "scores": "list<element: float>",
        "target": "int32",
        "target_rank": "int32",
    }
    for split in ("train", "validation", "test"):
        keys = [(row["user"], row["position"]) for row in table.to_pylist() if row["split"] == split]
        assert keys == sorted(set(keys))


def test_split_positions():
    sequences = Sequences.from_lists([[1, 2, 3, 4, 5, 6], [1], [1, 2], [1, 2, 3]], item_ids(6))

    def pairs(*args):
        rows = split_positions(sequences, *args)
        return list(zip(rows.users.tolist(), rows.positions.tolist(), strict=True))

    assert pairs("test") == [(0, 5), (1, 0), (2, 1), (3, 2)]
    assert pairs("validation") == [(0, 4), (2, 0), (3, 1)]
    assert pairs("train", 0) == [(0, 1), (0, 2), (0, 3)]
    assert pairs("train", 2) == [(0, 2), (0, 3)]


def test_a_training_row_reads_only_its_past(lrurec, tmp_path):
    lists = make_lists(20)
    planted = [[*items[:-3], 29, 30, 28] for items in lists]
    tables = []
    for name, variant in (("a", lists), ("b", planted)):
        sequences = Sequences.from_lists(variant, item_ids())
        path = retrieve_candidates(lrurec, sequences, tmp_path / name, k=5, train_positions=0)
        # every row before the planted items, which are the last train item and both targets
        tables.append(
            [row for row in rows_of(path) if row["split"] == "train" and row["position"] < len(lists[row["user"]]) - 3]
        )
    assert tables[0]
    assert tables[0] == tables[1]


def test_small_catalogue_gives_shorter_lists_and_a_seen_target_is_unreachable(tmp_path):
    sequences = Sequences.from_lists([[1, 2, 3, 4], [1, 2, 2, 1]], item_ids(5))
    retriever = PopularityRetriever.fit(sequences.train_part())
    rows = rows_of(retrieve_candidates(retriever, sequences, tmp_path / "c.parquet", k=20))
    test = [row for row in rows if row["split"] == "test"]
    assert [row["items"] for row in test] == [[4, 5], [3, 4, 5]]  # ties: the lower item id first
    assert [row["target_rank"] for row in test] == [1, 0]


def test_a_user_with_one_item(tmp_path):
    sequences = Sequences.from_lists([[2], [1, 2, 3, 1]], item_ids(3))
    rows = rows_of(retrieve_candidates(ItemKNNRetriever.fit(sequences.train_part()), sequences, tmp_path / "c", k=2))
    alone = [row for row in rows if row["user"] == 0]
    assert [(row["split"], row["position"], row["items"]) for row in alone] == [("test", 0, [1, 2])]


def test_nobody_has_rows(tmp_path):
    sequences = Sequences.from_lists([[], []], item_ids(3))
    retriever = PopularityRetriever.fit(sequences)
    assert rows_of(retrieve_candidates(retriever, sequences, tmp_path / "c")) == []
    assert [len(part) for part in target_ranks(retriever, sequences, "test")] == [0, 0]


def test_refusals(lrurec, sequences, tmp_path):
    other = Sequences.from_lists([[1, 2, 3]], item_ids(7))
    with pytest.raises(ValueError, match="another catalogue"):
        retrieve_candidates(lrurec, other, tmp_path / "c")
    with pytest.raises(ValueError, match="k must be at least 1; got 0"):
        retrieve_candidates(lrurec, sequences, tmp_path / "c", k=0)
    assert not list(tmp_path.iterdir())


def test_ties_rank_the_lower_id_first_everywhere():
    scores = torch.tensor([[9.0, 1, 2, 2, 2, 1], [9.0, 3, 3, 3, 3, 3]])
    seen = seen_places([[3], [1, 2]])
    assert ranks_of(scores.clone(), torch.tensor([4, 5]), seen).tolist() == [2, 3]
    assert ranks_of(scores.clone(), torch.tensor([5, 2]), seen).tolist() == [4, 0]
    hidden = scores.clone()
    ranks_of(hidden, torch.tensor([4, 5]), seen)
    items, values = top_items(hidden, 2)
    assert items.tolist() == [[2, 4], [3, 4]]
    assert values.tolist() == [[2, 2], [3, 3]]


def test_random_ties_agree_between_lists_and_ranks():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (200, 41), generator=generator).float()
    targets = torch.randint(1, 41, (200,), generator=generator)
    ranks = ranks_of(scores, targets, seen_places([[]] * 200))
    items, _ = top_items(scores, 7)
    inside = [(row == target).nonzero() for row, target in zip(items, targets, strict=True)]
    assert [place.item() + 1 if len(place) else None for place in inside] == [
        rank if rank <= 7 else None for rank in ranks.tolist()
    ]


def test_nan_scores_are_refused():
    scores = torch.full((1, 4), torch.nan)
    with pytest.raises(ValueError, match="scores are NaN"):
        top_items(scores, 2)
    with pytest.raises(ValueError, match="scores are NaN"):
        ranks_of(scores, torch.tensor([1]), seen_places([[]]))
