"""Training of the neural retrievers under `transformers.Trainer`, keeping the best epoch by validation NDCG@10."""

import tempfile
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, EvalPrediction, PreTrainedModel, Trainer, TrainingArguments

from ..metrics import ranking_metrics, top_k_places
from ..tables import Sequences
from .arguments import RetrieverArguments
from .rows import EqualBatches, TrainingRows, ValidationRows, collate
from .topk import hide, ranks_of

_EVAL_BATCH = 256


def rank_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Recall@k and NDCG@k from the places that `RetrieverTrainer.prediction_step` returns."""
    _, first, tied = np.asarray(prediction.predictions).T
    metrics = ranking_metrics(top_k_places(first, tied), ks=(10, 20))
    return {name: metrics[name] for name in ("ndcg@10", "recall@10", "recall@20")}


class RetrieverTrainer(Trainer):
    """`Trainer` for a `NeuralRetriever`: `EqualBatches` of `TrainingRows`, ranks of `ValidationRows`, no NaN loss."""

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, **kwargs: Any):
        super().__init__(model, args, data_collator=collate, compute_metrics=rank_metrics, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss of the retriever is {loss.item()} at step {self.state.global_step + 1}: "
                f"lower learning_rate (it is {self.args.learning_rate})."
            )
        return loss

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """(None, see `ranks_of`, targets int64 [batch]); logits of all users would not fit into memory."""
        inputs = self._prepare_inputs(inputs)
        with torch.inference_mode(), self.compute_loss_context_manager():
            scores = model(inputs["input_ids"]).logits.float()
            ranks = ranks_of(hide(scores, inputs["seen"]), inputs["target"])
        return None, ranks, inputs["target"]

    def get_train_dataloader(self) -> DataLoader:
        """`EqualBatches` of the training rows."""
        batches = EqualBatches(self.train_dataset.lengths, self.args.train_batch_size)
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)


def training_arguments(args: RetrieverArguments, folder: str, **others: Any) -> TrainingArguments:
    """The `TrainingArguments` of a retriever: validation once per epoch, checkpoints of the model alone in `folder`.

    With `patience` 0 there is neither validation nor a checkpoint; `others` are further `TrainingArguments`.
    """
    strategy = "epoch" if args.patience else "no"
    return TrainingArguments(
        output_dir=folder,
        seed=args.seed,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        lr_scheduler_type=args.lr_scheduler_type,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=_EVAL_BATCH,
        eval_strategy=strategy,
        save_strategy=strategy,
        save_only_model=True,
        save_total_limit=1,
        load_best_model_at_end=args.patience > 0,
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        **others,
    )


def train(model: PreTrainedModel, sequences: Sequences, args: RetrieverArguments) -> list[dict[str, float]]:
    """Trains on the train part and leaves the best epoch by validation NDCG@10 in `model`; see `Retriever.fit`.

    Checkpoints are in the system's temporary folder (TMPDIR) while training runs.

    Args:
        model: a `NeuralRetriever` with initial weights.
        sequences: whole sequences.

    Returns:
        For each epoch `epoch`, `loss` and, with validation, `ndcg@10`, `recall@10`, `recall@20`.

    Raises:
        ValueError: nothing to train on, nothing to validate on, or a loss that is not finite.
    """
    validation = ValidationRows(sequences, args.max_history) if args.patience else None
    if validation is not None and not len(validation):
        raise ValueError("no user has a validation target after a non-empty train part: set patience to 0.")
    with tempfile.TemporaryDirectory(prefix="retriever-") as checkpoints:
        trainer = RetrieverTrainer(
            model,
            training_arguments(args, checkpoints, metric_for_best_model="ndcg@10", greater_is_better=True),
            train_dataset=TrainingRows(sequences.train_part(), args.max_history),
            eval_dataset=validation,
            callbacks=[EarlyStoppingCallback(args.patience)] if args.patience else None,
        )
        trainer.train()
    epochs: dict[int, dict[str, float]] = {}
    for entry in trainer.state.log_history:
        row = epochs.setdefault(round(entry["epoch"]), {"epoch": round(entry["epoch"])})
        for name in ("loss", "eval_ndcg@10", "eval_recall@10", "eval_recall@20"):
            if name in entry:
                row[name.removeprefix("eval_")] = entry[name]
    return list(epochs.values())
