"""Scores a tuned model on its tasks again, on any number of processes.

accelerate launch recipes/evaluate_ranker.py --model output/quickstart/model --tasks output/quickstart/data/tasks
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from trl import TrlParser

from ulmrec_hf.cli import run_script
from ulmrec_hf.trainer import ULMRecTrainingArguments, check_processes


@dataclass
class EvaluationArguments:
    """What to score."""

    model: str = field(metadata={"help": "The folder model/ of a run."})
    tasks: str = field(metadata={"help": "The folder data/tasks of a run."})
    split: str = field(default="test", metadata={"help": "Which rows of next_item.", "choices": ["validation", "test"]})
    base: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the base, instead of the one that the adapter names."}
    )


def make_parser() -> TrlParser:
    """The parser of this script's settings, our own first."""
    return TrlParser([EvaluationArguments, ULMRecTrainingArguments], description=__doc__)


def main(argv: list[str] | None = None) -> None:
    """Writes report files to --output_dir and prints the metrics."""
    args, training = make_parser().parse_args_and_config(args=argv)
    check_processes(training)
    if not any(Path(args.tasks, "next_item").glob(f"{args.split}-*.parquet")):
        raise ValueError(f"tasks: {args.tasks} has no next_item/{args.split}-*.parquet; name the data/tasks of a run.")
    training.eval_strategy, training.load_best_model_at_end = "no", False  # nothing is tuned

    from datasets import load_dataset

    from ulmrec_hf.publishing import load_published
    from ulmrec_hf.results import write_ranker_report
    from ulmrec_hf.trainer import ULMRecTrainer

    rows = load_dataset(args.tasks, "next_item", split=args.split)
    model, tokenizer = load_published(args.model, args.base, device_map={"": training.device})
    scores = ULMRecTrainer(model, training, processing_class=tokenizer).rank(rows)
    if training.process_index == 0:
        counts = np.array([len(candidates) for candidates in rows["candidates"]])
        labels = rows.with_format("numpy")["label"][:]
        print(write_ranker_report(Path(training.output_dir), args.split, scores, labels, counts))
        print(f"\nReport: {training.output_dir}")


if __name__ == "__main__":
    run_script(main)
