"""Tuning a causal language model as a ranker: transformers' Trainer, evaluated by the letters' logits."""

import os
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
from .tasks.collators import ULMRecCollator, tokenize_rows
from .tasks.dataset import AlignmentTasks
from .verbalizer import LetterVerbalizer


@dataclass
class ULMRecTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the paper's tuning as defaults.

    Changed defaults: learning_rate 1e-4, one epoch, evaluation and checkpoint every 100 steps, the best model by
    validation NDCG@10 kept, batches grouped by length, at most 2 checkpoints, report_to "none", and a time limit for
    waiting processes (ddp_timeout) of a day, since all wait while one of them runs the earlier stages.
    """

    learning_rate: float = setting(1e-4, "Peak learning rate of the adapter (or the model).")
    user_token_learning_rate: float | None = setting(
        None, "Peak learning rate of the user tokens' rows, which start from nothing; default: learning_rate."
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
    train_sampling_strategy: str = setting("group_by_length", "How batches are made; group_by_length pads least.")
    logging_steps: float = setting(10, "Log the loss every so many steps.")
    # HfArgumentParser reads this order of the types only
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="none", metadata={"help": "Experiment tracker, such as wandb."}
    )
    remove_unused_columns: bool = setting(False, "Must stay false: the collator needs them all.")
    ddp_timeout: int = setting(86_400, "Seconds that a process waits for the others.")


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

    Training rows carry loss on the completion only. Evaluation reads the logits of the candidates' letters at the last
    position: scores float32 [rows, candidates], -inf past a row's own candidates. Every row is scored; a target that
    is not among the candidates (label -1) counts as a miss.

    Args:
        model: the language model, with or without an adapter.
        train_dataset: rows with prompt and completion (the config `mixture`), or None.
        eval_dataset: rows with prompt, label and candidates (the config `next_item`), or None.
        processing_class: the tokenizer.
        verbalizer: which token each letter is; by default read off the first row that is evaluated.
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
        with args.main_process_first(desc="tokenizing"):
            if train_dataset is not None:
                train_dataset = tokenize_rows(train_dataset, processing_class)
            if eval_dataset is not None:
                eval_dataset = self._evaluation_rows(eval_dataset, processing_class).sort("length")
        super().__init__(
            model,
            args,
            data_collator=ULMRecCollator(processing_class),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )

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

    def _get_eval_sampler(self, eval_dataset: Dataset) -> torch.utils.data.Sampler | None:
        # Trainer would reshuffle evaluation rows when training batches are grouped by length, and `rank` would return
        # them in another order. They are sorted by length already.
        return torch.utils.data.SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # peft would store whole embedding matrices in every checkpoint of a base that was extended in memory
        # (save_embedding_layers="auto"); the trained rows are all that is needed.
        if hasattr(self.model, "peft_config") and self.args.should_save:
            directory = output_dir or self.args.output_dir
            self.model.save_pretrained(directory, state_dict=state_dict, save_embedding_layers=False)
        else:
            super()._save(output_dir, state_dict)
