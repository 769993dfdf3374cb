"""Training of the neural retrievers under `transformers.Trainer`, the best epoch chosen by validation NDCG@10."""

import tempfile
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer, TrainingArguments

from ..metrics import ranking_metrics
from ..tables import Sequences
from .arguments import RetrieverArguments
from .neural import NeuralRetriever, pad_right
from .topk import ranks_of, seen_places

_EVAL_BATCH = 256


class TrainingRows(Dataset):
    """Rows of at most `max_history` inputs from the train parts, every item but a user's first being a label once."""

    def __init__(self, train: Sequences, max_history: int):
        self.items = train.items
        starts, ends = [], []
        for begin, end in zip(train.offsets[:-1].tolist(), train.offsets[1:].tolist(), strict=True):
            for last in range(end, begin + 1, -max_history):
                starts.append(max(begin, last - max_history - 1))
                ends.append(last)
        if not starts:
            raise ValueError(
                "no user has two items in the train part, so there is no transition to learn from: "
                "use the retriever 'popularity', or data with longer sequences."
            )
        self.starts, self.ends = np.array(starts), np.array(ends)
        self.lengths = (self.ends - self.starts - 1).tolist()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = self.items[self.starts[index] : self.ends[index]]
        return {"input_ids": row[:-1], "labels": row[1:]}


class ValidationRows(Dataset):
    """One row for each user with a validation target: the train part before it, and the target; short rows first."""

    def __init__(self, sequences: Sequences, max_history: int):
        self.sequences, self.max_history = sequences, max_history
        users = np.flatnonzero(sequences.lengths >= 3)
        self.users = users[np.argsort(sequences.lengths[users], kind="stable")]

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> dict[str, Any]:
        *history, target, _ = self.sequences[self.users[index]].tolist()
        return {"input_ids": history[-self.max_history :], "history": history, "target": target}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pads training or validation rows to the longest of the batch.

    Returns:
        `input_ids`, int64 [batch, longest]; for training `labels` of the same shape, 0 where there is none; for
        validation `target`, int64 [batch], and `seen`, int64 [seen items, 2], the places (row, item) that are not
        ranked.
    """
    batch = {"input_ids": pad_right([row["input_ids"] for row in rows])}
    if "labels" in rows[0]:
        return batch | {"labels": pad_right([row["labels"] for row in rows])}
    return batch | {
        "seen": seen_places([row["history"] for row in rows]),
        "target": torch.tensor([row["target"] for row in rows]),
    }


def rank_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Recall@k and NDCG@k from the ranks that `RetrieverTrainer.prediction_step` returns; 0 = unreachable."""
    ranks = np.asarray(prediction.predictions, dtype=np.float64)
    metrics = ranking_metrics(np.where(ranks > 0, ranks, np.inf), ks=(10, 20))
    return {name: metrics[name] for name in ("ndcg@10", "recall@10", "recall@20")}


class EqualBatches(torch.utils.data.Sampler[list[int]]):
    """Batches of rows of about one length, each with about the same number of labels, in random order.

    Rows of one length need no padding. As many rows in each batch would let a label among short rows count for more or,
    weighed, let Adam's steps go by how long the rows are; as many labels in each make every label count the same.

    Args:
        lengths: labels of each row.
        batch_size: rows of a batch, on average.
    """

    def __init__(self, lengths: SequenceOf[int], batch_size: int):
        self.lengths = np.asarray(lengths)
        labels = np.cumsum(np.sort(self.lengths))
        # a row belongs to the batch that its last label falls into
        self.ends = np.flatnonzero(np.diff((labels - 1) // (batch_size * self.lengths.mean()))) + 1

    def __len__(self) -> int:
        return len(self.ends) + 1

    def __iter__(self) -> Iterator[list[int]]:
        order = np.lexsort((torch.rand(len(self.lengths)).numpy(), self.lengths))
        batches = np.split(order, self.ends)
        return (batches[batch].tolist() for batch in torch.randperm(len(batches)).tolist())


class RetrieverTrainer(Trainer):
    """`Trainer` for a `NeuralRetriever`: batches of as many labels, ranks instead of logits at evaluation, no NaN loss.

    Args:
        model: the retriever.
        args: see `training_arguments`.
        train_dataset: `TrainingRows`.
        eval_dataset: `ValidationRows`.
    """

    def __init__(self, model: NeuralRetriever, args: TrainingArguments, **kwargs: Any):
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
        """(None, ranks int64 [batch], targets int64 [batch]): users x items is never held."""
        inputs = self._prepare_inputs(inputs)
        with torch.inference_mode(), self.compute_loss_context_manager():
            scores = model(inputs["input_ids"]).logits.float()
            ranks = ranks_of(scores, inputs["target"], inputs["seen"])
        return None, ranks, inputs["target"]

    def get_train_dataloader(self) -> DataLoader:
        """`EqualBatches` of the training rows."""
        batches = EqualBatches(self.train_dataset.lengths, self.args.train_batch_size)
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)


def training_arguments(args: RetrieverArguments, folder: str) -> TrainingArguments:
    """The `TrainingArguments` of a retriever: one validation an epoch, checkpoints of the model alone in `folder`."""
    select = args.patience > 0
    return TrainingArguments(
        output_dir=folder,
        seed=args.seed,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        lr_scheduler_type=args.lr_scheduler_type,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=_EVAL_BATCH,
        eval_strategy="epoch" if select else "no",
        save_strategy="epoch" if select else "no",
        save_only_model=True,
        save_total_limit=1,
        load_best_model_at_end=select,
        metric_for_best_model="ndcg@10" if select else None,
        greater_is_better=True if select else None,
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )


def train_neural_retriever(
    model: NeuralRetriever, sequences: Sequences, args: RetrieverArguments, work_folder: Path
) -> list[dict[str, float]]:
    """Trains on the train parts; the best epoch by validation NDCG@10 stays in `model`.

    Args:
        model: a fresh retriever.
        sequences: whole sequences; the validation targets are used for choosing the epoch only, the test targets never.
        args: learning settings.
        work_folder: where checkpoints lie while training runs; nothing stays there.

    Returns:
        For each epoch `epoch`, `loss` and, with validation, `ndcg@10`, `recall@10`, `recall@20`.

    Raises:
        ValueError: nothing to train on, nothing to validate on, or a loss that is not finite.
    """
    validation = ValidationRows(sequences, args.max_history) if args.patience else None
    if validation is not None and not len(validation):
        raise ValueError("no user has a validation target after a non-empty train part: set patience to 0.")
    with tempfile.TemporaryDirectory(dir=work_folder, prefix="checkpoints-") as checkpoints:
        trainer = RetrieverTrainer(
            model,
            training_arguments(args, checkpoints),
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
