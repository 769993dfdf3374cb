import logging

import numpy as np
import pytest
import torch

from tests.retrieval.world import make_data, make_lists
from ulmrec_hf.protocol import SPLITS, target_positions
from ulmrec_hf.retrieval.item_knn import ItemKNN
from ulmrec_hf.retrieval.lrurec import LRURec, LRURecConfig
from ulmrec_hf.retrieval.popularity import Popularity
from ulmrec_hf.retrieval.topk import hide, ranks_of, seen_places, top_items
from ulmrec_hf.tables import CANDIDATES, RANKS


@pytest.fixture(scope="module")
def lrurec(sequences):
    torch.manual_seed(0)
    return LRURec(LRURecConfig(num_items=sequences.num_items, catalogue=sequences.catalogue, hidden_size=16))


def test_rows_agree_with_a_plain_computation(lrurec, data, sequences, monkeypatch):
    monkeypatch.setattr("ulmrec_hf.retrieval.candidates._BLOCK", 50)
    rows = lrurec.candidates(data, k=5, train_positions=2).to_pylist()
    assert {row["split"] for row in rows} == {"train", "validation", "test"}
    for row in rows[::7]:
        items = sequences[row["user"]].tolist()
        assert row["target"] == items[row["position"]]
        history = items[: row["position"]]
        scores = lrurec.score([history])[0].numpy()
        order = [item for item in np.argsort(-scores, kind="stable").tolist() if item and item not in history]
        assert row["items"] == order[:5]
        np.testing.assert_allclose(row["scores"], scores[order[:5]], atol=1e-5)
        rank = order.index(row["target"]) + 1 if row["target"] in order else 0
        assert (row["target_rank"], row["target_first"], row["target_tied"]) == (rank, rank, int(rank > 0))


def test_columns_and_order(lrurec, data):
    table = lrurec.candidates(data, k=5)
    assert table.schema == CANDIDATES
    keys = [(SPLITS.index(row["split"]), row["user"], row["position"]) for row in table.to_pylist()]
    assert keys == sorted(set(keys))


def test_ranks_are_those_of_the_candidates(lrurec, data):
    rows = [row for row in lrurec.candidates(data).to_pylist() if row["split"] != "train"]
    expected = [(row["user"], row["split"], "lrurec", row["target_first"], row["target_tied"]) for row in rows]
    table = lrurec.ranks(data)
    assert table.schema == RANKS
    assert [tuple(row.values()) for row in table.to_pylist()] == expected


@pytest.mark.parametrize("split", SPLITS)
def test_top_gives_the_items_and_scores_of_the_table(lrurec, data, sequences, split, monkeypatch):
    monkeypatch.setattr("ulmrec_hf.retrieval.candidates._BLOCK", 50)
    rows = [row for row in lrurec.candidates(data, k=5).to_pylist() if row["split"] == split]
    items, scores = lrurec.top([sequences[row["user"]][: row["position"]].tolist() for row in rows], k=5)
    assert items.dtype == np.int64 and scores.dtype == np.float32
    assert items.tolist() == [row["items"] for row in rows]
    assert scores.tolist() == [row["scores"] for row in rows]


def test_top_of_any_histories(data, caplog):
    knn = ItemKNN.fit(data, max_history=3)
    histories = [[1, 2, 3, 4, 5], [], [9]]
    items, scores = knn.top(histories, k=30)
    for row, history in enumerate(histories):
        alone = knn.top([history], k=30)
        assert np.array_equal(alone[0][0], items[row]) and np.array_equal(alone[1][0], scores[row])
        real = items[row][scores[row] > -np.inf].tolist()
        assert sorted([*real, *history]) == list(range(1, 31))  # older items than are read are excluded, too
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(knn.top([[9, 99]], k=5)[0], items[2:, :5])
    assert "skipped 1 history items outside the catalogue" in caplog.text
    assert [part.shape for part in knn.top([], k=5)] == [(0, 5), (0, 5)]


def test_target_positions():
    lengths = [6, 1, 2, 3]

    def pairs(*args):
        users, positions = target_positions(lengths, *args)
        return list(zip(users.tolist(), positions.tolist(), strict=True))

    assert pairs("test") == [(0, 5), (1, 0), (2, 1), (3, 2)]
    assert pairs("validation") == [(0, 4), (2, 0), (3, 1)]
    assert pairs("train", 0) == [(0, 1), (0, 2), (0, 3)]
    assert pairs("train", 2) == [(0, 2), (0, 3)]


def test_a_training_row_reads_only_its_past(lrurec):
    lists = make_lists(20)
    planted = [[*items[:-3], 29, 30, 28] for items in lists]
    # every row before the planted items, which are the last train item and both targets
    rows = [
        [
            row
            for row in lrurec.candidates(make_data(variant), k=5, train_positions=0).to_pylist()
            if row["split"] == "train" and row["position"] < len(lists[row["user"]]) - 3
        ]
        for variant in (lists, planted)
    ]
    assert rows[0]
    assert rows[0] == rows[1]


def test_small_catalogue_gives_shorter_lists_and_a_seen_target_is_unreachable():
    data = make_data([[1, 2, 3, 4], [1, 2, 2, 1]], 5)
    test = [row for row in Popularity.fit(data).candidates(data, k=20).to_pylist() if row["split"] == "test"]
    assert [row["items"] for row in test] == [[4, 5], [3, 4, 5]]  # ties: the lower item id first
    assert [(row["target_rank"], row["target_first"], row["target_tied"]) for row in test] == [(1, 1, 2), (0, 0, 0)]


def test_a_user_with_one_item():
    data = make_data([[2], [1, 2, 3, 1]], 3)
    rows = [row for row in ItemKNN.fit(data).candidates(data, k=2).to_pylist() if row["user"] == 0]
    assert [(row["split"], row["position"], row["items"]) for row in rows] == [("test", 0, [1, 2])]


def test_nobody_has_rows():
    data = make_data([[], []], 3)
    retriever = Popularity.fit(data)
    assert retriever.candidates(data).equals(CANDIDATES.empty_table())
    assert retriever.ranks(data).equals(RANKS.empty_table())


def test_refusals(lrurec, data):
    with pytest.raises(ValueError, match="another catalogue"):
        lrurec.candidates(make_data([[1, 2, 3]], 7))
    with pytest.raises(ValueError, match="k must be at least 1; got 0"):
        lrurec.candidates(data, k=0)
    with pytest.raises(ValueError, match="k must be at least 1; got 0"):
        lrurec.top([[1]], k=0)
    with pytest.raises(ValueError, match="train_positions must be at least 0; got -1"):
        lrurec.candidates(data, train_positions=-1)


def test_ties_rank_the_lower_id_first_everywhere():
    scores = torch.tensor([[9.0, 1, 2, 2, 2, 1], [9.0, 3, 3, 3, 3, 3]])
    seen = seen_places([[3], [1, 2]])
    hide(scores, seen)
    assert ranks_of(scores, torch.tensor([4, 5])).tolist() == [[2, 1, 2], [3, 1, 3]]
    assert ranks_of(scores, torch.tensor([5, 2])).tolist() == [[4, 3, 2], [0, 0, 0]]
    items, values = top_items(scores, 2)
    assert items.tolist() == [[2, 4], [3, 4]]
    assert values.tolist() == [[2, 2], [3, 3]]


def test_random_ties_agree_between_lists_and_ranks():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (200, 41), generator=generator).float()
    targets = torch.randint(1, 41, (200,), generator=generator)
    ranks, first, tied = ranks_of(hide(scores), targets).T
    own = scores[torch.arange(200), targets][:, None]
    assert torch.equal(first, (scores > own).sum(1) + 1) and torch.equal(tied, (scores == own).sum(1))
    assert ((first <= ranks) & (ranks < first + tied)).all()
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
        ranks_of(scores, torch.tensor([1]))
