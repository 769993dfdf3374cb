"""Settings of the alignment tasks."""

import json
import math
from dataclasses import dataclass, field
from typing import Any

from ..stages import setting
from ..verbalizer import LETTERS
from .records import TASKS

EVALUATION_ORDERS = ("retriever", "shuffled")


@dataclass
class TaskArguments:
    """How the rows of the alignment tasks are made.

    Raises:
        ValueError: a setting has a value that cannot be used; the message names the setting.
    """

    max_history: int = setting(20, "Newest history items shown in a prompt.")
    num_candidates: int = setting(20, "Candidates of a ranking row, 2 to 52 (one letter each, A-Z and a-z).")
    max_title_tokens: int = setting(32, "Longer titles are cut to this many tokens.")
    max_length: int = setting(
        1024,
        "Most tokens of prompt and completion together, the end token counted. A row that is longer loses its oldest "
        "history first, never candidates or completion.",
    )
    train_positions: int = setting(5, "Newest positions of every user's train part that become training rows; 0 = all.")
    hard_negatives: float = setting(
        0.5, "Share of a training row's wrong candidates that come from the retriever; the rest are random."
    )
    anonymous_share: float = setting(
        0.1,
        "Share of the training rows with a target that leave the user index out, so that the model also ranks for "
        "users without one.",
    )
    mixture: dict[str, float] | str | None = field(
        default_factory=lambda: dict.fromkeys(TASKS, 1.0),
        metadata={
            "help": "How much of each task is in the training mixture: 1 = every row once, 0.5 = half of the rows, 2 = "
            f"every row twice; a task not named is left out. Tasks: {', '.join(TASKS)}. As JSON on the command line."
        },
    )
    prompt_templates: str | None = setting(None, "YAML file with other prompt templates; the package's own by default.")
    evaluation_order: str = setting(
        "retriever",
        "Order of the candidates in validation and test: the retriever's, or shuffled by the seed.",
        choices=list(EVALUATION_ORDERS),
    )
    task_seed: int = setting(42, "Seed of negatives, orders and samples; at least 0.")

    def __post_init__(self):
        for name, least, most in (
            ("max_history", 0, None),
            ("num_candidates", 2, len(LETTERS)),
            ("max_title_tokens", 1, None),
            ("max_length", 1, None),
            ("train_positions", 0, None),
            ("task_seed", 0, None),
        ):
            value = getattr(self, name)
            if type(value) is not int or value < least or (most is not None and value > most):
                limit = f"at least {least}" if most is None else f"{least} to {most}"
                raise ValueError(f"{name} is {value!r}; it must be a whole number of {limit}.")
        for name in ("hard_negatives", "anonymous_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a share from 0 to 1.")
        if self.evaluation_order not in EVALUATION_ORDERS:
            raise ValueError(
                f"evaluation_order is {self.evaluation_order!r}; it must be one of {', '.join(EVALUATION_ORDERS)}."
            )
        mixture = self.mixture
        self.mixture = dict.fromkeys(TASKS, 1.0) if mixture is None else read_task_numbers("mixture", mixture)
        if not any(self.mixture.values()):
            raise ValueError(f"mixture is {mixture!r}; not all proportions may be 0.")


def read_task_numbers(name: str, value: Any) -> dict[str, float]:
    """A setting that has a number for some of the tasks, as a dict; the command line gives it as JSON.

    Raises:
        ValueError: it is something else, names a task that is not registered, or has a number below 0.
    """
    numbers = value
    if isinstance(value, str):
        try:
            numbers = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f'{name} is {value!r}; on the command line it must be JSON: {{"next_item": 1}}.') from None
    if not isinstance(numbers, dict) or not set(numbers) <= set(TASKS):
        raise ValueError(f"{name} is {value!r}; it must give a number for some of {', '.join(TASKS)}.")
    good = (isinstance(number, int | float) and math.isfinite(number) and number >= 0 for number in numbers.values())
    if not all(good):
        raise ValueError(f"{name} is {value!r}; give finite numbers of at least 0.")
    return numbers
