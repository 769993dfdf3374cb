"""The report: per-user ranks of several systems -> metrics with intervals, paired comparisons, Markdown and plots."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .figures import BLUE, GREY, ORANGE, markdown_table, number, plain_axes, save_figure
from .files import write_json, write_text
from .metrics import KS, METRICS, Places, bootstrap_interval, mean, paired_bootstrap, per_user_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCOPES = ("rank", "overall")
_SCOPE_WORDS = {"rank": "hits only", "overall": "all users"}  # in tables and plots
_EXPLANATION = (
    "*Hits only* counts the users whose target is among their candidates: how well the candidates are ordered. *All "
    "users* counts everyone: what users get in the end. Systems that rank the candidates count 0 there for a user "
    "whose target is not among them; a system of the order *own* is scored on its own top of the whole catalogue."
)
_CORE = (
    "*Core* targets occur in train at least {k} times, as the data's {k}-core promises of every item: that filter also "
    "counts the interactions that leave-one-out then holds out, so that the other targets are left with fewer."
)


class TrainCounts(NamedTuple):
    """How often targets occur in the train parts.

    Attributes:
        of_target: for each split, int [users].
        k_core: the k of the data's k-core filter; 0 = it was not filtered, and there are no core targets.
    """

    of_target: Mapping[str, np.ndarray]
    k_core: int = 0

    def groups(self, split: str) -> dict[str, np.ndarray]:
        """The users of each group of targets that has any, bool [users], by its scope in metrics.json."""
        counts = np.asarray(self.of_target[split])
        groups = {"core": counts >= self.k_core} if self.k_core else {}
        groups |= {"train<5": counts < 5, "train5-15": (counts >= 5) & (counts <= 15), "train>15": counts > 15}
        return {name: users for name, users in groups.items() if users.any()}


class Report:
    """Collects the results of systems over the same users, and writes them.

    Two scopes are always reported: "rank" holds the users whose target is among the candidates ("hits only" in tables
    and plots), "overall" all users. With `train_counts`, the latter are also split into the groups of `TrainCounts`.
    The metrics are those of `ulmrec_hf.metrics.METRICS` when the report is made.

    Args:
        in_candidates: for each split, bool [users]: whether the candidates hold the user's target.
        num_candidates: how many candidates a user has.
        train_counts: how often the targets occur in the train parts, where known.
        notes: sentences about the protocol (evidence, order, seeds...), shown in report.md.
        ks: the cut-offs of the metrics.
        seed, samples, level: of the bootstrap; see `ulmrec_hf.metrics.bootstrap_interval`.
    """

    def __init__(
        self,
        in_candidates: Mapping[str, ArrayLike],
        num_candidates: int,
        *,
        train_counts: TrainCounts | None = None,
        notes: Sequence[str] = (),
        ks: Sequence[int] = KS,
        seed: int = 0,
        samples: int = 2000,
        level: float = 0.95,
    ):
        self.in_candidates = {split: np.asarray(mask, dtype=bool) for split, mask in in_candidates.items()}
        self.num_candidates = num_candidates
        self.train_counts = train_counts
        self.notes = list(notes)
        self.names = [f"{metric.name}@{k}" for metric in METRICS.values() for k in ks]
        self._ks = tuple(ks)
        self._shown = max((k for k in ks if k <= 10), default=min(ks))  # the k of the plot and of the short table
        self._bootstrap = {"seed": seed, "samples": samples, "level": level}
        self._percent = f"{100 * level:g} %"
        self._values: dict[tuple[str, str], np.ndarray] = {}  # float64 [users, metrics]
        self._orders: dict[tuple[str, str], str] = {}

    def add(self, system: str, split: str, ranks: ArrayLike | Places | Mapping[str, ArrayLike], *, order: str) -> None:
        """Adds one system's results on one split.

        Args:
            system: its name, such as "ulmrec".
            split: a split of `in_candidates`.
            ranks: places, or where nothing ties ranks, float [users], 1-based, inf for a miss; or the metrics
                themselves, as `random_order_metrics` returns them. The users are in the same order for every system.
            order: in which order the system saw the candidates, such as "retriever" or "shuffled".

        Raises:
            ValueError: an unknown split, a system added twice, or another number of users.
        """
        if split not in self.in_candidates:
            raise ValueError(f"split {split!r} is not in the report's splits {sorted(self.in_candidates)}.")
        if (system, split) in self._values:
            raise ValueError(f"the system {system!r} was already added for the split {split!r}.")
        given = ranks if isinstance(ranks, Mapping) else per_user_metrics(ranks, self._ks)
        users = len(self.in_candidates[split])
        for name in self.names:
            if np.shape(given[name]) != (users,):
                raise ValueError(
                    f"{name} of the system {system!r} has the shape {np.shape(given[name])}; "
                    f"the split {split!r} has {users} users."
                )
        self._values[system, split] = np.stack([given[name] for name in self.names], axis=1).astype(np.float64)
        self._orders[system, split] = order

    @property
    def systems(self) -> set[str]:
        """The names of the systems that were added."""
        return {system for system, _ in self._values}

    def ceiling(self, split: str) -> float:
        """The retriever's Recall@num_candidates, which no ranker of these candidates can exceed."""
        return mean(self.in_candidates[split])

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.json, one for each system, split and scope; null where "rank" or "overall" is empty."""
        rows = []
        for (system, split), values in self._values.items():
            for scope, users in self._scopes(split).items():
                chosen = values[users]
                means = dict(zip(self.names, mean(chosen), strict=True))
                intervals = zip(self.names, *bootstrap_interval(chosen, **self._bootstrap), strict=True)
                row = {"system": system, "split": split, "scope": scope, "order": self._orders[system, split]}
                row |= {"users": len(chosen)} | {name: _plain(value) for name, value in means.items()}
                for name, low, high in intervals:
                    row |= {f"{name}_low": _plain(low), f"{name}_high": _plain(high)}
                rows.append(row)
        return rows

    def comparisons(self, pairs: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
        """The rows of comparisons.json: for pairs (a, b) of systems, a minus b over the same users of each split.

        Raises:
            ValueError: no split holds both systems of a pair.
        """
        rows = []
        for a, b in pairs:
            splits = [split for split in self.in_candidates if {(a, split), (b, split)} <= self._values.keys()]
            if not splits:
                raise ValueError(
                    f"cannot compare {a!r} with {b!r}: no split holds both. The report has {sorted(self.systems)}."
                )
            for split in splits:
                scopes = self._scopes(split)
                for scope in SCOPES:
                    users = scopes[scope]
                    ours, theirs = (self._values[system, split][users] for system in (a, b))
                    results = paired_bootstrap(ours, theirs, **self._bootstrap)
                    for name, difference, low, high in zip(self.names, *results, strict=True):
                        row = {"a": a, "b": b, "split": split, "scope": scope, "metric": name}
                        rows.append(row | {"difference": _plain(difference), "low": _plain(low), "high": _plain(high)})
        return rows

    def write(self, folder: str | os.PathLike, pairs: Iterable[tuple[str, str]] = ()) -> list[dict[str, Any]]:
        """Writes metrics.json, comparisons.json, report.md and metrics.png into `folder`; returns `rows()`."""
        rows, comparisons = self.rows(), self.comparisons(pairs)
        folder = Path(folder)
        write_json(folder / "metrics.json", rows)
        write_json(folder / "comparisons.json", comparisons)
        write_text(folder / "report.md", self.markdown(rows, comparisons))
        plot_metrics(folder / "metrics.png", rows, metric=f"ndcg@{self._shown}")
        return rows

    def markdown(self, rows: Sequence[Mapping[str, Any]], comparisons: Sequence[Mapping[str, Any]] = ()) -> str:
        """report.md: the tables of `rows` and `comparisons`, the best value of each column in bold."""
        parts = ["# Results", _EXPLANATION]
        for split in sorted({row["split"] for row in rows}, key=_split_order):
            k, ceiling = self.num_candidates, self.ceiling(split)
            parts.append(f"## {split.capitalize()}")
            parts.append(
                f"{len(self.in_candidates[split]):,} users with up to {k} candidates each. These hold the target of "
                f"{'no' if math.isnan(ceiling) else f'{100 * ceiling:.1f} % of the'} users: this Recall@{k} of the "
                "retriever is the ceiling for every system that ranks these candidates."
            )
            for scope in SCOPES:
                chosen = [row for row in rows if row["split"] == split and row["scope"] == scope]
                parts.append(f"### {_SCOPE_WORDS[scope].capitalize()}: {chosen[0]['users']:,}")
                parts.append(self._metric_table(chosen, scope))
            if self.train_counts:
                parts += self._count_parts([row for row in rows if row["split"] == split])
            parts.append(f"In parentheses: {self._percent} bootstrap interval over users. Bold: the best of a column.")
            chosen = [row for row in comparisons if row["split"] == split]
            if chosen:
                parts.append(f"### Comparisons on {split} users")
                parts.append(self._comparison_table(chosen))
                parts.append(
                    "The first system minus the second over the same users, with the "
                    f"{self._percent} interval of a paired bootstrap. Bold: the interval excludes 0."
                )
        if self.notes:
            parts.append("## Protocol")
            parts.append("\n".join(f"- {note}" for note in self.notes))
        return "\n\n".join(parts) + "\n"

    def summary(self, rows: Sequence[Mapping[str, Any]], split: str = "test") -> str:
        """A short plain-text table for a terminal: the best NDCG@10, or nearest below, over all users first."""
        ndcg, recall = f"ndcg@{self._shown}", f"recall@{self._shown}"
        columns = [(ndcg, "rank"), (ndcg, "overall"), (recall, "overall")]
        systems: dict[str, dict[str, Mapping[str, Any]]] = {}
        for row in rows:
            if row["split"] == split:
                systems.setdefault(row["system"], {})[row["scope"]] = row
        table = [["System", *(_scoped_title(*column) for column in columns)]]
        for system, scopes in sorted(systems.items(), key=lambda entry: -(entry[1]["overall"][ndcg] or 0)):
            table.append([system, *(_cell(scopes[scope], name, "-") for name, scope in columns)])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        mask = self.in_candidates[split]
        words = [
            f"Hits only: the {mask.sum():,} {split} users whose target is among the {self.num_candidates} candidates.",
            f"All users: {len(mask):,}; a miss counts 0. In parentheses: {self._percent} bootstrap interval.",
        ]
        return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:], "", *words])

    def _scopes(self, split: str) -> dict[str, np.ndarray]:
        """The users of each scope, bool [users]: those of `SCOPES`, then the groups by train count."""
        mask = self.in_candidates[split]
        groups = self.train_counts.groups(split) if self.train_counts else {}
        return {"rank": mask, "overall": np.ones_like(mask), **groups}

    def _count_parts(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """The table of one metric by how often the target occurs in train, of the rows of one split."""
        name, k = f"ndcg@{self._shown}", self.train_counts.k_core
        chosen = [row for row in rows if row["scope"] != "rank"]
        users = {row["scope"]: row["users"] for row in chosen}
        titles = {"overall": "all", "core": f"core: ≥ {k}", "train<5": "< 5", "train5-15": "5–15", "train>15": "> 15"}
        best = {scope: max(row[name] or 0 for row in chosen if row["scope"] == scope) for scope in users}
        systems: dict[str, list[str]] = {}
        for row in chosen:
            systems.setdefault(row["system"], [f"`{row['system']}`"]).append(_cell(row, name, "–", best[row["scope"]]))
        head = ["Targets", *(f"{titles[scope]} ({count:,})" for scope, count in users.items())]
        words = f"{_title(name)} over all users, grouped by how often their target occurs in the train parts."
        if "core" in users:
            words += " " + _CORE.format(k=k)
        return ["### By the target's count in train", words, markdown_table([head, *systems.values()])]

    def _metric_table(self, rows: Sequence[Mapping[str, Any]], scope: str) -> str:
        best = {name: max((row[name] for row in rows if row[name] is not None), default=None) for name in self.names}
        table = [["System", "Order", *(_scoped_title(name, scope) for name in self.names)]]
        for row in rows:
            cells = [_cell(row, name, "–", best[name]) for name in self.names]
            table.append([f"`{row['system']}`", row["order"], *cells])
        return markdown_table(table)

    def _comparison_table(self, rows: Sequence[Mapping[str, Any]]) -> str:
        cells: dict[tuple[str, str, str], dict[str, str]] = {}
        for row in rows:
            sure = row["low"] is not None and (row["low"] > 0 or row["high"] < 0)
            text = _bold(number(row["difference"], "+.4f"), sure)
            text += f" ({number(row['low'], '+.4f')} to {number(row['high'], '+.4f')})"
            cells.setdefault((row["a"], row["b"], row["scope"]), {})[row["metric"]] = text
        table = [["Systems", "Users", *map(_title, self.names)]]
        for (a, b, scope), texts in cells.items():
            table.append([f"`{a}` − `{b}`", _SCOPE_WORDS[scope], *(texts[name] for name in self.names)])
        return markdown_table(table)


def plot_metrics(
    path: str | os.PathLike,
    rows: Sequence[Mapping[str, Any]],
    metric: str = "ndcg@10",
    split: str = "test",
    highlight: str = "ulmrec",
) -> None:
    """Bars of one metric with their intervals: a panel for each scope, a bar for each system, `highlight` in blue."""
    rows = [row for row in rows if row["split"] == split and row[metric] is not None]
    systems = list(dict.fromkeys(row["system"] for row in rows))

    def draw(figure: "Figure") -> None:
        for axes, scope in zip(figure.subplots(1, len(SCOPES), sharey=True), SCOPES, strict=True):
            chosen = {row["system"]: row for row in rows if row["scope"] == scope}
            right = max((row[f"{metric}_high"] for row in chosen.values()), default=0) or 1
            for place, system in enumerate(systems):
                if system not in chosen:
                    continue
                value, low, high = (chosen[system][name] for name in (metric, f"{metric}_low", f"{metric}_high"))
                # Rounding can put the mean of equal values just outside of their interval.
                error = [[max(0.0, value - low)], [max(0.0, high - value)]]
                color = BLUE if system == highlight else GREY
                axes.barh(place, value, xerr=error, color=color, height=0.66, error_kw={"lw": 1.2, "capsize": 3})
                axes.text(high + 0.02 * right, place, f"{value:.3f}", va="center", fontsize=9)
            users = next((row["users"] for row in chosen.values()), 0)
            axes.set_title(f"{_SCOPE_WORDS[scope].capitalize()}: {users:,}", fontsize=11)
            axes.set_xlim(0, 1.18 * right)
            axes.set_xlabel(f"{_title(metric)}, 95 % interval")
            plain_axes(axes, "x")
        axes.set_yticks(range(len(systems)), systems)
        axes.set_ylim(len(systems) - 0.5, -0.5)

    save_figure(path, draw, (10, 1.4 + 0.42 * max(1, len(systems))))


def plot_training(path: str | os.PathLike, runs: Mapping[str, Sequence[Mapping[str, Any]]], k: int = 10) -> None:
    """Training loss and validation NDCG@k over the steps of several runs, by name: the Trainer's `log_history`."""

    def draw(figure: "Figure") -> None:
        loss_axes, ndcg_axes = figure.subplots(1, 2)
        for name, entries in runs.items():
            losses = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
            scores = [
                (entry["step"], value)
                for entry in entries
                for key, value in entry.items()
                if key.startswith("eval_") and key.endswith(f"ndcg@{k}")
            ]
            loss_axes.plot(*_columns(losses), label=name, lw=1.6)
            ndcg_axes.plot(*_columns(scores), label=name, lw=1.6, marker="o", ms=4)
        for axes, title in ((loss_axes, "Training loss"), (ndcg_axes, f"Validation NDCG@{k}")):
            axes.set_title(title, fontsize=11)
            axes.set_xlabel("step")
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            plain_axes(axes)
        if runs:
            handles, labels = loss_axes.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(runs)), frameon=False)

    save_figure(path, draw, (10, 4))


def plot_code_use(path: str | os.PathLike, codes: ArrayLike, codebook_size: int) -> None:
    """How many users have each of `codes`, int [users, levels] in [0, codebook_size): a panel for each level."""
    codes = np.asarray(codes, dtype=np.int64)
    if codes.ndim != 2 or not 0 <= codes.min(initial=0) <= codes.max(initial=0) < codebook_size:
        raise ValueError(f"codes must be [users, levels] in 0 to {codebook_size - 1}; got shape {codes.shape}.")

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(1, codes.shape[1], sharey=True, squeeze=False)[0]
        for level, axes in enumerate(panels):
            use = np.sort(np.bincount(codes[:, level], minlength=codebook_size))[::-1]
            axes.bar(np.arange(codebook_size), use, width=1.0, color=BLUE)
            even = axes.axhline(len(codes) / codebook_size, color=ORANGE, lw=1.4, ls="--")
            axes.set_title(f"Level {level + 1}: {np.count_nonzero(use)} of {codebook_size} codes used", fontsize=10)
            axes.set_xlabel("code, most used first")
            axes.set_xlim(-0.5, codebook_size - 0.5)
            plain_axes(axes, "y")
        panels[0].set_ylabel("users")
        panels[-1].legend([even], ["even use"], frameon=False, loc="upper right")

    save_figure(path, draw, (3.1 * codes.shape[1], 3.2))


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _plain(value: float) -> float | None:
    # Six decimals: far below any interval, and independent of the order in which a machine adds.
    return None if math.isnan(value) else round(float(value), 6) + 0.0


def _cell(row: Mapping[str, Any], name: str, dash: str, best: float | None = None) -> str:
    """A metric and its interval, the metric in bold where it equals `best`."""
    value = _bold(number(row[name]), best is not None and row[name] == best)
    return f"{value} ({number(row[f'{name}_low'])}{dash}{number(row[f'{name}_high'])})"


def _bold(text: str, on: bool) -> str:
    return f"**{text}**" if on else text


def _scoped_title(metric: str, scope: str) -> str:
    return f"{_title(metric)} ({_SCOPE_WORDS[scope]})"


def _title(metric: str) -> str:
    name, k = metric.split("@")
    return f"{next(each.title for each in METRICS.values() if each.name == name)}@{k}"


def _split_order(split: str) -> tuple[bool, str]:
    return split != "test", split
