"""What a report compares: the ranker, and the systems that show where its quality comes from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .registry import Registry
from .user_index import UserIndex


@dataclass(frozen=True, eq=False)
class System:
    """A ranker of the report.

    Attributes:
        name: in the report.
        help: what it is, for the setting `ablations`.
        index: whose index its prompts spell: "own", "none", or "shuffled" (another user's).
        task_settings: fields of `TaskArguments` that differ from the run's.
        tuned: whether it is a tuning of its own; otherwise the ranker's model is scored on its prompts.
    """

    name: str
    help: str = ""
    index: str = "own"
    task_settings: Mapping[str, Any] = field(default_factory=dict)
    tuned: bool = True

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
    no_index=System("ulmrec_no_index", "the same tuning without a user index", index="none"),
    index_only=System("ulmrec_index_only", "the ranker without history", task_settings={"max_history": 0}, tuned=False),
    placebo=System("ulmrec_placebo", "the same tuning with the indices shuffled among users", index="shuffled"),
)
# The second is subtracted from the first, where a report holds both.
COMPARED = (
    ("ulmrec", "retriever"),
    ("ulmrec", "ulmrec_no_index"),
    ("ulmrec", "ulmrec_placebo"),
    ("ulmrec_placebo", "ulmrec_no_index"),
    ("ulmrec", "random"),
    ("ulmrec_index_only", "random"),
)


def model_folder(system: System, run: Path) -> Path:
    """The stage of a tuned system's model."""
    return run / "model" if system is RANKER else system.folder(run) / "model"


def task_folder(system: System, run: Path) -> Path:
    """The stage of the task rows that a system is tuned and scored on."""
    return system.folder(run) / "tasks" if system.has_own_tasks else run / "data" / "tasks"
