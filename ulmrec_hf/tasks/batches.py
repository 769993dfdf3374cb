"""Which rows a training step learns from, and how they share forward passes."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

MAX_PADDING = 0.05  # share of a step's tokens that may be padding; several processes may have little more


class StepSampler(Sampler[list[list[int]]]):
    """The rows of every training step, drawn from all rows at random and divided among passes and processes.

    On average a step holds each task as often as the mixture does. Since its rows differ much in length, they are
    sorted by it and cut into passes of similar length: one forward and backward pass each, gradients being summed over
    a step. Rows and their passes depend on the seed and the epoch alone, so that a resumed run goes on with the very
    rows that a killed one would have had; any number of processes shares equal steps.

    Args:
        lengths: tokens of each row.
        step_rows: rows of a step, of all processes together; steps of an epoch differ by one row at most, none is left
            out, and a step has a row for each process.
        seed: of the order of the rows.
        max_rows: rows of a pass, at most; one more in a step's last where several processes cannot share it evenly.
        max_tokens: likewise tokens of a pass, padding counted; 0 = any number.
        rank, processes: which of how many processes this one is; each has equally many passes.

    Iterating gives, for each step of `epoch`, the passes of this process, each as row numbers.

    Raises:
        ValueError: there are fewer rows than processes, or a row is longer than `max_tokens`.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        step_rows: int,
        *,
        seed: int,
        max_rows: int,
        max_tokens: int = 0,
        rank: int = 0,
        processes: int = 1,
    ):
        self.lengths, self.step_rows, self.seed = np.asarray(lengths, np.int64), step_rows, seed
        self.max_rows, self.max_tokens = max_rows, max_tokens
        self.rank, self.processes = rank, processes
        self.epoch = 0
        if len(self.lengths) < processes:
            raise ValueError(
                f"There are {len(self.lengths)} training rows for {processes} processes: give each process at least "
                "one row (more users, a larger mixture) or start fewer processes."
            )
        longest = int(self.lengths.max(initial=0))
        if max_tokens and longest > max_tokens:
            raise ValueError(
                f"max_tokens_per_pass is {max_tokens}, but the longest training row has {longest} tokens: raise it, or "
                "lower max_length."
            )

    def __len__(self) -> int:
        return count_steps(len(self.lengths), self.step_rows, self.processes)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose steps are given; 0 at first."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[list[int]]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.lengths))
        for rows in np.array_split(order, len(self)):
            yield self._passes(rows)

    def _passes(self, rows: np.ndarray) -> list[list[int]]:
        """One process's passes over the rows of a step, the longest rows first."""
        rows = rows[np.lexsort((rows, -self.lengths[rows]))]
        # Rows are dealt to the processes in turn, a round at a time: a cut between rounds gives all the same number of
        # passes, which collective operations need. The rows left over, the shortest, join the last round.
        spare = len(rows) % self.processes
        rounds = np.split(rows, np.arange(self.processes, len(rows) - spare, self.processes))
        lengths = [int(self.lengths[each[0]]) for each in rounds]
        limit = self.max_tokens or len(rows) * max(lengths)
        cuts = cut(lengths, self.max_rows, limit)
        return [
            [int(row) for each in rounds[begin:end] for row in each[self.rank :: self.processes]]
            for begin, end in zip([0, *cuts], [*cuts, len(rounds)], strict=True)
        ]


def count_steps(rows: int, step_rows: int, processes: int = 1) -> int:
    """Training steps of an epoch over so many rows; see `StepSampler`."""
    return max(1, min(-(-rows // step_rows), rows // processes))


def cut(lengths: Sequence[int], max_rows: int, max_tokens: int) -> list[int]:
    """Where to cut rows, the longest first, so that the passes are few but little is padded.

    Neighbouring passes are joined, those first that add least padding, while padding is at most `MAX_PADDING` of all
    tokens and a pass within its limits.

    Args:
        lengths: int [rows], descending.
        max_rows, max_tokens: of a pass; tokens count with padding.

    Returns:
        The places where a pass other than the first begins.
    """
    ends, budget = list(range(len(lengths) + 1)), MAX_PADDING / (1 - MAX_PADDING) * sum(lengths)
    while True:
        joined = [
            ((lengths[begin] - lengths[middle]) * (end - middle), place)
            for place, (begin, middle, end) in enumerate(zip(ends, ends[1:], ends[2:], strict=False), 1)
            if end - begin <= max_rows and (end - begin) * lengths[begin] <= max_tokens
        ]
        padding, place = min(joined, default=(math.inf, 0))
        if padding > budget:
            return ends[1:-1]
        budget -= padding
        del ends[place]


class PassLoader(DataLoader):
    """A DataLoader over the passes of a `StepSampler`: gives, for each step, `{"passes": [batch, ...]}`.

    Args:
        rows: a dataset that gives the rows of several numbers at once by `__getitems__`.
        sampler: its steps.
        collate: makes a batch of the rows of a pass.
        settings: of `DataLoader`.
    """

    def __init__(self, rows: Dataset, sampler: StepSampler, collate: Callable[[list[dict]], Any], **settings: Any):
        super().__init__(_Passes(rows), batch_sampler=sampler, collate_fn=partial(_collate_step, collate), **settings)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch; transformers' Trainer calls it."""
        self.batch_sampler.set_epoch(epoch)


class _Passes(Dataset):
    def __init__(self, rows: Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, numbers: list[int]) -> list[dict]:
        return self.rows.__getitems__(numbers)


def _collate_step(collate: Callable[[list[dict]], Any], passes: list[list[dict]]) -> dict[str, list]:
    return {"passes": [collate(rows) for rows in passes]}
