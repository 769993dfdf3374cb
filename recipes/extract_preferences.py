"""Extracts users' preferences: `python recipes/extract_preferences.py --output_dir DIR` writes DIR/preferences."""

from collections.abc import Sequence

from trl import TrlParser

from ulmrec_hf.cli import run_script
from ulmrec_hf.data.arguments import DataArguments, StageArguments
from ulmrec_hf.data.stage import prepare_data
from ulmrec_hf.preferences.arguments import PreferenceArguments
from ulmrec_hf.preferences.stage import extract_preferences
from ulmrec_hf.tables import LeaveOneOut


def make_parser() -> TrlParser:
    return TrlParser((PreferenceArguments, DataArguments, StageArguments), description=__doc__)


def main(argv: Sequence[str] | None = None) -> None:
    preference_args, data_args, stage_args = make_parser().parse_args_and_config(argv)
    output_dir, overwrite = stage_args.output_dir, stage_args.overwrite
    data = LeaveOneOut.load(prepare_data(data_args, output_dir, overwrite=overwrite))
    folder = extract_preferences(preference_args, data, output_dir, overwrite=overwrite)
    print(f"Preferences: {folder / 'preferences.parquet'}")


if __name__ == "__main__":
    run_script(main)
