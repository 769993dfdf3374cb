"""Fits a retriever on a source of interactions, writes its candidates, and prints how often they hold the target."""

import os

import numpy as np
from trl import TrlParser

from ulmrec_hf.cli import run_script
from ulmrec_hf.data.arguments import DataArguments, StageArguments
from ulmrec_hf.retrieval.arguments import RetrieverArguments

COLUMNS = ("recall@5", "recall@10", "recall@20", "ndcg@5", "ndcg@10", "mrr@10")


def make_parser() -> TrlParser:
    """The parser of this script's settings, for YAML and the command line."""
    return TrlParser([DataArguments, RetrieverArguments, StageArguments], description=__doc__)


def print_results(folder: str | os.PathLike, k: int) -> None:
    """Prints one row per split and system, over all users; a target past the top k, or unreachable, is a miss."""
    import pyarrow.parquet as pq

    from ulmrec_hf.metrics import ranking_metrics

    table = pq.read_table(os.path.join(folder, "ranks.parquet")).to_pandas()
    print(f"\n{'split':<12}{'system':<12}" + "".join(f"{name:>11}" for name in COLUMNS))
    for (split, system), rows in table.groupby(["split", "system"], sort=False):
        ranks = rows["rank"].to_numpy(dtype=np.float64)
        ranks[(ranks == 0) | (ranks > k)] = np.inf
        metrics = ranking_metrics(ranks, ks=(5, 10, 20))
        print(f"{split:<12}{system:<12}" + "".join(f"{metrics[name]:>11.4f}" for name in COLUMNS))


def main(argv: list[str] | None = None) -> None:
    """Prepares the data where that is still to do, runs the retrieval stage, and prints its results."""
    data_args, args, stage_args = make_parser().parse_args_and_config(argv)

    from ulmrec_hf.data.prepare import prepare_data
    from ulmrec_hf.retrieval.stage import train_retriever

    data_folder = prepare_data(data_args, stage_args.output_dir, overwrite=stage_args.overwrite)
    folder = train_retriever(args, data_folder, stage_args.output_dir, overwrite=stage_args.overwrite)
    print_results(folder, args.num_candidates)
    print(f"\nWritten: {folder}")


if __name__ == "__main__":
    run_script(main)
