"""The main job: raw interactions to an evaluated, loadable ranker, stage by stage under one output folder."""

import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .files import atomic_folder, hash_file, hash_value, write_json, write_table
from .metrics import MISS, random_order_metrics, ranks_from_scores, top_k_ranks
from .stages import Processes, run_stage, stage_fingerprint
from .user_index import UserIndex

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import ModelConfig

    from .data.arguments import DataArguments
    from .indexing.arguments import IndexArguments
    from .preferences.arguments import PreferenceArguments
    from .retrieval.arguments import RetrieverArguments
    from .tasks.rows import TaskArguments, TaskRows
    from .tokenization_user import UserTokenizer
    from .trainer import ULMRecTrainer, ULMRecTrainingArguments

logger = logging.getLogger(__name__)
EMBEDDED_BASE = "embedded"
RANKER, NO_INDEX, INDEX_ONLY, PLACEBO = "ulmrec", "ulmrec_no_index", "ulmrec_index_only", "ulmrec_placebo"
ABLATIONS = ("no_index", "index_only", "placebo")
SPLITS = ("validation", "test")
# Settings that decide what a tuned model is; the others (logging, workers, devices) may differ when a run goes on.
TUNING_SETTINGS = (
    "learning_rate",
    "user_token_learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "warmup_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "eval_strategy",
    "eval_steps",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "train_sampling_strategy",
    "label_smoothing_factor",
    "neftune_noise_alpha",
)


@dataclass
class PipelineArguments:
    """How the stages are put together.

    Raises:
        ValueError: an unknown ablation.
    """

    retriever_config: str | None = field(default=None, metadata={"help": "YAML of the retriever; default: LRURec."})
    preference_config: str | None = field(
        default=None, metadata={"help": "YAML of the preference extraction; default: key phrases."}
    )
    index_config: str | None = field(
        default=None, metadata={"help": "YAML of the user indexing; default: its defaults."}
    )
    ablations: list[str] = field(
        default_factory=list,
        metadata={
            "help": "More systems for the report: no_index (the same tuning without a user index), index_only (the "
            "ranker without history), placebo (the same tuning with the indices shuffled among users).",
        },
    )
    validation_users: int = field(
        default=0, metadata={"help": "Users whose validation chooses the best model while tuning; 0 = all."}
    )
    save_merged: bool = field(
        default=False, metadata={"help": "Also write model/merged, the adapter merged into its base."}
    )
    save_base: bool | None = field(
        default=None,
        metadata={"help": "Write model/base, the base with user tokens. Default: yes for a folder, no for a hub id."},
    )
    save_user_map: bool = field(
        default=True, metadata={"help": "Put the map from user ids to indices beside the model; ids are personal data."}
    )
    prepare_only: bool = field(default=False, metadata={"help": "Stop before the tuning."})
    overwrite: bool = field(
        default=False, metadata={"help": "Run again what was made with other settings, instead of refusing."}
    )

    def __post_init__(self):
        unknown = sorted(set(self.ablations) - set(ABLATIONS))
        if unknown:
            raise ValueError(f"ablations holds {', '.join(unknown)}; known are {', '.join(ABLATIONS)}.")
        if self.validation_users < 0:
            raise ValueError(f"validation_users is {self.validation_users}; it must be 0 (all) or more.")


class Settings(NamedTuple):
    """All settings of a run."""

    data: "DataArguments"
    retriever: "RetrieverArguments"
    preferences: "PreferenceArguments"
    index: "IndexArguments"
    tasks: "TaskArguments"
    pipeline: PipelineArguments
    model: "ModelConfig"
    training: "ULMRecTrainingArguments"

    @property
    def folder(self) -> Path:
        """The run's output folder."""
        return Path(self.training.output_dir)

    def check(self) -> None:
        """Raises ValueError where settings of different stages do not fit together, before anything is run."""
        if self.retriever.num_candidates < self.tasks.num_candidates:
            raise ValueError(
                f"num_candidates is {self.tasks.num_candidates}, but the retriever brings "
                f"{self.retriever.num_candidates}: raise it in retriever_config."
            )
        if not self.model.model_name_or_path:
            raise ValueError(
                "model_name_or_path is not set: name a causal language model (hub id or folder), or 'embedded' for the "
                "small one that comes with the package."
            )

    def tokenizer(self) -> "UserTokenizer":
        """The base's tokenizer with this run's user tokens, of which an index in plain text has none."""
        from .modeling import load_user_tokenizer

        # unused rows would cost memory and, where they are outputs, probability
        levels = self.index.levels if self.index.index_kind == "codes" else 0
        return load_user_tokenizer(base_path(self.model), levels, self.index.codebook_size, self.model.model_revision)


def base_path(model: "ModelConfig") -> str:
    """Where the base is: `embedded` stands for the package's own small Llama."""
    if model.model_name_or_path == EMBEDDED_BASE:
        return str(resources.files("ulmrec_hf") / "models" / "tiny_llama")
    return model.model_name_or_path


def prepare_stages(settings: Settings) -> None:
    """Runs everything before the tuning: `data/`, `retriever/`, `preferences/`, `index/` and `data/tasks/`.

    Raises:
        ValueError: settings that do not fit together or data that cannot be used; see the stages.
    """
    from .data.stage import prepare_data
    from .indexing.stage import index_users
    from .preferences.stage import extract_preferences
    from .retrieval.stage import train_retriever

    settings.check()
    overwrite = settings.pipeline.overwrite
    tokenizer = settings.tokenizer()
    check_letters(settings.tasks, tokenizer)
    data = prepare_data(settings.data, settings.folder, overwrite=overwrite)
    train_retriever(settings.retriever, data, settings.folder, overwrite=overwrite)
    extract_preferences(settings.preferences, data, settings.folder, overwrite=overwrite)
    index_users(settings.index, data, settings.folder, overwrite=overwrite)
    user_index = UserIndex.from_parquet(settings.folder / "index" / "user_index.parquet")
    write_task_stage(settings, data / "tasks", user_index, tokenizer)


def check_letters(tasks: "TaskArguments", tokenizer: "UserTokenizer") -> None:
    """Raises ValueError where the base's letters are no single tokens: known before anything long is run."""
    from .prompts import PromptTemplates
    from .verbalizer import LetterVerbalizer

    fields = dict.fromkeys(("user", "history", "candidates", "letter"), "")
    prompt, _ = PromptTemplates.from_yaml(tasks.prompt_templates).render("next_item", **fields)
    LetterVerbalizer(tokenizer, prompt, tasks.num_candidates)


def write_task_stage(
    settings: Settings, folder: Path, user_index: UserIndex | None, tokenizer: "UserTokenizer"
) -> Path:
    """Renders the six tasks with one user index (the real one, the placebo's, or none) into `folder`."""
    from .tasks.rows import write_tasks

    tables = task_tables(settings)
    inputs = {
        stage: stage_fingerprint(settings.folder / stage) for stage in ("data", "retriever", "preferences", "index")
    }
    inputs["tokenizer"] = hash_value(tokenizer.backend_tokenizer.to_str())
    if settings.tasks.prompt_templates:
        inputs["prompt_templates"] = hash_file(settings.tasks.prompt_templates)
    return run_stage(
        folder,
        {name: value for name, value in asdict(settings.tasks).items() if name != "prompt_templates"},
        inputs,
        lambda partial: write_tasks(
            settings.tasks, user_index=user_index, tokenizer=tokenizer, folder=partial, **tables
        ),
        overwrite=settings.pipeline.overwrite,
    )


def task_tables(settings: Settings) -> dict[str, pa.Table]:
    """The tables that task rows are made from."""
    folder = settings.folder
    paths = {
        "sequences": folder / "data" / "sequences.parquet",
        "items": folder / "data" / "items.parquet",
        "candidates": folder / "retriever" / "candidates.parquet",
        "preferences": folder / "preferences" / "preferences.parquet",
    }
    return {name: pq.read_table(path, memory_map=True) for name, path in paths.items()}


def tune(settings: Settings) -> None:
    """Tunes and publishes the ranker (`model/`) and the ablations that were asked for (`ablations/`).

    Every process of a distributed run calls this. A killed tuning goes on from its last checkpoint.
    """
    _barrier(settings.training)()  # the main process comes here when the earlier stages are done
    _tune(settings, RANKER, settings.folder / "model", settings.folder / "data" / "tasks")
    if "no_index" in settings.pipeline.ablations:
        tasks = settings.folder / "data" / "tasks"
        if settings.index.index_kind != "codes":  # only user tokens can be told from other text and taken out later
            with settings.training.main_process_first(local=False, desc="rendering the tasks without an index"):
                folder = settings.folder / "ablations" / "no_index_tasks"
                tasks = write_task_stage(settings, folder, None, settings.tokenizer())
        _tune(settings, NO_INDEX, settings.folder / "ablations" / "no_index", tasks)
    if "placebo" in settings.pipeline.ablations:
        folder = settings.folder / "ablations" / "placebo"
        with settings.training.main_process_first(local=False, desc="rendering the placebo's tasks"):
            user_index = UserIndex.from_parquet(settings.folder / "index" / "user_index.parquet")
            shuffled = user_index.shuffled(settings.tasks.task_seed)
            tasks = write_task_stage(settings, folder / "tasks", shuffled, settings.tokenizer())
        _tune(settings, PLACEBO, folder / "model", tasks)


def _tune(settings: Settings, system: str, folder: Path, tasks: Path) -> None:
    training, model = settings.training, settings.model
    index_only = system == RANKER and "index_only" in settings.pipeline.ablations
    chosen = {name: getattr(training, name, None) for name in TUNING_SETTINGS}
    chosen |= {name: value for name, value in asdict(model).items() if name != "model_name_or_path"}
    chosen |= {
        name: getattr(settings.pipeline, name)
        for name in ("validation_users", "save_merged", "save_base", "save_user_map")
    }
    chosen |= {"model": model.model_name_or_path, "system": system, "index_only": index_only}
    # what counts is the rows of a step, however many processes share them
    chosen["batch_size"] = training.world_size * math.prod(
        chosen.pop(name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    run_stage(
        folder,
        chosen,
        {"tasks": stage_fingerprint(tasks)},
        lambda partial: _build_model(settings, system, partial, tasks, index_only),
        overwrite=settings.pipeline.overwrite,
        resume=True,
        processes=Processes(training.process_index == 0, _barrier(training)),
    )


def _build_model(settings: Settings, system: str, folder: Path, tasks: Path, index_only: bool) -> None:
    """Tunes one system in a stage's partial folder: scores both splits, publishes the model, removes checkpoints."""
    from transformers import set_seed

    from . import modeling
    from .tasks.rows import TaskRows, strip_user_tokens

    training, pipeline = settings.training, settings.pipeline
    is_main, wait = training.process_index == 0, _barrier(training)
    tokenizer = settings.tokenizer()
    base, base_saved = base_path(settings.model), modeling.base_is_saved(base_path(settings.model), pipeline.save_base)
    if base_saved and system != RANKER:
        base = str(settings.folder / "model" / modeling.BASE)
    elif base_saved:
        extended = folder / modeling.BASE
        if is_main and not extended.is_dir():
            revision = settings.model.model_revision
            with atomic_folder(extended) as partial:
                modeling.extend_base(
                    base, tokenizer, partial, training.seed, dtype=settings.model.dtype, revision=revision
                )
        wait()
        base = str(extended)

    rows: dict[str, Dataset] = {}
    with training.main_process_first(desc="loading the tasks"):  # the others read its cache
        for split in ("train", *SPLITS):
            config = "mixture" if split == "train" else "next_item"
            rows[split] = _load_rows(tasks / config, split, folder / "cache")
            if system == NO_INDEX:
                rows[split] = rows[split].map(
                    lambda row: {name: strip_user_tokens(row[name]) for name in ("prompt", "completion")},
                    desc="Removing user tokens",
                )
    set_seed(training.seed)
    model = modeling.load_base(base, settings.model, tokenizer, seed=training.seed)
    model = modeling.add_adapter(model, settings.model, tokenizer, seed=training.seed)
    trainer = _make_trainer(settings, model, tokenizer, folder / "checkpoints", rows)
    # every system of a run draws the same numbers, whatever was made before it
    set_seed(training.seed)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder / "checkpoints"))
    # later log entries (times, speed) are of no use to a reader and differ from run to run
    kept = ("step", "epoch", "loss", "learning_rate", "grad_norm")
    history = [
        {name: value for name, value in entry.items() if name in kept or "@" in name or name == "eval_loss"}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]
    predictions = [_predictions(trainer, system, split, rows[split]) for split in SPLITS]
    if index_only:
        renderer = TaskRows(
            settings.tasks,
            user_index=UserIndex.from_parquet(settings.folder / "index" / "user_index.parquet"),
            tokenizer=tokenizer,
            **task_tables(settings),
        )
        predictions += [_predictions(trainer, INDEX_ONLY, split, _without_history(renderer, split)) for split in SPLITS]
    state = (
        trainer.accelerator.get_state_dict(trainer.model)
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        else None
    )
    if is_main:
        write_json(
            folder / "training.json", {"system": system, "best_metric": trainer.state.best_metric, "history": history}
        )
        write_table(folder / "predictions.parquet", pa.concat_tables(predictions))
        if system == RANKER:
            modeling.publish_model(
                trainer.accelerator.unwrap_model(trainer.model),
                tokenizer,
                folder,
                base=base,
                base_saved=base_saved,
                settings={
                    name: getattr(settings.tasks, name)
                    for name in ("num_candidates", "max_history", "max_title_tokens", "max_length")
                },
                merged=pipeline.save_merged,
                revision=settings.model.model_revision,
                user_index=settings.folder / "index" / "user_index.parquet" if pipeline.save_user_map else None,
                items=settings.folder / "data" / "items.parquet",
                templates=settings.tasks.prompt_templates,
                state_dict=state,
                seed=training.seed,
            )
        for work in ("checkpoints", "cache"):
            shutil.rmtree(folder / work, ignore_errors=True)


def _make_trainer(
    settings: Settings, model: Any, tokenizer: "UserTokenizer", folder: Path, rows: dict[str, "Dataset"]
) -> "ULMRecTrainer":
    import copy

    from .trainer import ULMRecTrainer
    from .verbalizer import LetterVerbalizer

    args = copy.copy(settings.training)
    args.output_dir = str(folder)
    validation = rows["validation"]
    if 0 < settings.pipeline.validation_users < len(validation):
        chosen = np.random.default_rng(settings.tasks.task_seed).permutation(len(validation))
        validation = validation.select(np.sort(chosen[: settings.pipeline.validation_users]))
    verbalizer = LetterVerbalizer(tokenizer, validation[0]["prompt"], settings.tasks.num_candidates)
    return ULMRecTrainer(
        model,
        args,
        train_dataset=rows["train"],
        eval_dataset=None if args.eval_strategy == "no" else validation,
        processing_class=tokenizer,
        verbalizer=verbalizer,
    )


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint: Trainer writes trainer_state.json last, so a half-written one lacks it."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return str(max(found, key=lambda path: int(path.name.rpartition("-")[2]))) if found else None


def _load_rows(folder: Path, split: str, cache: Path) -> "Dataset":
    from datasets import Dataset

    return Dataset.from_parquet([str(path) for path in sorted(folder.glob(f"{split}-*.parquet"))], cache_dir=str(cache))


def _without_history(renderer: "TaskRows", split: str) -> "Dataset":
    from datasets import Dataset

    return Dataset.from_list(list(renderer.rows("next_item", split, history=False)))


def _predictions(trainer: "ULMRecTrainer", system: str, split: str, rows: "Dataset") -> pa.Table:
    scores = trainer.rank(rows)
    counts = [len(candidates) for candidates in rows["candidates"]]
    return pa.table(
        {
            "system": pa.repeat(system, len(rows)),
            "split": pa.repeat(split, len(rows)),
            "user": pa.array(rows["user"], pa.int32()),
            "scores": pa.array(
                [row[:count] for row, count in zip(scores, counts, strict=True)], pa.list_(pa.float32())
            ),
            "label": pa.array(rows["label"], pa.int8()),
        }
    )


def _barrier(training: "ULMRecTrainingArguments") -> Callable[[], None]:
    from accelerate import PartialState

    return PartialState().wait_for_everyone if training.world_size > 1 else lambda: None


def write_report(settings: Settings) -> str:
    """Writes `report/` from what the stages left; returns a table for the terminal."""
    from .report import Report, plot_code_use, plot_training

    folder = settings.folder
    stages = ["retriever", "index", "data/tasks", "model"]
    stages += [
        f"ablations/{name}" + ("/model" if name == "placebo" else "")
        for name in ABLATIONS
        if name != "index_only" and name in settings.pipeline.ablations
    ]
    predictions = {}
    for stage in stages[3:]:
        table = pq.read_table(folder / stage / "predictions.parquet")
        for system in pa.compute.unique(table["system"]).to_pylist():
            for split in SPLITS:
                rows = table.filter((pa.compute.field("system") == system) & (pa.compute.field("split") == split))
                predictions[system, split] = rows
    labels = {split: predictions[RANKER, split]["label"].to_numpy() for split in SPLITS}
    notes = _protocol(settings)
    report = Report({split: labels[split] != MISS for split in SPLITS}, settings.tasks.num_candidates, notes=notes)
    order = settings.tasks.evaluation_order
    candidates = pq.read_table(folder / "retriever" / "candidates.parquet", columns=["split", "user", "target_rank"])
    ranks = pq.read_table(folder / "retriever" / "ranks.parquet").sort_by("user")
    for split in SPLITS:
        scores = predictions[RANKER, split]["scores"]
        counts = pa.compute.list_value_length(scores).to_numpy()
        report.add("random", split, random_order_metrics(counts, labels[split]), order="random")
        for system in pa.compute.unique(ranks["system"]).to_pylist():
            rows = ranks.filter((pa.compute.field("system") == system) & (pa.compute.field("split") == split))
            report.add(system, split, top_k_ranks(rows["rank"], settings.tasks.num_candidates), order="own")
        rows = candidates.filter(pa.compute.field("split") == split).sort_by("user")
        report.add(
            "retriever", split, top_k_ranks(rows["target_rank"], settings.tasks.num_candidates), order="retriever"
        )
        for (system, its_split), rows in predictions.items():
            if its_split == split:
                report.add(system, split, _ranks(rows), order=order)
    systems = {system for system, _ in predictions}
    pairs = [
        (a, b)
        for a, b in (
            (RANKER, "retriever"),
            (RANKER, NO_INDEX),
            (RANKER, PLACEBO),
            (PLACEBO, NO_INDEX),
            (RANKER, "random"),
            (INDEX_ONLY, "random"),
        )
        if a in systems and b in systems | {"retriever", "random"}
    ]

    def build(partial: Path) -> None:
        report.write(partial, pairs)
        runs = {}
        for stage in stages[3:]:
            record = json.loads((folder / stage / "training.json").read_text(encoding="utf-8"))
            runs[record["system"]] = record["history"]
        plot_training(partial / "training.png", runs)
        index = UserIndex.from_parquet(folder / "index" / "user_index.parquet")
        plot_code_use(partial / "code_use.png", index.codes, index.codebook_size)

    inputs = {stage: stage_fingerprint(folder / stage) for stage in stages}
    run_stage(folder / "report", {"notes": notes}, inputs, build, overwrite=True)
    rows = json.loads((folder / "report" / "metrics.json").read_text(encoding="utf-8"))
    return report.summary(rows)


def _ranks(predictions: pa.Table) -> np.ndarray:
    lists = predictions["scores"].to_pylist()
    scores = np.full((len(lists), max(map(len, lists), default=0)), -np.inf, np.float32)
    for row, values in zip(scores, lists, strict=True):
        row[: len(values)] = values
    return ranks_from_scores(scores, predictions["label"].to_numpy())


def _protocol(settings: Settings) -> Sequence[str]:
    from .retrieval.stage import protocol_notes

    evidence, kind = settings.preferences.evidence, settings.index.index_kind
    return [
        "Leave-one-out: the last item of each user is the test target, the one before it the validation target.",
        f"Evidence: {evidence}. "
        + (
            "What describes a user (index, preference, ratings shown) comes from the train part alone."
            if evidence == "train"
            else "Preferences come from all interactions, the test target's review included: these results leak."
        ),
        f"Candidates: the top {settings.tasks.num_candidates} of {settings.retriever.retriever}; a target that is not "
        "among them is a miss for every system that ranks them. Retrievers are scored on their own top.",
        f"Evaluation order of the candidates: {settings.tasks.evaluation_order}. Equal scores share the mean of their "
        "places.",
        "random: the exact expectation over all orders of the candidates.",
        *([f"User index: {kind}, as plain text without user tokens."] if kind != "codes" else []),
        *protocol_notes(settings.retriever),
    ]
