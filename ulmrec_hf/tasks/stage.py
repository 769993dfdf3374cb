"""The stage of the alignment tasks: `write_tasks` into a folder that is made only once."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa

from ..files import hash_value
from ..stages import run_stage
from ..tables import LeaveOneOut, read_table
from ..user_index import UserIndex
from .arguments import TaskArguments
from .dataset import write_tasks
from .records import TASKS
from .rows import TaskRows
from .templates import PromptTemplates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class TaskSources:
    """What task rows are made from; tables are read only where rows are made.

    Attributes:
        data: an opened data stage.
        candidates, preferences: read these tables, see `TaskRows`.
        user_index: spells users in the rows (a run's own, a shuffled one), or None.
        tokenizer: the language model's, with its user tokens.
    """

    data: LeaveOneOut
    candidates: Callable[[], pa.Table]
    preferences: Callable[[], pa.Table]
    user_index: UserIndex | None
    tokenizer: "PreTrainedTokenizerFast"

    @classmethod
    def of_run(cls, run: Path, data: LeaveOneOut, user_index: UserIndex | None, tokenizer: Any) -> Self:
        """Those of a run's output folder; each table is read once for all systems that share these sources."""
        candidates, preferences = run / "retriever" / "candidates.parquet", run / "preferences" / "preferences.parquet"
        return cls(
            data,
            cache(partial(read_table, candidates, ("user", "split", "position", "items"))),
            cache(partial(read_table, preferences, ("user", "position", "preference"))),
            user_index,
            tokenizer,
        )

    def rows(self, args: TaskArguments) -> TaskRows:
        """Reads the tables; ValueError where one is missing, see also `TaskRows`."""
        return TaskRows(args, self.data, self.candidates(), self.preferences(), self.user_index, self.tokenizer)


def write_task_stage(
    args: TaskArguments,
    folder: str | os.PathLike,
    sources: TaskSources,
    inputs: Mapping[str, str],
    *,
    configs: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Makes the stage `folder` of task rows, see `write_tasks`, unless it is there already; returns the folder.

    Args:
        inputs: fingerprints of data, candidates, preferences and user index. Tokenizer, tasks and templates are added.
        configs: tasks' names and `mixture`; all by default.

    Raises:
        ValueError: the folder holds a stage with other settings or inputs; see also `write_tasks`.
    """
    settings = asdict(args)
    templates = PromptTemplates.from_yaml(settings.pop("prompt_templates")).templates
    if configs is not None:
        settings["configs"] = list(configs)
    tasks = {name: asdict(task) | {"template": templates[name]} for name, task in TASKS.items()}
    added = {
        "tokenizer": hash_value(sources.tokenizer.backend_tokenizer.to_str()),
        "tasks and prompt_templates": hash_value(tasks),
    }
    return run_stage(
        folder,
        settings,
        {**inputs, **added},
        lambda partial: write_tasks(sources.rows(args), partial, configs),
        overwrite=overwrite,
    )
