"""The main job: raw interactions to an evaluated, loadable recommender, stage by stage under one output folder."""

from dataclasses import replace
from pathlib import Path

import pyarrow.compute as pc
from trl import ModelConfig

from .console import Console
from .data.readers import check_source
from .data.stage import prepare_data
from .figures import number
from .files import read_json
from .indexing.arguments import IndexArguments
from .indexing.stage import index_users
from .metrics import mean
from .modeling import load_user_tokenizer, resolve_base
from .preferences.stage import extract_preferences
from .results import run_notes, write_run_report
from .retrieval.stage import train_retriever
from .settings import Settings
from .stages import stage_fingerprint
from .systems import RANKER, System, model_folder, task_folder, with_own_stages
from .tables import LeaveOneOut, read_table
from .tasks.arguments import TaskArguments
from .tasks.records import MIXTURE, TASKS
from .tasks.stage import TaskSources, write_task_stage
from .tasks.templates import PromptTemplates
from .tokenization_user import UserTokenizer
from .tuning import Tuning
from .user_index import KINDS, UserIndex
from .verbalizer import LetterVerbalizer


def make_console(settings: Settings) -> Console:
    """The console of a run, with one stage for each folder that it makes; its log is `output_dir/log.txt`."""
    tuned = [system.name for system in with_own_stages(settings.pipeline.systems)]
    names = ["data", "retriever", "preferences", "index", "tasks", *tuned, "report"]
    return Console(names, settings.folder / "log.txt", is_main=settings.training.process_index == 0)


def prepare_stages(settings: Settings) -> None:
    """Runs everything before the tuning: `data/`, `retriever/`, `preferences/`, `index/` and the rendered tasks.

    Raises:
        ValueError: settings that do not fit together or data that cannot be used; see the stages.
    """
    settings.check()
    run, overwrite = settings.folder, settings.pipeline.overwrite
    tokenizer = make_tokenizer(settings.model, settings.index)
    check_letters(settings.tasks, tokenizer)
    check_source(settings.data)
    console = make_console(settings)
    with console.stage("data", run / "data") as stage:
        folder = prepare_data(settings.data, run, overwrite=overwrite)
        stage.found(
            "{users:,} users, {items:,} items, {interactions:,} interactions".format(
                **read_json(folder / "summary.json")
            )
        )
    data = LeaveOneOut.load(folder)
    with console.stage("retriever", run / "retriever") as stage:
        folder = train_retriever(settings.retriever, data, run, overwrite=overwrite)
        stage.found(f"{settings.retriever.retriever}: {_retriever_recall(folder, settings.retriever.num_candidates)}")
    with console.stage("preferences", run / "preferences") as stage:
        extract_preferences(settings.preferences, data, run, overwrite=overwrite)
        stage.found(settings.preferences.extractor)
    with console.stage("index", run / "index") as stage:
        quality = read_json(index_users(settings.index, data, run, overwrite=overwrite) / "report.json")
        stage.found(f"lift of held-out items under one code {number(quality['lift_heldout'][0], '.2f')}")
    systems = [system for system in (RANKER, *settings.pipeline.systems) if system is RANKER or system.has_own_tasks]
    with console.stage("tasks", run / "data" / "tasks") as stage:
        users = UserIndex.from_parquet(run / "index" / "user_index.parquet")
        sources = TaskSources.of_run(run, data, users, tokenizer)
        for system in systems:
            render_tasks(system, settings.tasks, sources, run, overwrite=overwrite)
        stage.found(f"prompts of {', '.join(system.name for system in systems)}")


def _retriever_recall(folder: Path, k: int) -> str:
    ranks = read_table(folder / "candidates.parquet", ["split", "target_rank"])
    ranks = ranks.filter(pc.field("split") == "validation")["target_rank"].to_numpy()
    return f"Recall@{k} {mean((ranks >= 1) & (ranks <= k)):.3f} (validation)"


def make_tokenizer(model: ModelConfig, index: IndexArguments) -> UserTokenizer:
    """The base's tokenizer with a run's user tokens, of which an index in plain text has none."""
    # unused rows would cost memory and, where they are outputs, probability
    levels = index.levels if KINDS[index.index_kind].adds_tokens else 0
    return load_user_tokenizer(
        resolve_base(model.model_name_or_path), levels, index.codebook_size, model.model_revision
    )


def check_letters(tasks: TaskArguments, tokenizer: UserTokenizer) -> None:
    """Raises ValueError where the base's letters are not single tokens, before anything long is run."""
    fields = dict.fromkeys(("user", "history", "candidates", "letter"), "")
    prompt, _ = PromptTemplates.from_yaml(tasks.prompt_templates).render("next_item", **fields)
    LetterVerbalizer(tokenizer, prompt, tasks.num_candidates)


def render_tasks(
    system: System, tasks: TaskArguments, sources: TaskSources, run: Path, *, overwrite: bool = False
) -> Path:
    """Renders the tasks of a system of a run as a stage, from the run's sources; returns its folder."""
    configs, changed = None, dict(system.task_settings)  # all of them
    if system is not RANKER:
        configs = ("next_item", MIXTURE) if system.model == "own" else ("next_item",)
        if system.model == "own":
            changed["mixture"] = system.mixture(tasks.mixture, TASKS)
    inputs = {name: stage_fingerprint(run / name) for name in ("data", "retriever", "preferences", "index")}
    return write_task_stage(
        replace(tasks, **changed),
        task_folder(system, run),
        replace(sources, user_index=system.user_index(sources.user_index, tasks.task_seed)),
        inputs | {"spelled index": system.index},
        configs=configs,
        overwrite=overwrite,
    )


def make_tuning(settings: Settings) -> Tuning:
    """How the systems of a run are tuned."""
    return Tuning(
        settings.folder,
        settings.model,
        settings.training,
        make_tokenizer(settings.model, settings.index),
        settings.tasks.num_candidates,
        settings.pipeline.save_base,
        settings.pipeline.validation_users,
        settings.tasks.task_seed,
        settings.pipeline.user_token_start,
    )


def write_report(settings: Settings) -> None:
    """Writes `report/` from the other stages, and prints its table and where everything is."""
    run, console = settings.folder, make_console(settings)
    tuned = with_own_stages(settings.pipeline.systems)
    evidence, kind = settings.preferences.evidence, settings.index.index_kind
    notes = [f"`{system.name}`: {system.help}." for system in settings.pipeline.systems]
    notes += run_notes(settings.retriever, settings.tasks, evidence=evidence, index_kind=kind)
    with console.stage("report", run / "report"):
        models = [model_folder(system, run) for system in tuned]
        table = write_run_report(run, models, tasks=settings.tasks, notes=notes)
    places = {"Model": run / "model", "Report": run / "report" / "report.md", "Tasks": run / "data" / "tasks"}
    console.results(table, places)
