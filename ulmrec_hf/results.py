"""Reports of a run, a retriever or a tuned model, assembled from the stages' folders."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike

from .files import read_json
from .metrics import KS, pad_scores, random_order_metrics, ranks_from_scores, top_k_ranks
from .protocol import EVALUATED, MISS
from .report import Report, plot_code_use, plot_training
from .retrieval.arguments import RetrieverArguments
from .retrieval.stage import protocol_notes
from .stages import run_stage, stage_fingerprint
from .systems import COMPARED, RANKER
from .tables import read_table
from .tasks.arguments import TaskArguments
from .user_index import KINDS, UserIndex

LEAVE_ONE_OUT = "Leave-one-out: the last item of each user is the test target, the one before it the validation target."
_RETRIEVER_KS = (5, 10, 20)
# system, split, ranks or metrics of every user, the order in which it saw the candidates
Entry = tuple[str, str, ArrayLike | Mapping[str, ArrayLike], str]


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
    candidates = read_table(folder / "retriever" / "candidates.parquet", ["split", "user", "target_rank"])
    retrievers = read_table(folder / "retriever" / "ranks.parquet")
    for split in EVALUATED:
        counts = pc.list_value_length(_of(own, split=split)["scores"]).to_numpy()
        entries.append(("random", split, random_order_metrics(counts, labels[split]), "random"))
        entries += _own_order(retrievers, split, k)
        ranks = _of(candidates, split=split).sort_by("user")["target_rank"]
        entries.append(("retriever", split, top_k_ranks(ranks, k), "retriever"))
        for system in pc.unique(predictions["system"]).to_pylist():
            scores = pad_scores(_of(predictions, split=split, system=system)["scores"].to_pylist())
            entries.append((system, split, ranks_from_scores(scores, labels[split]), tasks.evaluation_order))
    report = assemble_report({split: labels[split] != MISS for split in EVALUATED}, k, entries, notes)

    def plot(partial: Path) -> None:
        runs = [read_json(model / "training.json") for model in models]
        plot_training(partial / "training.png", {run["system"]: run["history"] for run in runs})
        index = UserIndex.from_parquet(folder / "index" / "user_index.parquet")
        plot_code_use(partial / "code_use.png", index.codes, index.codebook_size)

    stages = [folder / "retriever", folder / "index", folder / "data" / "tasks", *models]
    inputs = {stage.relative_to(folder).as_posix(): stage_fingerprint(stage) for stage in stages}
    pairs = [pair for pair in COMPARED if set(pair) <= report.systems]
    return _write_stage(report, folder / "report", {"notes": notes}, inputs, pairs, plot)


def write_retriever_report(stage: Path, folder: Path, args: RetrieverArguments) -> str:
    """Writes the stage `folder`, the report of a retrieval stage; returns a table for the terminal."""
    table = read_table(stage / "ranks.parquet")
    entries = [entry for split in EVALUATED for entry in _own_order(table, split, args.num_candidates)]
    found = {split: np.isfinite(ranks) for system, split, ranks, _ in entries if system == args.retriever}
    ks = [k for k in _RETRIEVER_KS if k <= args.num_candidates] or [args.num_candidates]
    own = "Each system is scored on its own top k of the whole catalogue without the user's history."
    report = assemble_report(found, args.num_candidates, entries, [LEAVE_ONE_OUT, own, *protocol_notes(args)], ks=ks)
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
    entries.append((RANKER.name, split, ranks_from_scores(scores, labels), "given"))
    report = assemble_report({split: labels != MISS}, int(max(counts)), entries)
    return report.summary(report.write(folder), split)


def assemble_report(
    found: Mapping[str, ArrayLike],
    num_candidates: int,
    entries: Iterable[Entry],
    notes: Sequence[str] = (),
    ks: Sequence[int] = KS,
) -> Report:
    """A report of these systems; see `Report` for the arguments, `found` being its `in_candidates`."""
    report = Report(found, num_candidates, notes=notes, ks=ks)
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
        f"Evaluation order of the candidates: {tasks.evaluation_order}. Equal scores share the mean of their places.",
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
    ranks = _of(ranks, split=split)
    systems = pc.unique(ranks["system"]).to_pylist()
    by_user = ranks.sort_by("user")
    return [(system, split, top_k_ranks(_of(by_user, system=system)["rank"], k), "own") for system in systems]


def _of(table: pa.Table, **columns: Any) -> pa.Table:
    """The rows that hold these values."""
    for name, value in columns.items():
        table = table.filter(pc.field(name) == value)
    return table
