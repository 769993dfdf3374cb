"""Extracts users' preferences: `python recipes/extract_preferences.py --output_dir DIR` writes DIR/preferences."""

from collections.abc import Sequence

from trl import TrlParser

from ulmrec_hf.cli import run_script
from ulmrec_hf.data.arguments import DataArguments, StageArguments
from ulmrec_hf.data.stage import prepare_data
from ulmrec_hf.preferences.arguments import PreferenceArguments
from ulmrec_hf.preferences.stage import extract_preferences


def make_parser() -> TrlParser:
    return TrlParser((PreferenceArguments, DataArguments, StageArguments), description=__doc__)


def main(argv: Sequence[str] | None = None) -> None:
    preferences, data, stage = make_parser().parse_args_and_config(argv)
    data_folder = prepare_data(data, stage.output_dir, overwrite=stage.overwrite)
    folder = extract_preferences(preferences, data_folder, stage.output_dir, overwrite=stage.overwrite)
    print(f"Preferences: {folder / 'preferences.parquet'}")


if __name__ == "__main__":
    run_script(main)
