"""Training steps: what is drawn into them, how they are cut into passes, and how processes share them."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ulmrec_hf.tasks.batches import MAX_PADDING, PassLoader, StepSampler, count_steps, cut

# tokens of the rows of six tasks as prompts of real titles have them: two that rank 20 candidates, and shorter ones
RANGES = [(600, 860), (40, 90), (40, 90), (150, 500), (250, 600), (400, 640)]


def mixture(rows: int = 6000) -> tuple[np.ndarray, np.ndarray]:
    """The task of each row and its tokens."""
    generator = np.random.default_rng(0)
    tasks = generator.integers(0, len(RANGES), rows)
    low, high = np.array(RANGES).T
    return tasks, generator.integers(low[tasks], high[tasks])


def rows_of(step: list[list[int]]) -> list[int]:
    return [row for rows in step for row in rows]


def test_an_epoch_has_every_row_once_in_steps_of_equal_size():
    _, lengths = mixture(1003)
    steps = list(StepSampler(lengths, 16, seed=3, max_rows=16))
    assert sorted(row for step in steps for row in rows_of(step)) == list(range(1003))
    assert {len(rows_of(step)) for step in steps} == {15, 16}
    assert len(steps) == count_steps(1003, 16) == 63


def test_a_step_holds_the_tasks_as_the_mixture_does():
    tasks, lengths = mixture()
    steps = list(StepSampler(lengths, 16, seed=0, max_rows=16))
    counts = np.array([np.bincount(tasks[rows_of(step)], minlength=len(RANGES)) for step in steps])
    shares = np.bincount(tasks) / len(tasks)
    # the rows of a step are drawn without replacement: the variance of each task's count is that of such a draw
    expected = 16 * shares * (1 - shares) * (len(tasks) - 16) / (len(tasks) - 1)
    assert counts.var(axis=0) == pytest.approx(expected, rel=0.25)
    assert max(Counter(tasks[rows_of(step)].tolist()).most_common(1)[0][1] for step in steps) < 14


@pytest.mark.parametrize("step_rows", [16, 32, 128])
def test_little_is_padded(step_rows):
    _, lengths = mixture()
    used = padded = passes = 0
    for step in StepSampler(lengths, step_rows, seed=0, max_rows=step_rows):
        passes += len(step)
        used += sum(lengths[rows].sum() for rows in step)
        padded += sum(len(rows) * lengths[rows].max() for rows in step)
    assert 1 - used / padded <= MAX_PADDING
    assert passes < count_steps(len(lengths), step_rows) * step_rows / 2  # rows do share passes


@given(st.lists(st.integers(1, 900), min_size=1, max_size=40), st.integers(1, 40), st.integers(900, 9000))
@settings(deadline=None, max_examples=60)
def test_cuts_keep_to_the_limits(lengths, max_rows, max_tokens):
    lengths = sorted(lengths, reverse=True)
    cuts = cut(lengths, max_rows, max_tokens)
    parts = list(zip([0, *cuts], [*cuts, len(lengths)], strict=True))
    assert all(begin < end for begin, end in parts)
    assert all(end - begin <= max_rows and (end - begin) * lengths[begin] <= max_tokens for begin, end in parts)
    padded = sum((end - begin) * lengths[begin] for begin, end in parts)
    assert padded - sum(lengths) <= MAX_PADDING * padded + 1e-9


@given(st.integers(4, 90), st.integers(1, 12), st.integers(2, 4), st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_any_number_of_processes_shares_equal_steps(rows, each, processes, seed):
    lengths = np.random.default_rng(seed).integers(5, 300, rows)
    together = StepSampler(lengths, each * processes, seed=seed, max_rows=each)
    parts = [
        StepSampler(lengths, each * processes, seed=seed, max_rows=each, rank=rank, processes=processes)
        for rank in range(processes)
    ]
    for sampler in (together, *parts):
        sampler.set_epoch(2)
    shared = list(zip(*parts, strict=True))
    for steps in shared:
        assert len({len(step) for step in steps}) == 1, "every process has as many passes"
        assert all(rows for step in steps for rows in step), "no pass is empty"
    if len(together) == len(shared):  # unless there are too few rows for as many steps
        assert [sorted(rows_of(step)) for step in together] == [
            sorted(row for step in steps for row in rows_of(step)) for steps in shared
        ]


def test_the_seed_and_the_epoch_decide_alone():
    lengths = [5] * 64
    sampler = StepSampler(lengths, 8, seed=1, max_rows=8)
    first = list(sampler)
    np.random.default_rng().random()  # whatever else is drawn
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(StepSampler(lengths, 8, seed=2, max_rows=8)) != first


def test_a_loader_gives_the_passes_of_each_step():
    class Rows:
        def __len__(self):
            return 4

        def __getitems__(self, numbers):
            return [{"row": number} for number in numbers]

    sampler = StepSampler([30, 30, 2, 2], 4, seed=0, max_rows=2)
    (step,) = PassLoader(Rows(), sampler, lambda rows: [row["row"] for row in rows])
    assert sorted(map(sorted, step["passes"])) == [[0, 1], [2, 3]]


def test_too_few_rows_and_too_small_a_budget_are_named():
    with pytest.raises(ValueError, match="1 training rows for 2 processes"):
        StepSampler([4], 2, seed=0, max_rows=1, processes=2)
    with pytest.raises(ValueError, match="max_tokens_per_pass is 10, but the longest training row has 12 tokens"):
        StepSampler([4, 12], 2, seed=0, max_rows=2, max_tokens=10)
