import json

import numpy as np
import pytest

from tests.retrieval.world import make_tables, with_targets
from ulmrec_hf.metrics import ranking_metrics, top_k_places
from ulmrec_hf.retrieval.item_knn import ItemKNN
from ulmrec_hf.tables import LeaveOneOut

PLAIN = {"knn_window": 2, "knn_backward_weight": 0.5, "knn_recency": 0.5, "knn_popularity_exponent": 0.0}


def test_weights_are_inverse_distances_within_the_window():
    data = with_targets([[1, 2, 3, 4]], 4)
    weights = ItemKNN.fit(data, **PLAIN).weights.toarray()
    expected = np.zeros((5, 5))
    expected[1, 2:4] = expected[2, 3:5] = [1, 0.5]
    expected[3, 4] = 1
    np.testing.assert_allclose(weights, expected + 0.5 * expected.T)


def test_pairs_do_not_cross_users_and_repeats_are_no_neighbours():
    data = with_targets([[1, 1], [2], [3, 4]], 4)
    weights = ItemKNN.fit(data, **PLAIN).weights.toarray()
    assert {tuple(place) for place in np.argwhere(weights).tolist()} == {(3, 4), (4, 3)}


def test_recency_and_popularity_exponent():
    data = with_targets([[1, 3], [2, 4], [2]], 4)
    scores = ItemKNN.fit(data, **PLAIN).score([[1, 2]])[0]
    np.testing.assert_allclose(scores[3:], [0.5, 1.0], atol=1e-5)  # 3 follows the older item
    scores = ItemKNN.fit(data, **{**PLAIN, "knn_popularity_exponent": 2.0}).score([[1, 2]])[0]
    np.testing.assert_allclose(scores[3:], [0.5, 0.25], atol=1e-5)  # item 2 occurs twice


def test_items_without_neighbours_follow_by_popularity():
    data = with_targets([[1, 2], [3], [4], [4]], 4)
    scores = ItemKNN.fit(data).score([[1]])[0]
    assert scores[1:].argsort(descending=True).tolist()[:3] == [1, 3, 0]


def test_folding_changes_nothing(monkeypatch, data):
    whole = ItemKNN.fit(data)
    monkeypatch.setattr("ulmrec_hf.retrieval.item_knn._FOLD", 10)
    np.testing.assert_allclose(ItemKNN.fit(data).weights.toarray(), whole.weights.toarray(), rtol=1e-6)


@pytest.mark.data
def test_beauty(shared):
    """The paper's data and split: a published-strength baseline in seconds."""
    import gzip

    with gzip.open(shared / "data/amazon_beauty_2014/sequences.jsonl.gz", "rt", encoding="utf-8") as file:
        lists = [json.loads(line)["asins"] for line in file]
    ids = sorted({item for items in lists for item in items})
    dense = {item: number for number, item in enumerate(ids, 1)}
    data = LeaveOneOut(make_tables([[dense[item] for item in items] for items in lists], ids))
    ranks = ItemKNN.fit(data).ranks(data, ["test"])
    metrics = ranking_metrics(top_k_places(ranks["rank"], ranks["tied"]), ks=(10,))
    assert metrics["ndcg@10"] >= 0.0514
    assert metrics["recall@10"] >= 0.0831
