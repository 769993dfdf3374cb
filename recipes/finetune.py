"""The main job: from raw reviews to an evaluated, loadable, user-aware recommender.

    accelerate launch recipes/finetune.py --config recipes/configs/quickstart.yaml

Each stage writes its folder under --output_dir: data/, retriever/, preferences/, index/, model/, report/. The same
command resumes where it was stopped; what is up to date is not run again.
"""

import sys
from pathlib import Path

import yaml
from trl import ModelConfig, TrlParser

from ulmrec_hf.cli import run_alone, run_script
from ulmrec_hf.console import quiet_imports

with quiet_imports():
    from ulmrec_hf.data.arguments import DataArguments
    from ulmrec_hf.indexing.arguments import IndexArguments
    from ulmrec_hf.main_job import make_console, make_tuning, prepare_stages, write_report
    from ulmrec_hf.preferences.arguments import PreferenceArguments
    from ulmrec_hf.retrieval.arguments import RetrieverArguments
    from ulmrec_hf.settings import PipelineArguments, Settings
    from ulmrec_hf.tasks.arguments import TaskArguments
    from ulmrec_hf.trainer import ULMRecTrainingArguments, check_processes
    from ulmrec_hf.tuning import Publisher, tune


def make_parser() -> TrlParser:
    """The parser of all settings, our own first."""
    return TrlParser(
        [DataArguments, PipelineArguments, TaskArguments, ModelConfig, ULMRecTrainingArguments], description=__doc__
    )


def read_stage_config(path: str | None, arguments: type, **fixed):
    """The settings of an earlier stage from its YAML file, found from here or beside the recipes."""
    given = {}
    if path is not None:
        found = next((base for base in (Path(path), Path(__file__).parent / path) if base.is_file()), None)
        if found is None:
            raise ValueError(
                f"{path} does not exist; check the settings retriever_config, preference_config and index_config."
            )
        given = yaml.safe_load(found.read_text(encoding="utf-8")) or {}
        if not isinstance(given, dict):
            raise ValueError(f"{found} holds no settings: lines of the form `name: value` are expected.")
        unknown = sorted(set(given) - set(arguments.__dataclass_fields__))
        if unknown:
            raise ValueError(f"{found}: unknown settings {', '.join(unknown)}.")
    return arguments(**{**given, **fixed})


def parse(argv: list[str] | None = None) -> Settings:
    """Settings from YAML and the command line."""
    data, pipeline, tasks, model, training = make_parser().parse_args_and_config(args=argv)
    check_processes(training)
    positions = {"train_positions": tasks.train_positions}
    settings = Settings(
        data=data,
        retriever=read_stage_config(pipeline.retriever_config, RetrieverArguments, **positions),
        preferences=read_stage_config(pipeline.preference_config, PreferenceArguments, **positions),
        index=read_stage_config(pipeline.index_config, IndexArguments, **positions),
        tasks=tasks,
        pipeline=pipeline,
        model=model,
        training=training,
    )
    settings.check()
    return settings


def tune_run(settings: Settings) -> None:
    """Tunes and publishes the ranker, and tunes what the report compares it with."""
    pipeline = settings.pipeline
    publish = Publisher(settings.folder, settings.tasks, pipeline)
    tune(make_tuning(settings), pipeline.systems, make_console(settings), publish, overwrite=pipeline.overwrite)


def main(argv: list[str] | None = None) -> None:
    """Runs the stages that are not up to date, then prints the results and where everything is."""
    argv = sys.argv[1:] if argv is None else argv
    settings = parse(argv)
    if settings.pipeline.prepare_only:
        prepare_stages(settings)
        return
    if settings.training.process_index == 0:
        run_alone(__file__, [*argv, "--prepare_only", "true"])
    tune_run(settings)
    if settings.training.process_index == 0:
        write_report(settings)


if __name__ == "__main__":
    run_script(main)
