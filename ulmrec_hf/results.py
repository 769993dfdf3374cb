"""Reports of a run, a retriever or a tuned model, assembled from the stages' folders."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike

from .files import read_json
from .metrics import KS, Places, candidate_places, pad_scores, places_from_scores, random_order_metrics, top_k_places
from .protocol import EVALUATED, MISS
from .report import Report, TrainCounts, plot_code_use, plot_training
from .retrieval.arguments import RetrieverArguments
from .retrieval.stage import protocol_notes
from .stages import RECORD, run_stage, stage_fingerprint
from .systems import COMPARED, RANKER
from .tables import LeaveOneOut, read_table
from .tasks.arguments import TaskArguments
from .user_index import KINDS, UserIndex

LEAVE_ONE_OUT = "Leave-one-out: the last item of each user is the test target, the one before it the validation target."
_RETRIEVER_KS = (5, 10, 20)
_TIES = "Equal scores, of a ranker or a retriever: every metric is its expectation over the orders of the tied."
# system, split, places or metrics of every user, the order in which it saw the candidates
Entry = tuple[str, str, Places | Mapping[str, ArrayLike], str]


def write_run_report(folder: Path, models: Sequence[Path], *, tasks: TaskArguments, notes: Sequence[str]) -> str:
    """Writes the stage `report/` of the main job; returns a table for the terminal.

    Args:
        folder: the run's output folder.
        models: the stages of the tuned systems, that of the ranker first.
        tasks: how the rows were made.
        notes: sentences about the protocol.
    """
    predictions = pa.concat_tables(read_table(model / "predictions.parquet") for model in models)
    k, own = tasks.num_candidates, predictions.filter(pc.field("system") == RANKER.name)
    labels = {split: _of(own, split=split)["label"].to_numpy() for split in EVALUATED}
    entries: list[Entry] = []
    candidates = _targets(folder / "retriever")
    retrievers = read_table(folder / "retriever" / "ranks.parquet")
    for split in EVALUATED:
        counts = pc.list_value_length(_of(own, split=split)["scores"]).to_numpy()
        entries.append(("random", split, random_order_metrics(counts, labels[split]), "random"))
        entries += _own_order(retrievers, split, k)
        entries.append(("retriever", split, _candidate_places(candidates[split], k), "retriever"))
        for system in pc.unique(predictions["system"]).to_pylist():
            scores = pad_scores(_of(predictions, split=split, system=system)["scores"].to_pylist())
            entries.append((system, split, places_from_scores(scores, labels[split]), tasks.evaluation_order))
    found = {split: labels[split] != MISS for split in EVALUATED}
    train_counts = _train_counts(LeaveOneOut.load(folder / "data"), candidates)
    report = assemble_report(found, k, entries, train_counts=train_counts, notes=notes)

    def plot(partial: Path) -> None:
        runs = [read_json(model / "training.json") for model in models]
        plot_training(partial / "training.png", {run["system"]: run["history"] for run in runs if run["history"]})
        index = UserIndex.from_parquet(folder / "index" / "user_index.parquet")
        plot_code_use(partial / "code_use.png", index.codes, index.codebook_size)

    stages = [folder / "retriever", folder / "index", folder / "data" / "tasks", *models]
    inputs = {stage.relative_to(folder).as_posix(): stage_fingerprint(stage) for stage in stages}
    pairs = [pair for pair in COMPARED if set(pair) <= report.systems]
    return _write_stage(report, folder / "report", {"notes": notes}, inputs, pairs, plot)


def write_retriever_report(stage: Path, folder: Path, args: RetrieverArguments, data: LeaveOneOut) -> str:
    """Writes the stage `folder`, the report of a retrieval stage on its data; returns a table for the terminal."""
    table, k, targets = read_table(stage / "ranks.parquet"), args.num_candidates, _targets(stage)
    entries = [entry for split in EVALUATED for entry in _own_order(table, split, k)]
    found = {split: np.isfinite(_candidate_places(targets[split], k).first) for split in EVALUATED}
    ks = [each for each in _RETRIEVER_KS if each <= k] or [k]
    own = "Each system is scored on its own top k of the whole catalogue without the user's history."
    notes = [LEAVE_ONE_OUT, own, _TIES, *protocol_notes(args)]
    report = assemble_report(found, k, entries, train_counts=_train_counts(data, targets), notes=notes, ks=ks)
    others = dict.fromkeys(system for system, *_ in entries if system != args.retriever)
    pairs = [(args.retriever, system) for system in others]
    # a stage, so that the main job in the same folder knows that this report is not its own
    return _write_stage(report, folder, {"systems": [*others]}, {"retriever": stage_fingerprint(stage)}, pairs)


def write_ranker_report(folder: Path, split: str, scores: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> str:
    """Writes metrics of one model's scores into `folder`; returns a table for the terminal.

    Args:
        split: the split that was scored.
        scores: float32 [users, candidates], -inf past a user's own candidates.
        labels: int [users], the target's place, -1 = a miss.
        counts: int [users], how many candidates each has.
    """
    entries = [("random", split, random_order_metrics(counts, labels), "random")]
    entries.append((RANKER.name, split, places_from_scores(scores, labels), "given"))
    report = assemble_report({split: labels != MISS}, int(max(counts)), entries)
    return report.summary(report.write(folder), split)


def assemble_report(
    found: Mapping[str, ArrayLike],
    num_candidates: int,
    entries: Iterable[Entry],
    *,
    train_counts: TrainCounts | None = None,
    notes: Sequence[str] = (),
    ks: Sequence[int] = KS,
) -> Report:
    """A report of these systems; see `Report` for the arguments, `found` being its `in_candidates`."""
    report = Report(found, num_candidates, train_counts=train_counts, notes=notes, ks=ks)
    for system, split, ranks, order in entries:
        report.add(system, split, ranks, order=order)
    return report


def run_notes(retriever: RetrieverArguments, tasks: TaskArguments, *, evidence: str, index_kind: str) -> list[str]:
    """What the report of a run must say of its protocol."""
    return [
        LEAVE_ONE_OUT,
        f"Evidence: {evidence}. "
        + (
            "What describes a user (index, preference, ratings shown) comes from the train part alone, in training "
            "rows from before their target."
            if evidence == "train"
            else "User index and preferences come from all interactions, the test target included: these results leak."
        ),
        f"Candidates: the top {tasks.num_candidates} of {retriever.retriever}; a target that is not among them is a "
        "miss for every system that ranks them. Retrievers are scored on their own top.",
        f"Evaluation order of the candidates: {tasks.evaluation_order}.",
        _TIES,
        "random: the exact expectation over all orders of the candidates.",
        *([] if KINDS[index_kind].adds_tokens else [f"User index: {index_kind}, as plain text without user tokens."]),
        *protocol_notes(retriever),
    ]


def _write_stage(
    report: Report,
    folder: Path,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    pairs: Sequence[tuple[str, str]],
    plot: Callable[[Path], None] = lambda partial: None,
) -> str:
    def build(partial: Path) -> None:
        report.write(partial, pairs)
        plot(partial)

    run_stage(folder, settings, inputs, build, overwrite=True)
    return report.summary(read_json(folder / "metrics.json"))


def _own_order(ranks: pa.Table, split: str, k: int) -> list[Entry]:
    """Every retriever's own top k, from the ranks of a retrieval stage."""
    ranks, entries = _of(ranks, split=split), []
    for system in pc.unique(ranks["system"]).to_pylist():
        own = _of(ranks, system=system).sort_by("user")
        entries.append((system, split, top_k_places(own["rank"], own["tied"], k), "own"))
    return entries


def _targets(stage: Path) -> dict[str, pa.Table]:
    """The targets of each evaluated split, by user, from the candidates of a retrieval stage."""
    columns = ["user", "split", "target", "target_rank", "target_first", "target_tied"]
    table = read_table(stage / "candidates.parquet", columns)
    return {split: _of(table, split=split).sort_by("user") for split in EVALUATED}


def _candidate_places(targets: pa.Table, k: int) -> Places:
    """The places of these targets in the retriever's order of its k candidates."""
    return candidate_places(*(targets[f"target_{name}"] for name in ("rank", "first", "tied")), k)


def _train_counts(data: LeaveOneOut, targets: Mapping[str, pa.Table]) -> TrainCounts:
    """How often the targets occur in the train parts of a data stage, and its k-core."""
    counts = data.sequences.train_part().counts()
    k_core = read_json(data.folder / RECORD)["settings"].get("k_core", 0)
    return TrainCounts({split: counts[table["target"].to_numpy()] for split, table in targets.items()}, k_core)


def _of(table: pa.Table, **columns: Any) -> pa.Table:
    """The rows that hold these values."""
    for name, value in columns.items():
        table = table.filter(pc.field(name) == value)
    return table
