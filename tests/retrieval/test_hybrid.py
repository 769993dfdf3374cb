import numpy as np
import pytest
import torch

from tests.retrieval.world import item_ids, make_lists
from ulmrec_hf.retrieval.base import Sequences
from ulmrec_hf.retrieval.hybrid import HybridRetriever, fit_weights, validation_pool
from ulmrec_hf.retrieval.item_knn import ItemKNNRetriever
from ulmrec_hf.retrieval.popularity import PopularityRetriever


@pytest.fixture(scope="module")
def components(sequences):
    train = sequences.train_part()
    return [ItemKNNRetriever.fit(train), PopularityRetriever.fit(train)]


def test_weights_follow_what_predicts_the_target():
    generator = np.random.default_rng(0)
    features = generator.standard_normal((400, 10, 3)).astype(np.float32)
    utility = features @ [2.0, 0.0, -1.0] + generator.gumbel(size=(400, 10))
    best = utility.argmax(1)
    rows = np.arange(400)
    features[rows, 0], features[rows, best] = features[rows, best], features[rows, 0].copy()
    weights = fit_weights(features, np.ones((400, 10), bool))
    np.testing.assert_allclose(weights, [2.0, 0.0, -1.0], atol=0.3)
    features[:, 5:] = 100.0  # places that hold nothing do not count
    real = np.arange(10) < 5
    assert np.abs(fit_weights(features, np.broadcast_to(real, (400, 10)))).max() < 10


def test_the_pool_holds_the_target_first_and_no_item_twice_or_seen(components, sequences):
    features, real = validation_pool(components, sequences, 20)
    assert features.shape[2] == 2 and real[:, 0].all()
    popularity = components[1].log_scores([[]])[0]
    users = np.linspace(0, len(sequences) - 1, 20).astype(int)
    reachable = [user for user in users if sequences[user][-2] not in sequences[user][:-2]]
    assert len(features) == len(reachable)
    for row, user in enumerate(reachable):
        history, target = sequences[user][:-2], sequences[user][-2]
        assert features[row, 0, 1] == pytest.approx(popularity[target].item())
        assert real[row].sum() == sequences.num_items - len(np.unique(history))  # the pool is the small catalogue


def test_scores_are_the_weighted_sum(components, sequences):
    hybrid = HybridRetriever.fit(components, sequences)
    histories = [[1, 2, 3], [7], []]
    parts = [component.log_scores(histories)[:, 1:] for component in components]
    expected = sum(weight * part for weight, part in zip(hybrid.config.weights, parts, strict=True))
    torch.testing.assert_close(hybrid.score(histories)[:, 1:], expected)
    assert hybrid.config.weights[0] > hybrid.config.weights[1]  # the world is sequential


def test_test_targets_are_not_read(components, sequences):
    lists = [[*items[:-1], 1 + items[-1] % 30] for items in make_lists()]
    other = Sequences.from_lists(lists, item_ids())
    assert HybridRetriever.fit(components, other).config.weights == pytest.approx(
        HybridRetriever.fit(components, sequences).config.weights, abs=0
    )


def test_refusals(components, sequences):
    with pytest.raises(ValueError, match="different names; got item_knn, item_knn"):
        HybridRetriever.fit([components[0], components[0]], sequences)
    with pytest.raises(ValueError, match="another catalogue"):
        HybridRetriever.fit(components, Sequences.from_lists(make_lists(), item_ids(31)))
    with pytest.raises(ValueError, match="no user has a validation target"):
        HybridRetriever.fit(components, Sequences.from_lists([[1, 2]], item_ids()))
