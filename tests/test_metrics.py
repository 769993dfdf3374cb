import itertools
import math
import subprocess
import sys

import numpy as np
import pytest

from ulmrec_hf import metrics
from ulmrec_hf.metrics import (
    METRICS,
    Metric,
    Places,
    bootstrap_interval,
    candidate_places,
    paired_bootstrap,
    per_user_metrics,
    places_from_scores,
    random_order_metrics,
    ranking_metrics,
    top_k_places,
)

NAMES = {"recall@5", "ndcg@5", "mrr@5", "recall@10", "ndcg@10", "mrr@10"}


def test_ranks_without_ties_are_the_places_in_descending_order():
    scores = np.random.default_rng(0).permuted(np.tile(np.arange(20, dtype=np.float32), (50, 1)), axis=1)
    labels = np.arange(50) % 20
    places = (-scores).argsort(1).argsort(1) + 1
    first, last, _ = places_from_scores(scores, labels)
    assert first.dtype == last.dtype == np.float64
    np.testing.assert_array_equal(first, places[np.arange(50), labels])
    np.testing.assert_array_equal(last, first)


def test_a_target_stands_at_any_place_of_its_tie():
    scores = np.array([[1, 1, 0], [1, 1, 1], [2, 1, 1], [0, 0, 3]], dtype=np.float32)
    first, last, _ = places_from_scores(scores, [0, 2, 1, 1])
    assert (first.tolist(), last.tolist()) == ([1, 1, 2, 2], [2, 3, 3, 3])


@pytest.fixture
def rbp(monkeypatch):
    """A metric of a user's own, which does not vanish past k."""
    monkeypatch.setattr(METRICS, "_entries", dict(METRICS._entries))  # forgets what is registered here
    METRICS.register("rbp")(Metric("rbp", "RBP", lambda ranks, k: 1 / (k + ranks)))


def all_orders(scores, label, shown=math.inf):
    """The mean of every metric over all orders of the items in which scores descend; past `shown` is a miss."""
    ranks = []
    for order in itertools.permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            rank = order.index(label) + 1
            ranks.append(rank if rank <= shown else math.inf)
    return {name: values.mean() for name, values in per_user_metrics(ranks, ks=(2, 5)).items()}


@pytest.mark.parametrize("scores", [[3, 2, 2, 2, 1, 1, 0], [0] * 7, [5, 4, 4, 3, 3, 3, 3], [1, 1, 0, 0, 0, 0, 0]])
def test_metrics_of_ties_are_the_mean_over_all_their_orders(rbp, scores):
    for label in range(len(scores)):
        values = per_user_metrics(places_from_scores([scores], [label]), ks=(2, 5))
        for name, expected in all_orders(scores, label).items():
            assert values[name][0] == pytest.approx(expected, abs=1e-12), (name, label)


@pytest.mark.parametrize("k", [1, 3, 4, 7])
def test_ties_across_the_end_of_a_list(rbp, k):
    """A catalogue's top k counts the places inside; candidates that are given tie among themselves."""
    scores, rank = [5, 4, 4, 3, 3, 3, 3], [1, 2, 3, 4, 5, 6, 7]  # of tied items the first is the lower id
    first, tied = [1, 2, 2, 4, 4, 4, 4], [1, 2, 2, 4, 4, 4, 4]
    own = per_user_metrics(top_k_places(first, tied, k), ks=(2, 5))
    given = per_user_metrics(candidate_places(rank, first, tied, k), ks=(2, 5))
    for label in range(7):
        for name, expected in all_orders(scores, label, shown=k).items():
            assert own[name][label] == pytest.approx(expected, abs=1e-12), (name, label)
        among = all_orders(scores[:k], label) if label < k else dict.fromkeys(own, 0)
        for name, expected in among.items():
            assert given[name][label] == pytest.approx(expected, abs=1e-12), (name, label)
    assert (top_k_places([0], [0]).first, candidate_places([0], [0], [0], 5).first) == (math.inf, math.inf)


def test_a_constant_scorer_equals_random(rbp):
    counts, labels = np.array([20, 20, 7, 1, 20, 3]), np.array([0, 19, 3, 0, -1, 2])
    scores = np.where(np.arange(20) < counts[:, None], np.float32(0.25), -np.inf)
    expected = random_order_metrics(counts, labels)
    constant = per_user_metrics(places_from_scores(scores, labels))
    assert set(constant) == NAMES | {"rbp@5", "rbp@10"}
    for name, values in constant.items():
        np.testing.assert_allclose(values, expected[name], atol=1e-12, rtol=0)
    assert constant["recall@10"].tolist() == [0.5, 0.5, 1, 1, 0, 1]
    measured = metrics.RankingMetrics().compute(predictions=scores, references=labels)
    assert measured == pytest.approx({name: values.mean() for name, values in expected.items()}, abs=1e-12)


def test_a_miss_ranks_at_infinity_and_counts_zero():
    ranks = places_from_scores(np.array([[1.0, 2.0]], dtype=np.float32), [-1])
    assert ranks.first[0] == ranks.last[0] == math.inf
    assert set(ranking_metrics(ranks).values()) == {0.0}


def test_padding_neither_beats_nor_ties():
    scores = np.array([[-1, -np.inf, -np.inf, -2]], dtype=np.float32)
    assert places_from_scores(scores, [3])[:2] == ([2], [2])
    masked = np.array([[3, 1, 1, np.nan]], dtype=np.float32)
    assert places_from_scores(masked, [1], valid=[[False, True, False, False]])[:2] == ([1], [1])


@pytest.mark.parametrize(
    ("scores", "labels", "valid", "message"),
    [
        ([[1.0, np.nan]], [0], None, "scores hold 1 NaN, the first in row 0"),
        ([[1.0, 2.0], [1.0, 2.0]], [0, 2], None, "label 2 of row 1 is not -1 or a column of the 2 candidates"),
        ([[1.0, 2.0]], [-2], None, "label -2 of row 0"),
        ([[1.0, -np.inf]], [1], None, "label 1 of row 0 points at padding"),
        ([[1.0, 2.0]], [1], [[True, False]], "points at padding"),
        ([[1.0, 2.0]], [0, 1], None, r"got shapes \(1, 2\) and \(2,\)"),
        ([1.0, 2.0], [0, 1], None, "scores must be"),
        ([[1.0, 2.0]], [0], [True, True], "valid must have the shape of scores"),
    ],
)
def test_bad_scores_are_named(scores, labels, valid, message):
    with pytest.raises(ValueError, match=message):
        places_from_scores(np.array(scores, dtype=np.float32), labels, valid)


def test_per_user_metrics():
    values = per_user_metrics([1, 3, 5, 6, 10, 11, math.inf])
    assert set(values) == NAMES
    np.testing.assert_array_equal(values["recall@5"], [1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(values["recall@10"], [1, 1, 1, 1, 1, 0, 0])
    np.testing.assert_allclose(values["ndcg@10"], [1, 0.5, 1 / math.log2(6), 1 / math.log2(7), 1 / math.log2(11), 0, 0])
    np.testing.assert_allclose(values["mrr@5"], [1, 1 / 3, 1 / 5, 0, 0, 0, 0])


def test_ranks_below_one_or_nan_are_refused():
    bad = [Places(np.array([first]), np.array([last])) for first, last in ((2.0, 1.0), (1.0, math.inf), (0.0, 2.0))]
    for ranks in ([0], [math.nan], *bad):
        with pytest.raises(ValueError, match="1-based"):
            per_user_metrics(ranks)


def test_metrics_agree_with_scikit_learn():
    from sklearn.metrics import ndcg_score

    generator = np.random.default_rng(1)
    scores = generator.normal(size=(200, 20)).astype(np.float32)
    labels = generator.integers(20, size=200)
    expected = ndcg_score(np.eye(20)[labels], scores, k=10)
    assert ranking_metrics(places_from_scores(scores, labels))["ndcg@10"] == pytest.approx(expected)


def test_no_users_have_no_metrics():
    assert all(math.isnan(value) for value in ranking_metrics([]).values())
    assert all(math.isnan(value) for value in bootstrap_interval([]))


def test_random_order_of_twenty_candidates():
    values = random_order_metrics(20, np.array([0, 7, -1]))
    assert set(values) == NAMES
    np.testing.assert_allclose(values["ndcg@10"], [0.2272, 0.2272, 0], atol=5e-5)
    np.testing.assert_allclose(values["recall@10"], [0.5, 0.5, 0])


def test_random_order_is_the_mean_over_all_orders():
    for count in (1, 3, 7, 12):
        values = random_order_metrics([count], [0])
        for name, value in ranking_metrics(np.arange(1, count + 1)).items():
            assert values[name][0] == pytest.approx(value)


def test_a_registered_metric_is_computed_everywhere(monkeypatch):
    monkeypatch.setattr(METRICS, "_entries", dict(METRICS._entries))  # forgets what is registered here
    METRICS.register("first")(Metric("first", "First", lambda ranks, k: (ranks == 1).astype(float)))
    assert list(per_user_metrics([1, 2], ks=[5])) == ["recall@5", "ndcg@5", "mrr@5", "first@5"]
    assert ranking_metrics([1, 2, math.inf, 1])["first@10"] == 0.5
    assert random_order_metrics(20, np.array([3]))["first@5"] == pytest.approx(1 / 20)
    assert metrics.RankingMetrics().compute(predictions=[[0.0, 1.0]], references=[1])["first@5"] == 1
    with pytest.raises(ValueError, match="metric 'first' exists already"):
        METRICS.register("first")(None)


def test_random_order_with_candidates_of_different_number():
    values = random_order_metrics([0, 5, 20], [-1, 4, 3])
    np.testing.assert_allclose(values["recall@5"], [0, 1, 0.25])
    with pytest.raises(ValueError, match="label 5 of row 1 is not a column of its 5 candidates"):
        random_order_metrics([5, 5], [0, 5])


def test_bootstrap_matches_the_normal_interval():
    values = np.random.default_rng(0).normal(size=2000)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert (low, high) == bootstrap_interval(values)
    assert (low, high) != bootstrap_interval(values, seed=1)


def test_bootstrap_in_chunks_equals_bootstrap_at_once(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    whole = bootstrap_interval(values, samples=101)
    monkeypatch.setattr(metrics, "_CELLS", 500)  # ten samples a chunk
    assert bootstrap_interval(values, samples=101) == pytest.approx(whole, abs=1e-12)


def test_bootstrap_covers_the_mean():
    """Of 300 samples from one distribution, about 95 % of the intervals hold its mean."""
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(300):
        ranks = np.where(generator.random(150) < 0.3, math.inf, generator.integers(1, 21, size=150))
        low, high = bootstrap_interval(per_user_metrics(ranks)["recall@10"], samples=400)
        covered += low <= 0.35 <= high
    assert 0.91 <= covered / 300 <= 0.99


def test_bad_bootstrap_arguments():
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval([1.0, math.inf])
    with pytest.raises(ValueError, match="level=95"):
        bootstrap_interval([1.0], level=95)
    with pytest.raises(ValueError, match="same users"):
        paired_bootstrap([1.0], [1.0, 2.0])


def test_pairing_is_narrower_than_two_intervals_apart():
    generator = np.random.default_rng(0)
    a = generator.random(500)
    difference, low, high = paired_bootstrap(a + 0.01, a + generator.normal(scale=0.01, size=500))
    assert difference == pytest.approx(0.01, abs=0.002)
    assert 0 < low < difference < high
    apart = bootstrap_interval(a)
    assert high - low < 0.1 * (apart[1] - apart[0])


def test_ranking_metrics_in_evaluate():
    from ulmrec_hf.metrics import RankingMetrics

    generator = np.random.default_rng(0)
    scores = generator.normal(size=(64, 20)).astype(np.float32)
    scores[:, 15:] = -np.inf
    labels = generator.integers(-1, 15, size=64)
    expected = ranking_metrics(places_from_scores(scores, labels))
    assert RankingMetrics().compute(predictions=scores, references=labels) == pytest.approx(expected)

    metric = RankingMetrics()
    for start in range(0, 64, 10):
        metric.add_batch(predictions=scores[start : start + 10], references=labels[start : start + 10])
    assert metric.compute() == pytest.approx(expected)
    assert set(metric.compute(predictions=scores, references=labels, ks=(1,))) == {"recall@1", "ndcg@1", "mrr@1"}

    ragged = [row[np.isfinite(row)].tolist() for row in scores]
    assert RankingMetrics().compute(predictions=ragged, references=labels.tolist()) == pytest.approx(expected)


def test_ranking_metrics_of_nothing():
    from ulmrec_hf.metrics import RankingMetrics

    for given in ({}, {"predictions": [], "references": []}, {"predictions": np.zeros((0, 20)), "references": []}):
        result = RankingMetrics().compute(**given)
        assert set(result) == NAMES
        assert all(math.isnan(value) for value in result.values())


def test_ranking_metrics_combines_with_other_metrics():
    import evaluate

    from ulmrec_hf.metrics import RankingMetrics

    result = evaluate.combine([RankingMetrics()]).compute(predictions=[[0.0, 1.0]], references=[1])
    assert result["ndcg@10"] == 1.0


def test_the_pure_functions_do_not_import_evaluate():
    code = "import sys, ulmrec_hf.metrics; assert not {'evaluate', 'datasets', 'torch', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        metrics.Nothing  # noqa: B018
