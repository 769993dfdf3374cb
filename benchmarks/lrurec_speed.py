"""LRURec training: ours against the textbook form, the same parameters, optimizer, rows and batch size.

    python benchmarks/lrurec_speed.py output/beauty/data
    python benchmarks/lrurec_speed.py output/beauty/data --quality --epochs 20     # the quality of both

DATA_FOLDER is a finished data stage. The textbook form is that of the published code: every sequence padded on the left
to 50 items, complex matrix products and a recurrence over 64 places with the padding masked, logits of the whole
catalogue at every position, padding too, batches in random order. Ours pads on the right to the longest of a batch of
sequences of similar length, keeps real and imaginary parts apart, and computes logits where there is a label.
A first check raises unless both forms give the same logits and loss. On a busy machine, and with one thread
(OMP_NUM_THREADS=1), read the sequences per second of processor time.
"""

import argparse
import json
import math
import tempfile
import time
from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed

from ulmrec_hf.metrics import ranking_metrics, top_k_places
from ulmrec_hf.retrieval.arguments import RetrieverArguments
from ulmrec_hf.retrieval.lrurec import LinearRecurrentUnit, LRURec, LRURecConfig
from ulmrec_hf.retrieval.neural import RetrieverOutput
from ulmrec_hf.retrieval.rows import TrainingRows, ValidationRows, pad_right
from ulmrec_hf.retrieval.trainer import RetrieverTrainer, training_arguments
from ulmrec_hf.tables import LeaveOneOut, Sequences


def complex_recurrence(unit: LinearRecurrentUnit, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The unit on float [batch, length, size] in complex64: blocks of twice the size each turn, the padding masked."""
    eigenvalue = torch.exp(torch.complex(-unit.nu.exp(), unit.theta.exp()))
    weight = torch.complex(*unit.input.weight.chunk(2))
    state = nn.functional.linear(x.to(torch.complex64), weight, torch.complex(*unit.input.bias.chunk(2)))
    state, powers, half = state * unit.log_gamma.exp(), eigenvalue[None], 1
    while half < x.shape[1]:
        earlier, later = state.unflatten(1, (-1, 2, half)).unbind(2)
        carried = earlier[:, :, -1:] * real.unflatten(1, (-1, 2, half))[:, :, 0, -1:, None]
        state = torch.stack([earlier, later + powers * carried], 2).flatten(1, 3)
        powers, half = torch.cat([powers, powers * powers[-1]]), 2 * half
    weight = unit.output.weight.chunk(2, dim=1)
    return nn.functional.linear(state, torch.complex(weight[0], -weight[1])).real + unit.output.bias


class TextbookLRURec(LRURec):
    """The same parameters; rows are padded on the left."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> RetrieverOutput:
        length = input_ids.shape[1]
        input_ids = nn.functional.pad(input_ids, (2 ** math.ceil(math.log2(length)) - length, 0))
        real, x = input_ids > 0, self.dropout(self.embedding_norm(self.item_embedding(input_ids)))
        for block in self.blocks:
            x = block.recurrence_norm(x + block.dropout(complex_recurrence(block.recurrence, x, real)))
            x = block.feed_forward_norm(x + block.dropout(block.feed_forward(x)))
        logits = self._logits(x[:, -length:])
        if labels is None:
            return RetrieverOutput(logits=logits[:, -1])
        return RetrieverOutput(loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=0))


def collate_left(rows: list[dict[str, np.ndarray]], width: int) -> dict[str, torch.Tensor]:
    return {name: pad_left([row[name] for row in rows], width) for name in ("input_ids", "labels")}


def pad_left(rows: list[np.ndarray], width: int) -> torch.Tensor:
    """int64 [rows, width], padded on the left with 0."""
    return torch.stack([nn.functional.pad(torch.as_tensor(row).long(), (width - len(row), 0)) for row in rows])


def check_forms() -> None:
    """Raises unless both forms give the same logits and the same loss."""
    torch.manual_seed(0)
    ours = LRURec(LRURecConfig(num_items=30, hidden_size=8)).eval()
    with torch.no_grad():
        for parameter in ours.parameters():  # no bias stays 0, so that a wrong mask shows
            parameter.add_(torch.randn_like(parameter) * 0.2)
    textbook = TextbookLRURec(ours.config).eval()
    textbook.load_state_dict(ours.state_dict())
    rows = [torch.randint(1, 31, (length,)).numpy() for length in (1, 2, 5, 6, 13, 20, 50)]
    shifted = [row[:-1] for row in rows[1:]], [row[1:] for row in rows[1:]]
    with torch.inference_mode():
        pairs = [
            (ours(pad_right(rows)).logits[:, 1:], textbook(pad_left(rows, 50)).logits[:, 1:]),
            (ours(*map(pad_right, shifted)).loss, textbook(*(pad_left(part, 50) for part in shifted)).loss),
        ]
    for name, (one, other) in zip(("logits", "losses"), pairs, strict=True):
        if not torch.allclose(one, other, rtol=1e-4, atol=1e-4):
            raise ValueError(f"the two forms do not give the same {name}: they differ by {(one - other).abs().max()}.")


class Clock(TrainerCallback):
    """Seconds from the end of the warm-up to the last step, of the clock and of this process's threads."""

    def __init__(self, warmup: int):
        self.warmup, self.seconds = warmup, np.full(2, math.nan)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        now = np.array([time.perf_counter(), time.process_time()])
        if state.global_step == self.warmup:
            self.start = now
        elif state.global_step > self.warmup:
            self.seconds = now - self.start


class Evaluation(TrainerCallback):
    """Validation N@10 after every epoch. LRURec evaluates both forms, since their parameters are the same."""

    def __init__(self, data: LeaveOneOut):
        self.data, self.values = data, []

    def on_epoch_end(self, args, state, control, model, **kwargs) -> None:
        evaluated = LRURec(model.config)
        evaluated.load_state_dict(model.state_dict())
        ranks = evaluated.ranks(self.data, ["validation"])
        self.values.append(ranking_metrics(top_k_places(ranks["rank"], ranks["tied"]))["ndcg@10"])
        print(f"epoch {len(self.values)}: validation N@10 {self.values[-1]:.4f}", flush=True)


def train(
    model: LRURec, rows: TrainingRows, args: RetrieverArguments, warmup: int, steps: int, evaluation: Evaluation | None
) -> dict[str, float]:
    """Trains for warmup + steps steps, or args.epochs to evaluate; returns speeds after the warm-up, or quality."""
    set_seed(args.seed)
    clock = Clock(warmup)
    with tempfile.TemporaryDirectory() as folder:
        settings = training_arguments(args, folder)
        settings.disable_tqdm = True
        if evaluation is None:
            settings.max_steps, settings.dataloader_drop_last = warmup + steps, True
        if isinstance(model, TextbookLRURec):  # the library's Trainer takes rows in random order
            make = partial(Trainer, data_collator=partial(collate_left, width=args.max_history))
        else:
            make = RetrieverTrainer
        trainer = make(model, settings, train_dataset=rows, callbacks=[evaluation or clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    if evaluation is not None:
        return {"by epoch": evaluation.values}
    speeds = (trainer.state.global_step - warmup) * args.batch_size / clock.seconds
    return dict(zip(("sequences/s", "sequences/CPU s"), speeds.tolist(), strict=True))


@torch.inference_mode()
def users_per_second(model: LRURec, sequences: Sequences, args: RetrieverArguments, batches: int) -> float:
    """Speed of the next-item logits of validation histories in random order; the first batch is a warm-up."""
    rows = ValidationRows(sequences, args.max_history)
    order = np.random.default_rng(args.seed).permutation(len(rows))[: (batches + 1) * args.batch_size]
    model.eval()
    for place in range(0, len(order), args.batch_size):
        if place == args.batch_size:
            start = time.perf_counter()
        histories = [rows[index]["input_ids"] for index in order[place : place + args.batch_size]]
        textbook = isinstance(model, TextbookLRURec)
        model(pad_left(histories, args.max_history) if textbook else pad_right(histories))
    return (len(order) - args.batch_size) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_folder", metavar="DATA_FOLDER")
    parser.add_argument(
        "--steps", type=int, default=0, help="timed steps; 0 = an epoch, since ours has few long batches"
    )
    parser.add_argument("--warmup", type=int, default=5, help="training steps before the clock starts")
    parser.add_argument("--eval_batches", type=int, default=10, help="timed batches of evaluation")
    parser.add_argument(
        "--quality", action="store_true", help="train both for --epochs and compare validation NDCG@10 after each"
    )
    parser.add_argument("--epochs", type=int, default=20, help="with --quality: epochs of both, without early stopping")
    parser.add_argument("--seed", type=int, default=42, help="of initial weights, dropout and the order of batches")
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args()
    check_forms()
    args = RetrieverArguments(epochs=options.epochs, patience=0, seed=options.seed)
    data = LeaveOneOut.load(options.data_folder)
    sequences = data.sequences
    rows = TrainingRows(sequences.train_part(), args.max_history)
    steps = options.steps or len(rows) // args.batch_size
    results = {"settings": vars(options), "users": len(sequences), "items": sequences.num_items}
    print(
        f"{len(sequences):,} users, {sequences.num_items:,} items, {len(rows):,} training rows with a label at "
        f"{np.mean(rows.lengths):.1f} of {args.max_history} positions; {torch.get_num_threads()} threads"
    )
    set_seed(args.seed)
    config = LRURecConfig(num_items=sequences.num_items, catalogue=sequences.catalogue, dropout=args.dropout)
    start = LRURec(config).state_dict()
    for name, model_class in (("ours", LRURec), ("textbook", TextbookLRURec)):
        model = model_class(config)
        model.load_state_dict(start)
        evaluation = Evaluation(data) if options.quality else None
        result = results[name] = train(model, rows, args, options.warmup, steps, evaluation)
        if options.quality:
            continue
        result["evaluated users/s"] = users_per_second(model, sequences, args, options.eval_batches)
        if name == "ours":
            print(f"{'':<10}" + "".join(f"{column:>20}" for column in result))
        print(f"{name:<10}" + "".join(f"{value:>20.4g}" for value in result.values()), flush=True)
    if options.quality:
        pairs = zip(results["ours"]["by epoch"], results["textbook"]["by epoch"], strict=True)
        print("validation N@10, ours minus textbook:", *(f"{ours - textbook:+.4f}" for ours, textbook in pairs))
    else:
        results["ratio"] = {key: value / results["textbook"][key] for key, value in results["ours"].items()}
        print(f"{'ratio':<10}" + "".join(f"{ratio:>20.2f}" for ratio in results["ratio"].values()))
    if options.output:
        with open(options.output, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
