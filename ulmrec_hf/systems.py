"""What a report compares: the ranker, and the systems that show where its quality comes from."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .registry import Registry
from .tasks.records import Task
from .user_index import UserIndex


@dataclass(frozen=True, eq=False)
class System:
    """A ranker of the report.

    Attributes:
        name: in the report.
        help: what it is, for the setting `ablations`.
        index: whose index its prompts spell: "own", "none", or "shuffled" (another user's).
        task_settings: fields of `TaskArguments` that differ from the run's.
        keeps: whether a task is in the mixture that it is tuned on.
        model: what its prompts are scored by: "own" (a tuning of its own, of as many steps as the ranker's), "ranker",
            or "base" (nothing is tuned).
    """

    name: str
    help: str = ""
    index: str = "own"
    task_settings: Mapping[str, Any] = field(default_factory=dict)
    keeps: Callable[[Task], bool] = lambda task: True
    model: str = "own"

    @property
    def has_own_stage(self) -> bool:
        """Whether its scores come from a stage of its own, and not from that of the ranker."""
        return self.model != "ranker"

    def mixture(self, mixture: Mapping[str, float], tasks: Mapping[str, Task]) -> dict[str, float]:
        """The part of a run's mixture that it is tuned on.

        Raises:
            ValueError: nothing is left of it.
        """
        kept = {name: share for name, share in mixture.items() if self.keeps(tasks[name])}
        if not any(kept.values()):
            raise ValueError(
                f"mixture is {dict(mixture)}, which leaves {self.name} nothing to be tuned on: add next_item, or take "
                f"{self.name.removeprefix(f'{RANKER.name}_')} out of ablations."
            )
        return kept

    @property
    def has_own_tasks(self) -> bool:
        """Whether its prompts differ from those of the ranker."""
        return self.index != "own" or bool(self.task_settings)

    def user_index(self, users: UserIndex, seed: int) -> UserIndex | None:
        """The index that its prompts spell; `seed` is that of the shuffle."""
        if self.index == "own":
            return users
        return users.shuffled(seed) if self.index == "shuffled" else None

    def folder(self, run: Path) -> Path:
        """Where its `model` and `tasks` are in a run's output folder."""
        return run / "ablations" / self.name.removeprefix(f"{RANKER.name}_")


RANKER = System("ulmrec")
ABLATIONS = Registry(
    "ablation",
    no_index=System(
        "ulmrec_no_index",
        "tuned without a user index, on the tasks that ask about an item",
        index="none",
        keeps=lambda task: task.evaluated,  # the others have nothing to say without an index
    ),
    history_only=System(
        "ulmrec_history_only",
        "tuned on next_item alone, without a user index",
        index="none",
        keeps=lambda task: task.name == "next_item",
    ),
    index_only=System(
        "ulmrec_index_only", "the ranker, shown no history", task_settings={"max_history": 0}, model="ranker"
    ),
    unknown_user=System("ulmrec_unknown_user", "the ranker, shown no user index", index="none", model="ranker"),
    placebo=System("ulmrec_placebo", "the same tuning with the indices shuffled among users", index="shuffled"),
    zero_shot=System("zero_shot", "the base as it is, shown no user index", index="none", model="base"),
)
# The second is subtracted from the first, where a report holds both.
COMPARED = (
    ("ulmrec", "retriever"),
    ("ulmrec", "ulmrec_no_index"),
    ("ulmrec", "ulmrec_history_only"),
    ("ulmrec", "ulmrec_placebo"),
    ("ulmrec", "zero_shot"),
    ("ulmrec", "ulmrec_index_only"),
    ("ulmrec", "ulmrec_unknown_user"),
    ("ulmrec_placebo", "ulmrec_no_index"),
    ("ulmrec_unknown_user", "ulmrec_history_only"),
    ("ulmrec", "random"),
    ("ulmrec_index_only", "random"),
)


def with_own_stages(systems: Iterable[System]) -> list[System]:
    """The ranker and those of the other systems that have a stage of their own, in the order of a run."""
    return [RANKER, *(system for system in systems if system.has_own_stage)]


def model_folder(system: System, run: Path) -> Path:
    """The stage of a system that has its own."""
    return run / "model" if system is RANKER else system.folder(run) / "model"


def task_folder(system: System, run: Path) -> Path:
    """The stage of the task rows that a system is tuned and scored on."""
    return system.folder(run) / "tasks" if system.has_own_tasks else run / "data" / "tasks"
