"""Fits a retriever on a source of interactions, writes its candidates, and prints how often they hold the target."""

from pathlib import Path

from trl import TrlParser

from ulmrec_hf.cli import run_script
from ulmrec_hf.data.arguments import DataArguments, StageArguments
from ulmrec_hf.retrieval.arguments import RetrieverArguments


def make_parser() -> TrlParser:
    """The parser of this script's settings, for YAML and the command line."""
    return TrlParser([DataArguments, RetrieverArguments, StageArguments], description=__doc__)


def main(argv: list[str] | None = None) -> None:
    """Prepares the data where that is still to do, runs the retrieval stage, and prints its results."""
    data_args, args, stage_args = make_parser().parse_args_and_config(argv)

    from ulmrec_hf.data.stage import prepare_data
    from ulmrec_hf.results import write_retriever_report
    from ulmrec_hf.retrieval.stage import train_retriever
    from ulmrec_hf.tables import LeaveOneOut

    output_dir = Path(stage_args.output_dir)
    data = LeaveOneOut.load(prepare_data(data_args, output_dir, overwrite=stage_args.overwrite))
    stage = train_retriever(args, data, output_dir, overwrite=stage_args.overwrite)
    print("\n" + write_retriever_report(stage, output_dir / "report", args, data))
    print(f"\nWritten: {stage} and {output_dir / 'report'}")


if __name__ == "__main__":
    run_script(main)
