"""Tuning the systems of a run as stages: from rendered tasks to scored models, resumed after a kill."""

import copy
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, set_seed
from trl import ModelConfig

from .console import Console, quiet_trainer
from .files import atomic_folder, read_json, write_json, write_table
from .indexing.base import load_indexer
from .modeling import BaseSource, add_adapter, base_is_saved, extend_base, load_model, resolve_base, start_user_tokens
from .protocol import EVALUATED, SPLITS
from .publishing import BASE, ITEMS_FILE, TEMPLATES_FILE, USER_INDEX_FILE, Published, publish_model
from .ranker import RankerSettings
from .recommender import Fusion, write_parts
from .retrieval.base import load_retriever
from .settings import PipelineArguments
from .stages import Processes, run_stage, stage_fingerprint
from .systems import RANKER, System, model_folder, task_folder, with_own_stages
from .tables import PREDICTIONS, LeaveOneOut, read_table
from .tasks.arguments import TaskArguments
from .tasks.batches import count_steps
from .tokenization_user import UserTokenizer
from .trainer import ULMRecTrainer, ULMRecTrainingArguments
from .user_index import KINDS, UserIndex
from .verbalizer import LetterVerbalizer

logger = logging.getLogger(__name__)
# Settings that decide what a tuned model is; the others (logging, workers, devices) may differ when a run is resumed.
TUNING_SETTINGS = (
    "learning_rate",
    "user_token_learning_rate",
    "num_train_epochs",
    "max_steps",
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
    "loss_weights",
    "max_tokens_per_pass",
    "label_smoothing_factor",
    "neftune_noise_alpha",
)
# Later log entries (times, speed) are of no use to a reader and differ from run to run.
_LOGGED = ("step", "epoch", "loss", "learning_rate", "grad_norm", "eval_loss")


@dataclass(frozen=True)
class Publisher:
    """Fills a run's `model/` with what `Recommender.from_pretrained` reads.

    Attributes:
        run: the run's output folder.
        tasks: how the rows of the tuning were made.
        pipeline: what is written.
    """

    run: Path
    tasks: TaskArguments
    pipeline: PipelineArguments

    @property
    def settings(self) -> dict[str, Any]:
        """What decides what is written, for the stage."""
        names = ("save_merged", "save_user_map", "fusion_ranker", "fusion_retriever")
        return {name: getattr(self.pipeline, name) for name in names}

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: UserTokenizer,
        folder: Path,
        source: BaseSource,
    ) -> None:
        """Writes into `folder`; `source` is where the base is."""
        run, pipeline = self.run, self.pipeline
        published = Published(
            source,
            asdict(RankerSettings.of(self.tasks)),
            merged=pipeline.save_merged,
            save_base=source.extended,
            files={
                ITEMS_FILE: run / "data" / "items.parquet",
                TEMPLATES_FILE: self.tasks.prompt_templates,
            },
        )
        publish_model(model, tokenizer, folder, published)
        if pipeline.save_user_map:  # what training rows showed of the users is of no use later
            users = UserIndex.from_parquet(run / "index" / "user_index.parquet")
            users.to_parquet(folder / USER_INDEX_FILE, earlier=False)
        write_parts(
            folder,
            LeaveOneOut.load(run / "data") if pipeline.save_user_map else None,
            load_retriever(run / "retriever"),
            load_indexer(run / "index" / "indexer"),
            Fusion(pipeline.fusion_ranker, pipeline.fusion_retriever),
        )


@dataclass(frozen=True)
class Tuning:
    """How every system of a run is tuned.

    Attributes:
        run: the run's output folder.
        model: the base and its adapter.
        training: the Trainer's arguments.
        tokenizer: the base's, with the user tokens of the run.
        num_candidates: letters that are scored.
        save_base, validation_users: see `PipelineArguments`.
        seed: of the choice of the validation users, and of the shuffle of a placebo's indices.
        user_token_start: see `PipelineArguments`.
    """

    run: Path
    model: ModelConfig
    training: ULMRecTrainingArguments
    tokenizer: UserTokenizer
    num_candidates: int
    save_base: bool | None = None
    validation_users: int = 0
    seed: int = 0
    user_token_start: str = "preferences"

    @property
    def processes(self) -> Processes:
        """The processes that tune together."""
        training = self.training
        several = training.world_size > 1
        return Processes(training.process_index == 0, PartialState().wait_for_everyone if several else lambda: None)

    def steps(self) -> int:
        """How many steps every system is tuned for: as many as the ranker needs for its epochs."""
        training = self.training
        if training.max_steps > 0:
            return training.max_steps
        files = _row_files(task_folder(RANKER, self.run), "train")
        rows = sum(pq.read_metadata(path).num_rows for path in files)
        steps = count_steps(rows, training.step_rows, training.world_size)
        return max(1, math.ceil(training.num_train_epochs * steps))

    def settings(self) -> dict[str, Any]:
        """What decides the tuned model, for its stage."""
        chosen = {name: getattr(self.training, name, None) for name in TUNING_SETTINGS}
        chosen |= asdict(self.model) | {"save_base": self.save_base, "validation_users": self.validation_users}
        chosen["user_token_start"] = self.user_token_start
        chosen["max_steps"] = self.steps()
        # what counts is the rows of a step, however many processes share them
        return chosen | {"batch_size": self.training.step_rows}


def tune(
    tuning: Tuning, systems: Sequence[System], console: Console, publish: Publisher, *, overwrite: bool = False
) -> None:
    """Tunes the ranker (`model/`) and each of `systems` that has its own stage (`ablations/<name>/model/`).

    All are tuned for as many steps as the ranker. Each stage holds training.json and predictions.parquet; the ranker
    also scores the rows of the systems without a stage, and is published. Every process of a distributed run calls
    this. A killed tuning resumes from its last checkpoint.

    Raises:
        ValueError: the stage of another run stands in a folder.
    """
    tuning.processes.wait()  # the main process comes here when the earlier stages are done
    for system in with_own_stages(systems):
        folder, own = model_folder(system, tuning.run), system is RANKER
        scored = [system, *(other for other in systems if own and not other.has_own_stage)]
        settings = {"system": system.name, "also_scored": [other.name for other in scored[1:]]}
        with console.stage(system.name, folder) as stage:
            run_stage(
                folder,
                tuning.settings() | settings | (publish.settings if own else {}),
                {each.name: stage_fingerprint(task_folder(each, tuning.run)) for each in scored},
                partial(_build, tuning, scored, publish if own else None),
                overwrite=overwrite,
                resume=True,
                processes=tuning.processes,
            )
            best = read_json(folder / "training.json")["best_metric"]
            if best is not None:
                stage.found(f"best validation {tuning.training.metric_for_best_model} {best:.3f}")


def _build(tuning: Tuning, scored: Sequence[System], publish: Publisher | None, folder: Path) -> None:
    """Tunes the first of the systems, unless it is the base, scores all of them, and fills the stage `folder`."""
    training = tuning.training
    # the ranker's stage holds the base that all systems are tuned on
    source = _prepare_base(tuning, folder / BASE if publish else model_folder(RANKER, tuning.run) / BASE)
    tasks = {system.name: task_folder(system, tuning.run) for system in scored}
    with training.main_process_first(desc="loading the tasks"):  # the others read its cache
        splits = SPLITS if scored[0].model == "own" else EVALUATED
        rows = {split: _load_rows(tasks[scored[0].name], split, folder / "cache") for split in splits}
        others = {
            (each.name, split): _load_rows(tasks[each.name], split, folder / "cache")
            for each in scored[1:]
            for split in EVALUATED
        }
    set_seed(training.seed)
    model = load_model(source.path, tuning.model, tuning.tokenizer, seed=training.seed)
    users = scored[0].user_index(UserIndex.from_parquet(tuning.run / "index" / "user_index.parquet"), tuning.seed)
    if tuning.user_token_start == "preferences" and users is not None and KINDS[users.kind].adds_tokens:
        preferences = read_table(
            tuning.run / "preferences" / "preferences.parquet", ["user_id", "position", "preference"]
        )
        start_user_tokens(model, tuning.tokenizer, users, preferences)
    model = add_adapter(model, tuning.model, tuning.tokenizer, seed=training.seed)
    trainer = _make_trainer(tuning, model, folder / "checkpoints", rows)
    # every system of a run draws the same numbers, whatever was made before it
    set_seed(training.seed)
    shares = {}
    if "train" in rows:
        shares = {name: round(share, 4) for name, share in trainer.loss_shares().items() if share}
        logger.info("Shares of the tasks in the loss of %s: %s", scored[0].name, shares)
        trainer.train(resume_from_checkpoint=last_checkpoint(folder / "checkpoints"))
    history = [
        {name: value for name, value in entry.items() if name in _LOGGED or "@" in name}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]
    evaluated = {(scored[0].name, split): rows[split] for split in EVALUATED} | others
    predictions = [_predictions(trainer, *name, its_rows) for name, its_rows in evaluated.items()]
    if training.process_index == 0:
        record = {"system": scored[0].name, "best_metric": trainer.state.best_metric, "loss_shares": shares}
        record["history"] = history
        write_json(folder / "training.json", record)
        write_table(folder / "predictions.parquet", pa.concat_tables(predictions))
        if publish is not None:
            publish(trainer.accelerator.unwrap_model(trainer.model), tuning.tokenizer, folder, source)
        for work in ("checkpoints", "cache"):
            shutil.rmtree(folder / work, ignore_errors=True)


def _prepare_base(tuning: Tuning, folder: Path) -> BaseSource:
    """Where the base to tune is; it is extended into `folder` where it is to be saved and is not there yet."""
    path, model, seed = resolve_base(tuning.model.model_name_or_path), tuning.model, tuning.training.seed
    revision = None if Path(path).is_dir() else model.model_revision
    if not base_is_saved(path, tuning.save_base):
        return BaseSource(path, revision=revision, seed=seed)
    if tuning.processes.is_main and not folder.is_dir():
        with atomic_folder(folder) as partial:
            extend_base(path, tuning.tokenizer, partial, seed, dtype=model.dtype, revision=revision)
    tuning.processes.wait()
    return BaseSource(str(folder), extended=True, seed=seed)


def _make_trainer(tuning: Tuning, model: PreTrainedModel, folder: Path, rows: Mapping[str, Dataset]) -> ULMRecTrainer:
    args = copy.copy(tuning.training)
    args.output_dir = str(folder)
    args.max_steps = tuning.steps()
    validation = rows["validation"]
    if 0 < tuning.validation_users < len(validation):
        chosen = np.random.default_rng(tuning.seed).permutation(len(validation))
        validation = validation.select(np.sort(chosen[: tuning.validation_users]))
    trainer = ULMRecTrainer(
        model,
        args,
        train_dataset=rows.get("train"),
        eval_dataset=None if args.eval_strategy == "no" else validation,
        processing_class=tuning.tokenizer,
        verbalizer=LetterVerbalizer(tuning.tokenizer, validation[0]["prompt"], tuning.num_candidates),
    )
    quiet_trainer(trainer)
    return trainer


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint: Trainer writes trainer_state.json last, so a half-written one lacks it."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return str(max(found, key=lambda path: int(path.name.rpartition("-")[2]))) if found else None


def _row_files(tasks: Path, split: str) -> list[Path]:
    """Training rows of the mixture, evaluation rows of next_item."""
    return sorted((tasks / ("mixture" if split == "train" else "next_item")).glob(f"{split}-*.parquet"))


def _load_rows(tasks: Path, split: str, cache: Path) -> Dataset:
    return Dataset.from_parquet([str(path) for path in _row_files(tasks, split)], cache_dir=str(cache))


def _predictions(trainer: ULMRecTrainer, system: str, split: str, rows: Dataset) -> pa.Table:
    scores = trainer.rank(rows)
    counts = [len(candidates) for candidates in rows["candidates"]]
    columns = {
        "system": pa.repeat(system, len(rows)),
        "split": pa.repeat(split, len(rows)),
        "user": pa.array(rows["user"], pa.int32()),
        "scores": [row[:count] for row, count in zip(scores, counts, strict=True)],
        "label": pa.array(rows["label"], pa.int8()),
    }
    return pa.table(columns, schema=PREDICTIONS)
