"""The alignment tasks as Hugging Face datasets: in memory, or written as Parquet with a dataset card."""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow as pa
import yaml

from ..figures import markdown_table
from ..files import hash_file, hash_value
from ..protocol import SPLITS
from ..stages import with_settings
from ..tables import LeaveOneOut
from ..user_index import KINDS, UserIndex
from .arguments import TaskArguments
from .records import MIXTURE, REASONS, Task
from .rows import TaskRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def features(tasks: Mapping[str, Task]) -> datasets.Features:
    """The columns of all configs."""
    return datasets.Features(
        {
            "task": datasets.ClassLabel(names=list(tasks)),
            "user": datasets.Value("int32"),
            "prompt": datasets.Value("string"),
            "completion": datasets.Value("string"),
            "candidates": datasets.List(datasets.Value("int32")),
            "label": datasets.Value("int8"),
            "target": datasets.Value("int32"),
        }
    )


class AlignmentTasks(Mapping[str, datasets.DatasetDict]):
    """The alignment tasks of a data set, `tasks["mixture"]["train"]` say, without a folder.

    A config (a task's name, or `mixture`) is rendered when it is first asked for and then held in memory; `write_tasks`
    writes equal rows as files, for data that memory cannot hold.

    Args:
        retriever: a fitted retriever (it has `candidates(data, k=..., train_positions=...)`), asked for as many
            candidates as a row shows, or a table with the schema `tables.CANDIDATES`, which may hold more to draw
            training negatives from.
        preferences: a table with the schema `tables.PREFERENCES`.
        users: the user index; None renders rows without.
        tokenizer: a fast one, with the user tokens where the index is spelled in them.
        args, settings: `TaskArguments`, by default, and fields that replace theirs.

    Raises:
        ValueError: a setting that cannot be used, or tables that do not fit together; see `TaskRows`.
    """

    def __init__(
        self,
        data: LeaveOneOut,
        retriever: Any,
        preferences: pa.Table,
        users: UserIndex | None,
        tokenizer: "PreTrainedTokenizerBase",
        args: TaskArguments | None = None,
        **settings: Any,
    ):
        self.data, self.users, self.tokenizer = data, users, tokenizer
        self.args = with_settings(args or TaskArguments(), settings)
        if not isinstance(retriever, pa.Table):
            retriever = retriever.candidates(
                data, k=self.args.num_candidates, train_positions=self.args.train_positions
            )
        self._rows = TaskRows(self.args, data, retriever, preferences, users, tokenizer)
        self.templates = self._rows.templates
        self._rendered: dict[str, datasets.DatasetDict] = {}

    def __getitem__(self, config: str) -> datasets.DatasetDict:
        if config not in self._rendered:
            if config not in list(self):
                raise KeyError(f"There is no config {config!r}, only {', '.join(self)}.")
            self._rendered[config] = datasets.DatasetDict(
                {split: self._render(config, split) for split in self._rows.splits(config)}
            )
        return self._rendered[config]

    def __iter__(self) -> Iterator[str]:
        return iter((*self._rows.tasks, MIXTURE))

    def __len__(self) -> int:
        return len(self._rows.tasks) + 1

    def __repr__(self) -> str:
        return f"AlignmentTasks({', '.join(self)})"

    def _render(self, config: str, split: str) -> datasets.Dataset:
        columns = features(self._rows.tasks)
        values: dict[str, list] = {name: [] for name in columns}
        for row in self._rows.rows(config, split):
            for name, column in values.items():
                column.append(row[name])
        return datasets.Dataset.from_dict(values, features=columns, split=datasets.NamedSplit(split))


@dataclass
class TaskConfig(datasets.BuilderConfig):
    """One config of the dataset: a task, or the mixture of all, rendered by `rows`."""

    rows: TaskRows | None = None


class ULMRecTasks(datasets.GeneratorBasedBuilder):
    """The builder behind `write_tasks`: a config for each task and one for their mixture.

    `ULMRecTasks(config_name="next_item", rows=TaskRows(...), config_id=..., cache_dir=...)`; `config_id` must differ
    where the rows do, since a cache folder is known by it alone.
    """

    BUILDER_CONFIG_CLASS = TaskConfig
    VERSION = datasets.Version("1.0.0")

    def _info(self) -> datasets.DatasetInfo:
        self.config.rows.splits(self.config.name)  # refuses an unknown config
        return datasets.DatasetInfo(features=features(self.config.rows.tasks))

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        splits = self.config.rows.splits(self.config.name)
        return [datasets.SplitGenerator(name=split, gen_kwargs={"split": split}) for split in splits]

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(self.config.rows.rows(self.config.name, split))


def write_tasks(
    rows: TaskRows, folder: str | os.PathLike, configs: Sequence[str] | None = None
) -> dict[str, dict[str, int]]:
    """Writes `<folder>/<config>/<split>-00000-of-00001.parquet` for each config, and README.md, the dataset card.

    `datasets.load_dataset(folder, "next_item")` reads it, without this package. Equal input gives equal bytes.

    Args:
        configs: tasks' names and `mixture`; all by default.

    Returns:
        The number of rows by config and split.

    Raises:
        ValueError: there is no such config, or a row cannot be rendered; see `TaskRows.row`.
    """
    folder = Path(folder).absolute()
    work = folder / ".builder"
    counts: dict[str, dict[str, int]] = {}
    try:
        for name in configs or (*rows.tasks, MIXTURE):
            builder = ULMRecTasks(config_name=name, rows=rows, config_id=f"{name}-rows", cache_dir=str(work / "cache"))
            try:
                builder.download_and_prepare(str(work / name), file_format="parquet")
            except datasets.exceptions.DatasetGenerationError as error:
                if isinstance(error.__cause__, ValueError):
                    raise error.__cause__ from None
                raise
            (folder / name).mkdir(parents=True, exist_ok=True)
            counts[name] = {}
            for split, info in builder.info.splits.items():
                shards = sorted((work / name).glob(f"*-{split}*.parquet"))
                for number, shard in enumerate(shards):
                    os.replace(shard, folder / name / f"{split}-{number:05d}-of-{len(shards):05d}.parquet")
                counts[name][str(split)] = info.num_examples
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for task, split, number, reason in _left_out(rows):
        logger.warning("%s, %s: %d rows left out: %s", task, split, number, reason)
    content = hash_value([hash_file(path) for path in sorted(folder.rglob("*.parquet"))])
    (folder / "README.md").write_text(_card(rows, counts, content), encoding="utf-8")
    return counts


def _left_out(rows: TaskRows) -> list[tuple[str, str, int, str]]:
    """(task, split, number of rows, why) of all rows that were left out."""
    return [
        (task, split, number, REASONS[rows.tasks[task].requires])
        for task, splits in rows.skipped.items()
        for split, number in splits.items()
        if number
    ]


def _card(rows: TaskRows, counts: dict[str, dict[str, int]], content: str) -> str:
    """The dataset card: YAML that `load_dataset` reads, then what is in the data."""
    configs = [
        {
            "config_name": name,
            # datasets 5.2 caches a folder by its name and these lines alone: other rows must have other lines
            "description": f"content {content}",
            "data_files": [{"split": split, "path": f"{name}/{split}-*.parquet"} for split in splits],
        }
        for name, splits in counts.items()
    ]
    table = [["config", *SPLITS, "proportion in the mixture"]]
    for name, splits in counts.items():
        proportion = "" if name == MIXTURE else f"{rows.args.mixture.get(name, 0):g}"
        table.append([name, *(str(splits.get(split, "-")) for split in SPLITS), proportion])
    left_out = [f"- {number} rows of {task}, {split}: {reason}." for task, split, number, reason in _left_out(rows)]
    index = rows.user_index
    meaning = "user tokens" if index is not None and KINDS[index.kind].adds_tokens else "user indices"
    lines = [
        "---",
        yaml.safe_dump({"configs": configs}, sort_keys=False).rstrip(),
        "---",
        "",
        "# Alignment tasks",
        "",
        f"Rows that teach a language model what the {meaning} mean and which item a user chooses next.",
        "",
        markdown_table(table),
        "",
        *(["The validation and test rows of `mixture` are those of `next_item`."] if MIXTURE in counts else []),
        *(["", "Left out:", "", *left_out] if left_out else []),
        "",
        "## Columns",
        "",
        f"- `task`: one of {', '.join(rows.tasks)}",
        "- `user`: number of the user, int32",
        "- `prompt`, `completion`: text; the completion of a missed candidate list is empty",
        "- `candidates`: item numbers in the order of their letters; empty where nothing is ranked",
        "- `label`: place of the target among the candidates; -1 = a miss, or nothing is ranked",
        "- `target`: item number of the target; 0 where there is none",
        "",
        *_method(rows),
    ]
    return "\n".join(lines)


def _method(rows: TaskRows) -> list[str]:
    """The card's lines on how the rows were made."""
    args, kind = rows.args, "none" if rows.user_index is None else rows.user_index.kind
    positions = f"the newest {args.train_positions}" if args.train_positions else "all"
    return [
        "## How the rows were made",
        "",
        *([f"- User index: {kind}."] if kind != "codes" else []),
        f"- Train rows: {positions} of the positions of each user's train part; history is what came before.",
        f"- History: the newest {args.max_history} items. A row has at most {args.max_length} tokens; a longer one "
        "lost its oldest history.",
        f"- Candidates in train: the target and up to {args.num_candidates - 1} others in random order, of which "
        f"{round(args.hard_negatives * (args.num_candidates - 1))} (share {args.hard_negatives:g}) from the retriever "
        "and the rest random items outside the history.",
        f"- Candidates in validation and test: the retriever's top {args.num_candidates}, order: "
        f"{args.evaluation_order}. The target is never added.",
        f"- Seed: {args.task_seed}.",
        "",
    ]
