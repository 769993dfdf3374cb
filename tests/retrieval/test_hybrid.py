import numpy as np
import pytest
import torch

from tests.retrieval.world import item_ids, make_lists
from ulmrec_hf.retrieval.hybrid import Hybrid, fit_combiner, pool, validation_pools
from ulmrec_hf.retrieval.item_knn import ItemKNN
from ulmrec_hf.retrieval.lrurec import LRURec
from ulmrec_hf.retrieval.popularity import Popularity
from ulmrec_hf.retrieval.topk import hide, seen_places, top_items
from ulmrec_hf.tables import Sequences


@pytest.fixture(scope="module")
def components(data):
    return [ItemKNN.fit(data), Popularity.fit(data)]


def make_pools(utility, users=1000, places=10, seed=0):
    """Places with random log-scores of three retrievers, and a target drawn by the softmax of `utility` of them."""
    generator = np.random.default_rng(seed)
    scores = generator.standard_normal((users, places, 3)).astype(np.float32)
    target = (utility(scores) + generator.gumbel(size=(users, places))).argmax(1)
    ranks = 1 + np.argsort(np.argsort(-scores, axis=1), axis=1)
    features = np.concatenate([scores, 1 / (1 + ranks)], 2).astype(np.float32)
    return {
        "features": torch.from_numpy(features),
        "real": torch.ones(users, places, dtype=bool),
        "target": torch.from_numpy(target),
    }


def loss_of(combiner, pools) -> float:
    with torch.inference_mode():
        return combiner.eval()(**pools)["loss"].item()


def test_weights_follow_what_predicts_the_target():
    pools = make_pools(lambda scores: scores @ [2.0, 0.0, -1.0])
    combiner = fit_combiner(pools, 0, seed=0)
    weights = (combiner.weights / combiner.scale[:3]).detach().numpy()
    np.testing.assert_allclose(weights, [2.0, 0.0, -1.0], atol=0.3)
    pools["features"][:, 5:] = 100.0  # places that hold nothing do not count
    pools["real"][:, 5:] = False
    inside = {name: values[pools["target"] < 5] for name, values in pools.items()}
    assert fit_combiner(inside, 0, seed=0).weights.abs().max() < 10


def test_the_network_learns_what_no_sum_says():
    def both(scores):
        return 3.0 * ((scores[..., 0] > 0) == (scores[..., 1] > 0))

    taught, unseen = make_pools(both), make_pools(both, seed=1)
    assert loss_of(fit_combiner(taught, 32, seed=0), unseen) < 0.9 * loss_of(fit_combiner(taught, 0, seed=0), unseen)


@pytest.mark.parametrize("noise_seed", [0, 1, 2])
def test_the_network_stays_only_where_it_helps_users_that_taught_nothing(noise_seed):
    pools = make_pools(lambda scores: 0 * scores[..., 0], users=300, seed=noise_seed)
    combiner = fit_combiner(pools, 32, seed=0)
    taught, held_out = ({name: values[rows] for name, values in pools.items()} for rows in _fifths(300))
    if combiner.network is None:
        assert torch.equal(combiner.weights, fit_combiner(pools, 0, seed=0).weights)
    else:
        assert loss_of(combiner, held_out) < loss_of(fit_combiner(taught, 0, seed=0), held_out)


def _fifths(users):
    rows = torch.arange(users)
    return rows[rows % 5 > 0], rows[rows % 5 == 0]


def test_the_pool_holds_each_unseen_item_once_with_its_ranks(components):
    histories = [[1, 2, 3], [4]]
    scores = [component.log_scores(histories) for component in components]
    items, features, real = pool([part.clone() for part in scores], seen_places(histories))
    assert features.shape == (*items.shape, 4)
    for row, history in enumerate(histories):
        kept = items[row, real[row]]
        assert kept.tolist() == [item for item in range(1, 31) if item not in history]
        for place, part in enumerate(scores):
            torch.testing.assert_close(features[row, real[row], place], part[row, kept])
            order = part[row, kept].sort(descending=True, stable=True).indices
            torch.testing.assert_close(1 / features[row, real[row], 2 + place][order], torch.arange(2.0, 2 + len(kept)))


def test_the_target_is_marked_and_unreachable_ones_are_left_out(components, sequences):
    pools = validation_pools(components, sequences, 20)
    users = np.linspace(0, len(sequences) - 1, 20).astype(int)
    reachable = [user for user in users if sequences[user][-2] not in sequences[user][:-2]]
    assert len(pools["target"]) == len(reachable)
    popularity = components[1].log_scores([[]])[0]
    for row, user in enumerate(reachable):
        place = pools["target"][row]
        assert pools["real"][row, place]
        assert pools["features"][row, place, 1] == pytest.approx(popularity[sequences[user][-2]].item())


def test_few_users_fit_weights_alone(components, sequences):
    hybrid = Hybrid.combine(components, sequences)
    assert hybrid.combiner.network is None and hybrid.config.network_size == 0
    histories = [[1, 2, 3], [7], []]
    parts = [component.log_scores(histories)[:, 1:] for component in components]
    total = sum(weight * part for weight, part in zip(hybrid.weights.values(), parts, strict=True))
    scores = hybrid.score(histories)[:, 1:]
    for row, history in enumerate(histories):  # the whole small catalogue is in the pool, the history follows
        unseen = [item for item in range(30) if item + 1 not in history]
        assert torch.equal(scores[row, unseen].argsort(), total[row, unseen].argsort())
        assert all(scores[row, item - 1] < scores[row, unseen].min() for item in history)
    assert hybrid.weights["item_knn"] > hybrid.weights["popularity"]  # the world is sequential


def test_items_outside_the_pool_follow_by_the_weighted_sum(components, sequences, monkeypatch):
    hybrid = Hybrid.combine(components, sequences)
    whole = hybrid.score([[1, 2, 3]])[0]
    monkeypatch.setattr("ulmrec_hf.retrieval.hybrid._POOL", 4)
    few = hybrid.score([[1, 2, 3]])[0]
    parts = [hide(part.log_scores([[1, 2, 3]]), seen_places([[1, 2, 3]])) for part in components]
    inside = torch.zeros(31, dtype=bool)
    inside[torch.cat([top_items(part, 4)[0][0] for part in parts])] = True
    outside = ~inside & (torch.arange(31) > 3)
    assert few[inside].min() > few[outside].max()
    for places in (inside, outside):
        assert torch.equal(few[places].argsort(), whole[places].argsort())


def test_test_targets_are_not_read(components, sequences):
    lists = [[*items[:-1], 1 + items[-1] % 30] for items in make_lists()]
    other = Sequences.from_lists(lists, item_ids())
    assert Hybrid.combine(components, other).weights == Hybrid.combine(components, sequences).weights


def test_components_are_fitted_as_they_are_alone(data):
    settings = {"hidden_size": 16, "epochs": 2, "knn_window": 3}
    hybrid = Hybrid.fit(data, hybrid_components=["item_knn", "lrurec"], **settings)
    alone = [ItemKNN.fit(data, **settings), LRURec.fit(data, **settings)]
    for part, other in zip(hybrid.components, alone, strict=True):
        assert torch.equal(part.score([[1, 2, 3]]), other.score([[1, 2, 3]]))
    assert hybrid.training_history == alone[1].training_history != []
    assert [(epoch["retriever"], epoch["epoch"]) for epoch in hybrid.training_history] == [("lrurec", 1), ("lrurec", 2)]


def test_refusals(components, sequences):
    with pytest.raises(ValueError, match="different names; got item_knn, item_knn"):
        Hybrid.combine([components[0], components[0]], sequences)
    with pytest.raises(ValueError, match="another catalogue"):
        Hybrid.combine(components, Sequences.from_lists(make_lists(), item_ids(31)))
    with pytest.raises(ValueError, match="no user has a validation target"):
        Hybrid.combine(components, Sequences.from_lists([[1, 2]], item_ids()))
