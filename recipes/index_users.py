"""Indexes users: `python recipes/index_users.py --output_dir DIR` writes DIR/index."""

from collections.abc import Sequence

from trl import TrlParser

from ulmrec_hf.cli import run_script
from ulmrec_hf.data.arguments import DataArguments, StageArguments
from ulmrec_hf.data.prepare import prepare_data
from ulmrec_hf.indexing.arguments import IndexArguments
from ulmrec_hf.indexing.build import index_users


def make_parser() -> TrlParser:
    return TrlParser((IndexArguments, DataArguments, StageArguments), description=__doc__)


def main(argv: Sequence[str] | None = None) -> None:
    index, data, stage = make_parser().parse_args_and_config(argv)
    data_folder = prepare_data(data, stage.output_dir, overwrite=stage.overwrite)
    folder = index_users(index, data_folder, stage.output_dir, overwrite=stage.overwrite)
    print(f"User index: {folder / 'user_index.parquet'}")


if __name__ == "__main__":
    run_script(main)
