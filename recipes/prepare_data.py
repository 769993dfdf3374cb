"""Prepares raw interaction data: reads, filters, numbers and writes it to `output_dir/data`.

python recipes/prepare_data.py --data_format amazon --interactions Gift_Cards_5.json.gz --items meta_Gift_Cards.json.gz
"""

import json
import logging
from collections.abc import Sequence

from trl import TrlParser

from ulmrec_hf.cli import run_script
from ulmrec_hf.data.arguments import DataArguments, StageArguments
from ulmrec_hf.data.stage import prepare_data


def make_parser() -> TrlParser:
    return TrlParser([DataArguments, StageArguments], description=__doc__.splitlines()[0])


def main(argv: Sequence[str] | None = None) -> None:
    data_args, stage_args = make_parser().parse_args_and_config(args=argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    folder = prepare_data(data_args, stage_args.output_dir, overwrite=stage_args.overwrite)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for name, value in summary.items():
        print(f"{name.replace('_', ' '):<28}{value:>12,}")
    print(f"Written to {folder}")


if __name__ == "__main__":
    run_script(main)
