"""Indexes users: `python recipes/index_users.py --output_dir DIR` writes DIR/index.

Under `accelerate launch` all processes encode the texts, then one of them does the rest.
"""

import os
import sys
from collections.abc import Sequence
from datetime import timedelta

from trl import TrlParser

from ulmrec_hf.cli import run_alone, run_script
from ulmrec_hf.data.arguments import DataArguments, StageArguments
from ulmrec_hf.indexing.arguments import IndexArguments


def make_parser() -> TrlParser:
    return TrlParser((IndexArguments, DataArguments, StageArguments), description=__doc__)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    index, data, stage = make_parser().parse_args_and_config(argv)

    from ulmrec_hf.data.stage import prepare_data
    from ulmrec_hf.indexing.stage import encode_inputs, index_users
    from ulmrec_hf.tables import LeaveOneOut

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        prepared = prepare_data(data, stage.output_dir, overwrite=stage.overwrite)
        folder = index_users(index, LeaveOneOut.load(prepared), stage.output_dir, overwrite=stage.overwrite)
        print(f"User index: {folder / 'user_index.parquet'}")
        return
    import torch
    from accelerate import PartialState

    # All wait while one of them prepares the data.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))
    with state.main_process_first():
        prepared = prepare_data(data, stage.output_dir, overwrite=stage.overwrite)
    encode_inputs(index, LeaveOneOut.load(prepared), stage.output_dir, state, overwrite=stage.overwrite)
    is_main = state.is_main_process
    state.destroy_process_group()
    if is_main:
        run_alone(__file__, argv)


if __name__ == "__main__":
    run_script(main)
