"""Ranks and what is counted from them: the metrics, their intervals, and `RankingMetrics` for `evaluate`.

Every user has one relevant item, so with r its 1-based rank: Recall@k = [r <= k], NDCG@k = [r <= k] / log2(1 + r),
MRR@k = [r <= k] / r. A user whose target is not among the candidates has rank infinity and counts 0 everywhere.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from .protocol import MISS
from .registry import Registry

if TYPE_CHECKING:
    import evaluate


@dataclass(frozen=True)
class Metric:
    """What a user counts whose target has a given rank; higher is better.

    Args:
        name: in the keys `<name>@<k>` of metrics.json; the name in `METRICS` too.
        title: in tables and plots, followed by `@<k>`.
        of_rank: from 1-based ranks, float64 [users] (may be fractional after ties, inf = miss), and k to float64
            [users]; a miss must count 0.
    """

    name: str
    title: str
    of_rank: Callable[[np.ndarray, int], np.ndarray]


METRICS = Registry(
    "metric",
    recall=Metric("recall", "Recall", lambda ranks, k: (ranks <= k).astype(np.float64)),
    ndcg=Metric("ndcg", "NDCG", lambda ranks, k: (ranks <= k) / np.log2(1 + ranks)),
    mrr=Metric("mrr", "MRR", lambda ranks, k: (ranks <= k) / ranks),
)
KS = (5, 10)
_CELLS = 4_000_000  # how many resampled counts are held at once: 32 MB


def ranks_from_scores(scores: ArrayLike, labels: ArrayLike, valid: ArrayLike | None = None) -> np.ndarray:
    """The 1-based rank of each label's score among the scores of its row; ties share the mean of their places.

    Args:
        scores: float [users, candidates], higher is better. A score of -inf marks padding.
        labels: int [users], the target's column, or -1 where the target is not among the candidates.
        valid: bool [users, candidates], False marks padding too.

    Returns:
        float64 [users]; inf for a label of -1. The mean place of a tie may be fractional (two at the top: 1.5).

    Raises:
        ValueError: scores that are NaN, shapes that do not fit, or a label that is out of range or points at padding.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise ValueError(
            f"scores must be [users, candidates] and labels [users]; got shapes {scores.shape} and {labels.shape}."
        )
    real = scores > -np.inf
    if valid is not None:
        valid = np.asarray(valid, dtype=bool)
        if valid.shape != scores.shape:
            raise ValueError(f"valid must have the shape of scores, {scores.shape}; got {valid.shape}.")
        real &= valid
    nan = np.isnan(scores) if valid is None else np.isnan(scores) & valid
    if nan.any():
        raise ValueError(
            f"scores hold {int(nan.sum())} NaN, the first in row {int(nan.any(1).argmax())}: no order exists."
        )
    bad = (labels < MISS) | (labels >= scores.shape[1])
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"label {labels[row]} of row {row} is not -1 or a column of the {scores.shape[1]} candidates.")

    ranks = np.full(len(labels), np.inf)
    hit = np.flatnonzero(labels != MISS)
    columns = labels[hit].astype(np.int64)
    if not real[hit, columns].all():
        row = int(hit[(~real[hit, columns]).argmax()])
        raise ValueError(f"label {labels[row]} of row {row} points at padding: its score is -inf or not valid.")
    target = scores[hit, columns][:, None]
    better = ((scores[hit] > target) & real[hit]).sum(1)
    equal = ((scores[hit] == target) & real[hit]).sum(1)  # counts the target itself
    ranks[hit] = better + (equal + 1) / 2
    return ranks


def pad_scores(lists: Sequence[Sequence[float]]) -> np.ndarray:
    """Scores of each row's candidates as float32 [rows, most candidates], -inf past a row's own."""
    scores = np.full((len(lists), max(map(len, lists), default=0)), -np.inf, np.float32)
    for row, values in zip(scores, lists, strict=True):
        row[: len(values)] = values
    return scores


def top_k_ranks(ranks: ArrayLike, k: int) -> np.ndarray:
    """Ranks in the whole catalogue (0 = unreachable) as ranks in the top k, float64: past it is a miss, infinity."""
    ranks = np.asarray(ranks, dtype=np.float64)
    return np.where((ranks >= 1) & (ranks <= k), ranks, np.inf)


def per_user_metrics(ranks: ArrayLike, ks: Sequence[int] = KS) -> dict[str, np.ndarray]:
    """`<name>@<k>` of each of `METRICS` for each user, float64 [users], from 1-based ranks (inf = miss).

    Raises:
        ValueError: a rank below 1 or NaN.
    """
    ranks = np.asarray(ranks, dtype=np.float64)
    if not (ranks >= 1).all():
        raise ValueError("ranks are 1-based: every rank must be at least 1, or inf for a miss.")
    return {f"{metric.name}@{k}": metric.of_rank(ranks, k) for k in ks for metric in METRICS.values()}


def ranking_metrics(ranks: ArrayLike, ks: Sequence[int] = KS) -> dict[str, float]:
    """The means over users of `per_user_metrics`; NaN where there are no users."""
    return {name: mean(values) for name, values in per_user_metrics(ranks, ks).items()}


def random_order_metrics(num_candidates: ArrayLike, labels: ArrayLike, ks: Sequence[int] = KS) -> dict[str, np.ndarray]:
    """The exact expectation of `per_user_metrics` under a uniformly random order of the candidates.

    Args:
        num_candidates: int [users], or one number for all: how many candidates are ordered.
        labels: int [users]; -1 (a miss) expects 0, the place of any other label does not matter.
    """
    labels = np.asarray(labels)
    counts = np.broadcast_to(np.asarray(num_candidates, dtype=np.int64), labels.shape)
    if (labels >= counts).any():
        row = int((labels >= counts).argmax())
        raise ValueError(f"label {labels[row]} of row {row} is not a column of its {counts[row]} candidates.")
    # Each place 1..c has probability 1/c: the expectation is the sum of a metric over the places, divided by c.
    places = per_user_metrics(np.arange(1, counts.max(initial=0) + 1), ks)
    chance = (labels != MISS) / np.maximum(counts, 1)
    return {name: np.concatenate([[0.0], values.cumsum()])[counts] * chance for name, values in places.items()}


def bootstrap_interval(
    values: ArrayLike, seed: int = 0, samples: int = 2000, level: float = 0.95
) -> tuple[float, float] | tuple[np.ndarray, np.ndarray]:
    """The percentile bootstrap interval (low, high) of the mean over users; NaN without users.

    Drawing users with replacement is drawing, from a multinomial, how often each distinct row of `values` occurs. The
    metrics of a rank take few distinct values, so that this is fast for any number of users.

    Args:
        values: float [users], or [users, metrics] for several metrics on the same draws.
        seed, samples: of the draws, and how many.
        level: the share of the draws inside the interval.

    Returns:
        Two floats, or two float64 arrays [metrics].
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim not in (1, 2) or not np.isfinite(values).all():
        raise ValueError(f"bootstrap values must be finite, [users] or [users, metrics]; got shape {values.shape}.")
    if samples < 1 or not 0 < level < 1:
        raise ValueError(f"bootstrap needs samples >= 1 and 0 < level < 1; got samples={samples}, level={level}.")
    table = values if values.ndim == 2 else values[:, None]
    if len(values):
        generator = np.random.default_rng(seed)
        distinct, counts = np.unique(table, axis=0, return_counts=True)
        chunk = max(1, _CELLS // len(distinct))
        means = [
            generator.multinomial(len(values), counts / len(values), size=min(chunk, samples - start)) @ distinct
            for start in range(0, samples, chunk)
        ]
        low, high = np.quantile(np.concatenate(means) / len(values), [(1 - level) / 2, (1 + level) / 2], axis=0)
    else:
        low = high = np.full(table.shape[1], np.nan)
    return (low, high) if values.ndim == 2 else (float(low[0]), float(high[0]))


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, seed: int = 0, samples: int = 2000, level: float = 0.95
) -> tuple[float, float, float] | tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean of `a - b` over the same users, with its bootstrap interval: (difference, low, high).

    Args:
        a, b: float [users] or [users, metrics], in the same order of users.
        seed, samples, level: see `bootstrap_interval`.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a paired comparison needs the same users on both sides; got shapes {a.shape} and {b.shape}.")
    return mean(a - b), *bootstrap_interval(a - b, seed, samples, level)


def mean(values: ArrayLike) -> float | np.ndarray:
    """The mean over users; NaN, without a warning, of nothing."""
    values = np.asarray(values, dtype=np.float64)
    means = values.mean(axis=0) if len(values) else np.full(values.shape[1:], np.nan)
    return float(means) if values.ndim == 1 else means


@functools.cache
def _load_ranking_metrics() -> type["evaluate.Metric"]:
    # `evaluate` takes seconds to import, so the class that subclasses it is made when first asked for.
    import datasets
    import evaluate

    class RankingMetrics(evaluate.Metric):
        """The `METRICS` of candidate scores, as an `evaluate` metric; no hub, no network.

        Predictions are the candidates' scores (float32, higher is better, lengths may differ), references the
        target's position (int32, -1 = not among the candidates). Without any rows the metrics are NaN. Batches are
        kept in memory by default, unless several processes are asked for.
        """

        def __init__(self, *args, keep_in_memory: bool | None = None, num_process: int = 1, **kwargs):
            if keep_in_memory is None:
                keep_in_memory = num_process == 1
            super().__init__(*args, keep_in_memory=keep_in_memory, num_process=num_process, **kwargs)

        def _info(self) -> evaluate.MetricInfo:
            return evaluate.MetricInfo(
                description="Recall@k, NDCG@k, MRR@k and what else is registered, of one relevant candidate a user.",
                citation="",
                inputs_description="predictions: scores of the candidates; references: the target's position or -1.",
                features=datasets.Features(
                    {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int32")}
                ),
            )

        def compute(
            self, *, predictions=None, references=None, ks: Sequence[int] = KS, **kwargs
        ) -> dict[str, float] | None:
            """The metrics of all rows added so far and of these; see `ulmrec_hf.metrics.ranking_metrics`."""
            if self.writer is None and (predictions is None or len(predictions) == 0):
                # `evaluate` has no table to read when no row was ever added.
                return self._compute([], [], ks=ks)
            return super().compute(predictions=predictions, references=references, ks=ks, **kwargs)

        def _compute(self, predictions, references, ks: Sequence[int] = KS) -> dict[str, float]:
            labels = np.asarray(references, dtype=np.int64)
            return ranking_metrics(ranks_from_scores(pad_scores(predictions), labels), ks)

    RankingMetrics.__qualname__ = "RankingMetrics"
    return RankingMetrics


def __getattr__(name: str) -> type["evaluate.Metric"]:
    if name == "RankingMetrics":
        return _load_ranking_metrics()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
