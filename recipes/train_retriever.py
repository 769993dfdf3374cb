"""Fits a retriever on a source of interactions, writes its candidates, and prints how often they hold the target."""

from pathlib import Path

import numpy as np
from trl import TrlParser

from ulmrec_hf.cli import run_script
from ulmrec_hf.data.arguments import DataArguments, StageArguments
from ulmrec_hf.retrieval.arguments import RetrieverArguments

KS = (5, 10, 20)
PROTOCOL = (
    "Leave-one-out: the last item of each user is the test target, the one before it the validation target.",
    "Each system is scored on its own top k of the whole catalogue without the user's history.",
)


def make_parser() -> TrlParser:
    """The parser of this script's settings, for YAML and the command line."""
    return TrlParser([DataArguments, RetrieverArguments, StageArguments], description=__doc__)


def write_report(stage: Path, folder: Path, args: RetrieverArguments) -> str:
    """Writes metrics.json, comparisons.json, report.md and a plot from the ranks of a stage; returns a table."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from ulmrec_hf.metrics import top_k_ranks
    from ulmrec_hf.report import Report
    from ulmrec_hf.retrieval.stage import protocol_notes
    from ulmrec_hf.stages import run_stage, stage_fingerprint

    table = pq.read_table(stage / "ranks.parquet").sort_by("user")
    systems = pc.unique(table["system"]).to_pylist()
    ranks = {}
    for split in ("validation", "test"):
        for system in systems:
            rows = table.filter((pc.field("split") == split) & (pc.field("system") == system))
            ranks[system, split] = top_k_ranks(rows["rank"], args.num_candidates)
    found = {split: np.isfinite(own) for (system, split), own in ranks.items() if system == args.retriever}
    ks = [k for k in KS if k <= args.num_candidates] or [args.num_candidates]
    report = Report(found, args.num_candidates, notes=[*PROTOCOL, *protocol_notes(args)], ks=ks)
    for (system, split), own in ranks.items():
        report.add(system, split, own, order="own")
    pairs = [(args.retriever, system) for system in systems if system != args.retriever]
    # a stage, so that the main job in the same folder knows that this report is not its own
    rows = []
    run_stage(
        folder,
        {"systems": systems},
        {"retriever": stage_fingerprint(stage)},
        lambda partial: rows.extend(report.write(partial, pairs)),
        overwrite=True,
    )
    return report.summary(rows or report.rows())


def main(argv: list[str] | None = None) -> None:
    """Prepares the data unless that is done, runs the retrieval stage, and prints its results."""
    data_args, args, stage_args = make_parser().parse_args_and_config(argv)

    from ulmrec_hf.data.stage import prepare_data
    from ulmrec_hf.retrieval.stage import train_retriever
    from ulmrec_hf.tables import LeaveOneOut

    output_dir = Path(stage_args.output_dir)
    data = LeaveOneOut.load(prepare_data(data_args, output_dir, overwrite=stage_args.overwrite))
    stage = train_retriever(args, data, output_dir, overwrite=stage_args.overwrite)
    print("\n" + write_report(stage, output_dir / "report", args))
    print(f"\nWritten: {stage} and {output_dir / 'report'}")


if __name__ == "__main__":
    run_script(main)
