"""Tuning a causal language model as a ranker: transformers' Trainer, evaluated by the letters' logits."""

import contextlib
import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from .metrics import RankingMetrics
from .protocol import MISS
from .ranker import UserRanker
from .stages import setting
from .tasks.arguments import read_task_numbers
from .tasks.batches import PassLoader, StepSampler
from .tasks.collators import IGNORED, ULMRecCollator, tokenize_rows
from .tasks.dataset import AlignmentTasks
from .verbalizer import LetterVerbalizer


@dataclass
class ULMRecTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the paper's tuning as defaults.

    Changed defaults: learning_rate 1e-4, one epoch, evaluation and checkpoint every 100 steps, the best model by
    validation NDCG@10 kept, at most 2 checkpoints, report_to "none", and a time limit for waiting processes
    (ddp_timeout) of a day, since all wait while one of them runs the earlier stages.

    A step's rows, `per_device_train_batch_size * gradient_accumulation_steps` on each process, are drawn at random and
    go through the model in passes of similar length, of at most `per_device_train_batch_size` rows each; see
    `tasks.batches.StepSampler`.

    Raises:
        ValueError: `train_sampling_strategy` is set, which nothing would read.
    """

    learning_rate: float = setting(1e-4, "Peak learning rate of the adapter (or the model).")
    user_token_learning_rate: float | None = setting(
        None, "Peak learning rate of the user tokens' rows; default: learning_rate."
    )
    num_train_epochs: float = setting(1.0, "How often the mixture is gone through.")
    eval_strategy: str = setting("steps", "When to evaluate: no, steps or epoch.")
    eval_steps: float | None = setting(100, "Evaluate every so many steps.")
    save_strategy: str = setting("steps", "When to write a checkpoint: no, steps, epoch, best.")
    save_steps: float = setting(100, "Write a checkpoint every so many steps.")
    save_total_limit: int | None = setting(2, "Checkpoints kept while tuning.")
    load_best_model_at_end: bool = setting(True, "Keep the model that did best in validation.")
    metric_for_best_model: str | None = setting("ndcg@10", "What decides which model is best.")
    greater_is_better: bool | None = setting(True, "Whether a larger metric is better.")
    max_tokens_per_pass: int = setting(
        0, "Most tokens of a forward pass in training, padding counted; 0 = per_device_train_batch_size rows decide."
    )
    logging_steps: float = setting(10, "Log the loss every so many steps.")
    # HfArgumentParser reads this order of the types only
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="none", metadata={"help": "Experiment tracker, such as wandb."}
    )
    loss_weights: dict[str, float] | str | None = field(
        default_factory=dict,
        metadata={
            "help": "How much a completion's token of each task counts in the loss, 1 where none is given. As JSON on "
            "the command line."
        },
    )
    remove_unused_columns: bool = setting(False, "Must stay false: the collator needs them all.")
    ddp_timeout: int = setting(86_400, "Seconds that a process waits for the others.")

    def __post_init__(self):
        super().__post_init__()
        if self.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy is {self.train_sampling_strategy!r}, but a step's rows are always drawn at "
                "random and then grouped by length: leave it out."
            )
        if self.max_tokens_per_pass < 0:
            raise ValueError(f"max_tokens_per_pass is {self.max_tokens_per_pass}; it must be 0 (no limit) or more.")
        self.loss_weights = read_task_numbers("loss_weights", self.loss_weights or {})

    @property
    def step_rows(self) -> int:
        """Rows of a training step, those of all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size


def check_processes(args: TrainingArguments) -> None:
    """Raises ValueError where launched processes do not know of each other, or would share one copy of the model."""
    for name, flag in (("FSDP", "ACCELERATE_USE_FSDP"), ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED")):
        if os.environ.get(flag, "").lower() in ("1", "true") or getattr(args, name.lower()):
            raise ValueError(
                f"{name} would share one copy of the model among processes, in which rows of user tokens are lost "
                "(DeepSpeed) or tied embeddings cannot be shared (FSDP). Give each process the whole model by "
                "recipes/accelerate/ddp.yaml; where it does not fit, set load_in_4bit."
            )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        raise ValueError(
            f"The launcher started {launched} processes, but each believes that it is one of {args.world_size}: "
            "on CPUs pass --use_cpu true."
        )


def ranking_metrics_of(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics`: Recall, NDCG and MRR at 5 and 10 from letter scores [rows, candidates] and targets [rows]."""
    scores, labels = prediction.predictions, prediction.label_ids
    return RankingMetrics().compute(predictions=list(scores), references=labels.astype(np.int32))


class ULMRecTrainer(Trainer):
    """A Trainer that learns completions and is evaluated by ranking candidates in one forward pass.

    Training rows carry loss on the completion only. The loss of a step is the mean over the completions' tokens of all
    its passes and processes, each token weighed by its task's entry in `loss_weights`: by default, a task's weight is
    its share of these tokens.

    Evaluation reads the logits of the candidates' letters at the last position: scores float32 [rows, candidates], -inf
    past a row's own candidates. Every row is scored; a target that is not among the candidates (label -1) counts as a
    miss.

    Args:
        model: the language model, with or without an adapter.
        train_dataset: rows with prompt and completion (the config `mixture`), or None.
        eval_dataset: rows with prompt, label and candidates (the config `next_item`), or None.
        processing_class: the tokenizer.
        verbalizer: which token each letter is; by default read off the first row that is evaluated.

    Raises:
        ValueError: too few training rows, see `StepSampler`; in training, a loss that is not finite.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: ULMRecTrainingArguments,
        *,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase,
        verbalizer: LetterVerbalizer | None = None,
        **kwargs: Any,
    ):
        self.verbalizer = verbalizer
        kwargs.setdefault("compute_metrics", ranking_metrics_of)
        self._step_rows = args.step_rows
        args = copy.copy(args)
        args.gradient_accumulation_steps = 1  # the passes of a step take its place
        with args.main_process_first(desc="tokenizing"):
            if train_dataset is not None:
                train_dataset = tokenize_rows(train_dataset, processing_class)
            if eval_dataset is not None:
                eval_dataset = self._evaluation_rows(eval_dataset, processing_class).sort("length")
        super().__init__(
            model,
            args,
            data_collator=ULMRecCollator(processing_class, self._task_weights(train_dataset, args.loss_weights)),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.loss_is_scaled_for_ga = True  # `compute_loss` divides by the rows of the whole step

    @staticmethod
    def _task_weights(rows: Dataset | None, weights: Mapping[str, float]) -> list[float] | None:
        """The weight of each task by its number; None where all are 1."""
        if not rows or not weights:
            return None
        if "task" not in rows.features:
            raise ValueError(f"loss_weights is {weights}, but the training rows have no column task: leave it out.")
        by_number = [weights.get(name, 1.0) for name in rows.features["task"].names]
        if not any(by_number[task] for task in set(rows["task"])):
            raise ValueError(f"loss_weights is {weights}, so that no training row counts: raise a task of the mixture.")
        return by_number

    def loss_shares(self) -> dict[str, float]:
        """How much of the loss each task of the training rows is, by name: its completions' tokens times its weight."""
        rows = self.train_dataset
        names = rows.features["task"].names
        tokens = np.bincount(rows["task"], rows["completion_length"], minlength=len(names))
        weighed = tokens * (self.data_collator.task_weights or 1.0)
        return {name: float(share) for name, share in zip(names, weighed / weighed.sum(), strict=True)}

    def _evaluation_rows(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """The rows tokenised, after they have given the verbalizer where there is none yet."""
        if self.verbalizer is None:
            most = max(map(len, dataset["candidates"]))
            self.verbalizer = LetterVerbalizer(tokenizer, dataset[0]["prompt"], most)
        return tokenize_rows(dataset, tokenizer, evaluation=True)

    def evaluate(self, eval_dataset: Dataset | None = None, **kwargs: Any) -> dict[str, float]:
        """The ranking metrics of rows with prompt, label and candidates; by default of the trainer's `eval_dataset`."""
        if eval_dataset is not None and "prompt" in eval_dataset.column_names:
            eval_dataset = self._evaluation_rows(eval_dataset, self.processing_class).sort("length")
        return super().evaluate(eval_dataset, **kwargs)

    def ranker(self, tasks: AlignmentTasks) -> UserRanker:
        """The tuned model as a `UserRanker` that asks as `tasks` did."""
        return UserRanker.from_tasks(self.accelerator.unwrap_model(self.model), self.processing_class, tasks)

    def rank(self, dataset: Dataset) -> np.ndarray:
        """Scores every row's candidates.

        Args:
            dataset: rows with prompt, label and candidates, in any order.

        Returns:
            float32 [rows, most candidates of a row], in the dataset's order; -inf past a row's own candidates. With
            several processes each gets all rows.
        """
        tokenized = self._evaluation_rows(dataset, self.processing_class)
        order = np.argsort(tokenized["length"], kind="stable")
        scores = np.empty((len(order), len(self.verbalizer.ids)), np.float32)
        scores[order] = self.predict(tokenized.select(order), metric_key_prefix="rank").predictions
        return scores[:, : max(tokenized["num_candidates"])]

    def get_train_dataloader(self) -> PassLoader:
        """The passes of this process, by step."""
        args, rows = self.args, self.train_dataset
        if not rows:
            raise ValueError("There is nothing to train on: give the trainer a train_dataset with rows.")
        sampler = StepSampler(
            rows["length"],
            self._step_rows,
            seed=args.seed if args.data_seed is None else args.data_seed,
            max_rows=args.per_device_train_batch_size,
            max_tokens=args.max_tokens_per_pass,
            rank=args.process_index,
            processes=args.world_size,
        )
        generator = torch.Generator()  # of the workers' seeds, so that the global random state is left alone
        names = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor")
        settings = {name: getattr(args, f"dataloader_{name}") for name in names}
        return PassLoader(rows, sampler, self.data_collator, generator=generator, **settings)

    def training_step(self, model, inputs, num_items_in_batch=None):
        passes, total = inputs["passes"], 0.0
        for batch in passes:
            # processes exchange gradients once a step
            alone = self.accelerator.no_sync(model) if batch is not passes[-1] else contextlib.nullcontext()
            with alone:
                total += super().training_step(model, batch, num_items_in_batch)
        if not torch.isfinite(total):
            raise ValueError(
                f"The loss of step {self.state.global_step + 1} is {float(total)}: lower learning_rate "
                f"({self.args.learning_rate:g}) or user_token_learning_rate, or compute more exactly (bf16: false, "
                "fp16: false, dtype: float32)."
            )
        return total

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The weighed sum of a pass's token losses, divided by the weights of all tokens of the step."""
        inputs = dict(inputs)
        labels, weights = inputs.pop("labels"), inputs.pop("weights", None)
        outputs = model(**inputs)
        losses = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].float().transpose(1, 2),
            labels[:, 1:],
            ignore_index=IGNORED,
            reduction="none",
            label_smoothing=self.args.label_smoothing_factor,
        )
        total = losses.sum() if weights is None else losses.sum(1) @ weights
        # processes average their gradients
        loss = total * self.accelerator.num_processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: Sequence[Mapping], device: torch.device) -> torch.Tensor:
        """The weights of all completion tokens of a step, those of all processes; 1 where none counts."""
        total = torch.zeros((), device=device)
        for batch in (batch for step in batch_samples for batch in step["passes"]):
            counts = (batch["labels"] != IGNORED).sum(1).float()
            total += (counts @ batch["weights"] if "weights" in batch else counts.sum()).to(device)
        total = self.accelerator.gather(total).sum()
        return torch.where(total > 0, total, 1.0)  # all rows of a small step may be of tasks with the weight 0

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Of a step: of all its passes."""
        return sum(map(super().floating_point_ops, inputs.get("passes", [inputs])))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        labels, counts = inputs.pop("labels"), inputs.pop("num_candidates")
        with self.compute_loss_context_manager():
            scores = self.verbalizer.scores(model, inputs)
        beyond = torch.arange(scores.shape[1], device=scores.device) >= counts[:, None]
        scores = scores.masked_fill(beyond, -torch.inf)
        hits = labels != MISS
        # a miss has no right letter, hence no loss; the sum over nothing is 0
        losses = torch.nn.functional.cross_entropy(scores[hits], labels[hits], reduction="sum")
        loss = losses / hits.sum().clamp(min=1)
        return (loss, None, None) if prediction_loss_only else (loss, scores, labels)

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        rate = self.args.user_token_learning_rate
        if rate is not None:
            rows = [
                parameter
                for name, parameter in (model or self.model).named_parameters()
                if parameter.requires_grad and "trainable_tokens" in name
            ]
            chosen = set(map(id, rows))
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            if rows:
                optimizer.add_param_group({"params": rows, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # peft would store whole embedding matrices in every checkpoint of a base that was extended in memory
        # (save_embedding_layers="auto"); the trained rows are all that is needed.
        if hasattr(self.model, "peft_config") and self.args.should_save:
            directory = output_dir or self.args.output_dir
            self.model.save_pretrained(directory, state_dict=state_dict, save_embedding_layers=False)
        else:
            super()._save(output_dir, state_dict)
