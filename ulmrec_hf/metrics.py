"""Ranks and what is counted from them: the metrics, their intervals, and `RankingMetrics` for `evaluate`.

Every user has one relevant item, so with r its 1-based rank: Recall@k = [r <= k], NDCG@k = [r <= k] / log2(1 + r),
MRR@k = [r <= k] / r. A user whose target is not among the candidates has rank infinity and counts 0 everywhere. Where
scores tie, every metric is its expectation over the orders of the tied (McSherry and Najork, ECIR 2008).
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

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
        of_rank: from 1-based ranks, float64 [ranks] (inf = miss), and k to float64 [ranks], each from its rank alone;
            a miss must count 0.
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


class Places(NamedTuple):
    """Where each user's target stands: at every place from the first to the last with equal probability.

    Attributes:
        first, last: 1-based, float64 [users], equal where nothing ties; inf for a miss.
        limit: places past it are misses, for a list that ends there.
    """

    first: np.ndarray
    last: np.ndarray
    limit: float = math.inf


def places_from_scores(scores: ArrayLike, labels: ArrayLike, valid: ArrayLike | None = None) -> Places:
    """The places of each label's score among the scores of its row.

    Args:
        scores: float [users, candidates], higher is better. A score of -inf marks padding.
        labels: int [users], the target's column, or -1 where the target is not among the candidates.
        valid: bool [users, candidates], False marks padding too.

    Returns:
        The places of the scores that equal the label's (two at the top: 1 to 2); a miss for a label of -1.

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

    first, last = np.full((2, len(labels)), np.inf)
    hit = np.flatnonzero(labels != MISS)
    columns = labels[hit].astype(np.int64)
    if not real[hit, columns].all():
        row = int(hit[(~real[hit, columns]).argmax()])
        raise ValueError(f"label {labels[row]} of row {row} points at padding: its score is -inf or not valid.")
    target = scores[hit, columns][:, None]
    first[hit] = ((scores[hit] > target) & real[hit]).sum(1) + 1
    last[hit] = ((scores[hit] >= target) & real[hit]).sum(1)  # counts the target itself
    return Places(first, last)


def pad_scores(lists: Sequence[Sequence[float]]) -> np.ndarray:
    """Scores of each row's candidates as float32 [rows, most candidates], -inf past a row's own."""
    scores = np.full((len(lists), max(map(len, lists), default=0)), -np.inf, np.float32)
    for row, values in zip(scores, lists, strict=True):
        row[: len(values)] = values
    return scores


def top_k_places(first: ArrayLike, tied: ArrayLike, k: float = math.inf) -> Places:
    """The places in a list of the best k of a catalogue.

    Args:
        first: int [users], the first place in the catalogue that may be the target's; 0 = it cannot be retrieved.
        tied: int [users], how many items have the target's score, itself counted.
        k: where the list ends; of a tie across its end, the places past it are misses.
    """
    first = np.asarray(first, dtype=np.float64)
    first = np.where(first >= 1, first, np.inf)
    return Places(first, first + np.asarray(tied) - 1, k)


def candidate_places(rank: ArrayLike, first: ArrayLike, tied: ArrayLike, k: int) -> Places:
    """The places among k candidates, which are given: a target outside is a miss, and a tie holds candidates alone.

    Args:
        rank: int [users], the place in the catalogue that decides which of the tied are candidates; 0 = none.
        first, tied: see `top_k_places`.
        k: how many candidates there are.
    """
    rank, first, last = np.asarray(rank), np.asarray(first), np.minimum(np.asarray(first) + np.asarray(tied) - 1, k)
    inside = (rank >= 1) & (rank <= k)
    return Places(np.where(inside, first, np.inf), np.where(inside, last, np.inf))


def per_user_metrics(ranks: ArrayLike | Places, ks: Sequence[int] = KS) -> dict[str, np.ndarray]:
    """`<name>@<k>` of each of `METRICS` for each user, float64 [users]; of a tie, the mean over its places.

    Args:
        ranks: places, or 1-based ranks where nothing ties, float [users] (inf = miss).
        ks: the cut-offs.

    Raises:
        ValueError: a rank below 1 or NaN, or a last place before the first.
    """
    if not isinstance(ranks, Places):
        ranks = Places(*(np.asarray(ranks, dtype=np.float64),) * 2)
    first, last, limit = ranks
    if not ((first >= 1) & (last >= first) & (np.isfinite(last) == np.isfinite(first))).all():
        raise ValueError("ranks are 1-based: every rank must be at least 1, or inf for a miss.")
    tied = last > first
    end = int(min(limit, last[tied].max(initial=0)))  # no tied place past it counts
    before, until = (np.minimum(places, end).astype(np.int64) for places in (first[tied] - 1, last[tied]))

    def values_of(metric: Metric, k: int) -> np.ndarray:
        values = np.array(metric.of_rank(np.where(first <= limit, first, np.inf), k), dtype=np.float64)
        if tied.any():
            sums = np.concatenate([[0.0], np.cumsum(metric.of_rank(np.arange(1.0, end + 1), k))])
            values[tied] = (sums[until] - sums[before]) / (last[tied] - first[tied] + 1)
        return values

    return {f"{metric.name}@{k}": values_of(metric, k) for k in ks for metric in METRICS.values()}


def ranking_metrics(ranks: ArrayLike | Places, ks: Sequence[int] = KS) -> dict[str, float]:
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
    hit = labels != MISS
    return per_user_metrics(Places(np.where(hit, 1, np.inf), np.where(hit, counts, np.inf)), ks)


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
            return ranking_metrics(places_from_scores(pad_scores(predictions), labels), ks)

    RankingMetrics.__qualname__ = "RankingMetrics"
    return RankingMetrics


def __getattr__(name: str) -> type["evaluate.Metric"]:
    if name == "RankingMetrics":
        return _load_ranking_metrics()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
