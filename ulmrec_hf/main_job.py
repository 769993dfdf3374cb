"""The main job: raw interactions to an evaluated, loadable recommender, stage by stage under one output folder."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data.stage import prepare_data
from .indexing.base import load_indexer
from .indexing.stage import index_users
from .modeling import BaseSource, load_user_tokenizer, resolve_base
from .preferences.stage import extract_preferences
from .publishing import BASE, ITEMS_FILE, TEMPLATES_FILE, USER_INDEX_FILE, Published, publish_model
from .ranker import RankerSettings
from .recommender import Fusion, write_parts
from .results import run_notes, write_run_report
from .retrieval.base import load_retriever
from .retrieval.stage import train_retriever
from .settings import PipelineArguments, Settings
from .stages import stage_fingerprint
from .systems import RANKER, System, model_folder, task_folder
from .tables import LeaveOneOut
from .tasks.records import MIXTURE
from .tasks.stage import write_task_stage
from .tasks.templates import PromptTemplates
from .tuning import Scored, Tuning, tune_system
from .user_index import KINDS, UserIndex
from .verbalizer import LetterVerbalizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import ModelConfig

    from .indexing.arguments import IndexArguments
    from .tasks.arguments import TaskArguments
    from .tokenization_user import UserTokenizer


def prepare_stages(settings: Settings) -> None:
    """Runs everything before the tuning: `data/`, `retriever/`, `preferences/`, `index/` and the rendered tasks.

    Raises:
        ValueError: settings that do not fit together or data that cannot be used; see the stages.
    """
    settings.check()
    run, overwrite = settings.folder, settings.pipeline.overwrite
    tokenizer = make_tokenizer(settings.model, settings.index)
    check_letters(settings.tasks, tokenizer)
    data = LeaveOneOut.load(prepare_data(settings.data, run, overwrite=overwrite))
    train_retriever(settings.retriever, data, run, overwrite=overwrite)
    extract_preferences(settings.preferences, data, run, overwrite=overwrite)
    index_users(settings.index, data, run, overwrite=overwrite)
    for system in [RANKER, *settings.pipeline.systems]:
        if system is RANKER or system.has_own_tasks:
            render_tasks(system, settings.tasks, data, run, tokenizer, overwrite=overwrite)


def make_tokenizer(model: "ModelConfig", index: "IndexArguments") -> "UserTokenizer":
    """The base's tokenizer with a run's user tokens, of which an index in plain text has none."""
    # unused rows would cost memory and, where they are outputs, probability
    levels = index.levels if KINDS[index.index_kind].has_tokens else 0
    return load_user_tokenizer(
        resolve_base(model.model_name_or_path), levels, index.codebook_size, model.model_revision
    )


def check_letters(tasks: "TaskArguments", tokenizer: "UserTokenizer") -> None:
    """Raises ValueError where the base's letters are no single tokens: known before anything long is run."""
    fields = dict.fromkeys(("user", "history", "candidates", "letter"), "")
    prompt, _ = PromptTemplates.from_yaml(tasks.prompt_templates).render("next_item", **fields)
    LetterVerbalizer(tokenizer, prompt, tasks.num_candidates)


def render_tasks(
    system: System,
    tasks: "TaskArguments",
    data: LeaveOneOut,
    run: Path,
    tokenizer: "UserTokenizer",
    *,
    overwrite: bool = False,
) -> Path:
    """Renders the tasks of a system of a run as a stage, from the earlier stages; returns its folder."""
    users = UserIndex.from_parquet(run / "index" / "user_index.parquet")
    configs = None  # all of them
    if system is not RANKER:
        configs = ("next_item", MIXTURE) if system.tuned else ("next_item",)
    return write_task_stage(
        replace(tasks, **system.task_settings),
        task_folder(system, run),
        data=data,
        candidates_path=run / "retriever" / "candidates.parquet",
        preferences_path=run / "preferences" / "preferences.parquet",
        user_index=system.user_index(users, tasks.task_seed),
        tokenizer=tokenizer,
        inputs={name: stage_fingerprint(run / name) for name in ("data", "retriever", "preferences", "index")},
        configs=configs,
        overwrite=overwrite,
    )


def tune(settings: Settings) -> None:
    """Tunes and publishes the ranker (`model/`) and the ablations that were asked for (`ablations/`).

    Every process of a distributed run calls this. A killed tuning resumes from its last checkpoint.
    """
    run, pipeline, tasks = settings.folder, settings.pipeline, settings.tasks
    tuning = Tuning(
        settings.model,
        settings.training,
        make_tokenizer(settings.model, settings.index),
        tasks.num_candidates,
        pipeline.save_base,
        pipeline.validation_users,
        tasks.task_seed,
    )
    tuning.processes.wait()  # the main process comes here when the earlier stages are done
    base, overwrite = run / "model" / BASE, pipeline.overwrite
    rows = {system: Scored(system.name, task_folder(system, run)) for system in (RANKER, *pipeline.systems)}
    written = ("save_merged", "save_user_map", "fusion_ranker", "fusion_retriever")
    tune_system(
        tuning,
        model_folder(RANKER, run),
        [scored for system, scored in rows.items() if system is RANKER or not system.tuned],
        base=base,
        settings={name: getattr(pipeline, name) for name in written},
        publish=partial(_publish, tuning=tuning, run=run, tasks=tasks, pipeline=pipeline),
        overwrite=overwrite,
    )
    for system, scored in rows.items():
        if system is not RANKER and system.tuned:
            tune_system(tuning, model_folder(system, run), [scored], base=base, overwrite=overwrite)


def _publish(
    model: "PreTrainedModel",
    folder: Path,
    source: BaseSource,
    state: Mapping[str, Any] | None,
    *,
    tuning: Tuning,
    run: Path,
    tasks: "TaskArguments",
    pipeline: PipelineArguments,
) -> None:
    """Fills a run's `model/` with what `Recommender.from_pretrained` reads."""
    published = Published(
        source,
        asdict(RankerSettings.of(tasks)),
        merged=pipeline.save_merged,
        save_base=source.extended,
        files={
            USER_INDEX_FILE: run / "index" / "user_index.parquet" if pipeline.save_user_map else None,
            ITEMS_FILE: run / "data" / "items.parquet",
            TEMPLATES_FILE: tasks.prompt_templates,
        },
    )
    publish_model(model, tuning.tokenizer, folder, published, state_dict=state)
    write_parts(
        folder,
        LeaveOneOut.load(run / "data") if pipeline.save_user_map else None,
        load_retriever(run / "retriever"),
        load_indexer(run / "index" / "indexer"),
        Fusion(pipeline.fusion_ranker, pipeline.fusion_retriever),
    )


def write_report(settings: Settings) -> str:
    """Writes `report/` from what the stages left; returns a table for the terminal."""
    run = settings.folder
    tuned = [RANKER, *(system for system in settings.pipeline.systems if system.tuned)]
    notes = run_notes(
        settings.retriever,
        settings.tasks,
        evidence=settings.preferences.evidence,
        index_kind=settings.index.index_kind,
    )
    return write_run_report(run, [model_folder(system, run) for system in tuned], tasks=settings.tasks, notes=notes)
