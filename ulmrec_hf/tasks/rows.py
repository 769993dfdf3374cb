"""The six alignment tasks as a dataset: rows rendered from the stages' tables, and the builder that writes them."""

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from ..files import hash_file, hash_value
from ..prompts import (
    LETTERS,
    NONE,
    RANKING_TASKS,
    TASKS,
    USER_TOKENS,
    PromptTemplates,
    check_spellings,
    neutralise,
    render_candidates,
    render_history,
    reserved_tokens,
    spell_user,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..user_index import UserIndex

logger = logging.getLogger(__name__)

MIXTURE = "mixture"
CONFIGS = (*TASKS, MIXTURE)
SPLITS = ("train", "validation", "test")
EVALUATED = (*RANKING_TASKS, "rating", MIXTURE)  # the other configs have a train split only
EVALUATION_ORDERS = ("retriever", "shuffled")
HELD_OUT = 2  # leave-one-out: a user's last item is the test target, the one before it the validation target
MISS = -1  # the label of a row whose candidates do not hold the target, or whose task ranks nothing
UNKNOWN = "unknown"
_FIELDS = {
    "next_item": ("user", "history", "candidates", "letter"),
    "index_to_preference": ("user", "preference"),
    "preference_to_index": ("user", "preference"),
    "history_to_index": ("user", "history"),
    "rating": ("user", "preference", "history", "rating"),
    "intent_next_item": ("preference", "candidates", "letter"),
}
FEATURES = datasets.Features(
    {
        "task": datasets.ClassLabel(names=list(TASKS)),
        "user": datasets.Value("int32"),
        "prompt": datasets.Value("string"),
        "completion": datasets.Value("string"),
        "candidates": datasets.List(datasets.Value("int32")),
        "label": datasets.Value("int8"),
        "target": datasets.Value("int32"),
    }
)


@dataclass
class TaskArguments:
    """How the rows of the six tasks are made.

    Raises:
        ValueError: a setting has a value that cannot be used; the message names the setting.
    """

    max_history: int = field(default=20, metadata={"help": "Newest history items shown in a prompt."})
    num_candidates: int = field(
        default=20, metadata={"help": "Candidates of a ranking row, 2 to 52 (one letter each, A-Z and a-z)."}
    )
    max_title_tokens: int = field(default=32, metadata={"help": "Longer titles are cut to this many tokens."})
    max_length: int = field(
        default=1024,
        metadata={
            "help": "Most tokens of prompt and completion together, the end token counted. A row that is longer loses "
            "its oldest history first, never candidates or completion."
        },
    )
    train_positions: int = field(
        default=5, metadata={"help": "Newest positions of every user's train part that become training rows; 0 = all."}
    )
    hard_negatives: float = field(
        default=0.5,
        metadata={
            "help": "Share of a training row's wrong candidates that come from the retriever; the rest are random."
        },
    )
    mixture: dict[str, float] | str | None = field(
        default_factory=lambda: dict.fromkeys(TASKS, 1.0),
        metadata={
            "help": "How much of each task is in the training mixture: 1 = every row once, 0.5 = half of the rows, 2 = "
            f"every row twice; a task not named is left out. Tasks: {', '.join(TASKS)}. As JSON on the command line."
        },
    )
    prompt_templates: str | None = field(
        default=None, metadata={"help": "YAML file with other prompt templates; the package's own by default."}
    )
    evaluation_order: str = field(
        default="retriever",
        metadata={
            "help": "Order of the candidates in validation and test: the retriever's, or shuffled by the seed.",
            "choices": list(EVALUATION_ORDERS),
        },
    )
    task_seed: int = field(default=42, metadata={"help": "Seed of negatives, orders and samples; at least 0."})

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
        if not 0 <= self.hard_negatives <= 1:
            raise ValueError(f"hard_negatives is {self.hard_negatives!r}; it must be a share from 0 to 1.")
        if self.evaluation_order not in EVALUATION_ORDERS:
            raise ValueError(
                f"evaluation_order is {self.evaluation_order!r}; it must be one of {', '.join(EVALUATION_ORDERS)}."
            )
        if isinstance(self.mixture, str):
            try:
                self.mixture = json.loads(self.mixture)
            except json.JSONDecodeError:
                raise ValueError(
                    f'mixture is {self.mixture!r}; on the command line it must be JSON: {{"next_item": 1}}.'
                ) from None
        if self.mixture is None:
            self.mixture = dict.fromkeys(TASKS, 1.0)
        if not isinstance(self.mixture, dict) or not set(self.mixture) <= set(TASKS):
            raise ValueError(f"mixture is {self.mixture!r}; it must give a number for some of {', '.join(TASKS)}.")
        if not all(
            isinstance(share, int | float) and math.isfinite(share) and share >= 0 for share in self.mixture.values()
        ) or not any(self.mixture.values()):
            raise ValueError(f"mixture is {self.mixture!r}; proportions are numbers of at least 0, not all of them 0.")


class TaskRows:
    """Renders the rows of the six tasks, in any order: a row depends on nothing but its user and position.

    Titles and preferences are neutralised, titles cut to `max_title_tokens`. A prompt holds what came before its
    target: history before the position, preference from interactions before the position and of the train part alone,
    ratings of the train part alone.

    Args:
        args: the settings.
        sequences: user int32 (0, 1, ...), user_id str, items list<int32>, ratings list<float32> (null, NaN: unknown).
        items: item int32 (1..n, all of them), title str.
        candidates: user, split, position, items list<int32> (the retriever's order).
        preferences: user, position, preference str.
        user_index: spells a user id; None renders rows without a user index.
        tokenizer: counts tokens; a fast one.

    Attributes:
        skipped: rows left out, by task and split.

    Raises:
        ValueError: tables that do not fit together, a template that names an unknown field, or two user ids that are
            spelled alike.
    """

    def __init__(
        self,
        args: TaskArguments,
        *,
        sequences: pa.Table,
        items: pa.Table,
        candidates: pa.Table,
        preferences: pa.Table,
        user_index: "UserIndex | None",
        tokenizer: "PreTrainedTokenizerBase",
    ):
        self.args = args
        self.skipped: dict[str, dict[str, int]] = {}
        self._tokenizer = tokenizer
        self._user_index = user_index
        self._reserved = reserved_tokens(tokenizer)
        if user_index is not None:
            check_spellings(user_index, tokenizer, self._reserved)

        self._user_ids = sequences["user_id"]
        self._offsets, self._items = _flatten(sequences["items"])
        self._lengths = np.diff(self._offsets)
        if not np.array_equal(sequences["user"].to_numpy(), np.arange(len(self._lengths))):
            raise ValueError("sequences: the column user must be 0, 1, 2, ... in order; prepare the data again.")
        short = np.flatnonzero(self._lengths <= HELD_OUT)
        if len(short):
            raise ValueError(
                f"sequences: {len(short)} users have fewer than {HELD_OUT + 1} items and cannot be split, the first is "
                f"{self._user_ids[int(short[0])].as_py()!r}; raise k_core."
            )
        rating_offsets, self._ratings = _flatten(sequences["ratings"])
        if len(self._ratings) == 0:
            self._ratings = np.full(len(self._items), np.nan, np.float32)
        elif not np.array_equal(rating_offsets - rating_offsets[0], self._offsets - self._offsets[0]):
            raise ValueError("sequences: ratings and items of some user differ in number; prepare the data again.")
        else:
            self._ratings = self._ratings[rating_offsets[0] :].astype(np.float32)
        self._items = self._items[self._offsets[0] : self._offsets[-1]]
        self._offsets = self._offsets - self._offsets[0]

        if not np.array_equal(items["item"].to_numpy(), np.arange(1, items.num_rows + 1)):
            raise ValueError("items: the column item must be 1, 2, 3, ... in order; prepare the data again.")
        if len(self._items) and not 1 <= self._items.min() <= self._items.max() <= items.num_rows:
            raise ValueError(f"sequences: items are 1 to {items.num_rows}, but another number occurs; prepare again.")
        self._titles, self._title_tokens = self._clean_titles(items["title"])

        self._candidates = {
            split: _Lookup(candidates, "items", pc.equal(candidates["split"], split).to_numpy()) for split in SPLITS
        }
        self._preferences = _Lookup(preferences, "preference")
        self._templates = PromptTemplates.from_yaml(args.prompt_templates)
        # rendering every template once finds one that names an unknown field before any row is made
        self._frame_tokens = {
            task: self._count(*self._templates.render(task, **dict.fromkeys(_FIELDS[task], ""))) for task in TASKS
        }

    def keys(self, task: str, split: str) -> np.ndarray:
        """The (user, position) of each row of a task's split, int32 [rows, 2], by user, then position.

        `position` is the place of the row's target in the user's items; for the tasks that have no target it is the
        length of the train part.
        """
        users, train = np.arange(len(self._lengths)), self._lengths - HELD_OUT
        if split != "train":
            if task not in EVALUATED:
                return np.empty((0, 2), np.int32)
            keys = np.stack([users, train + SPLITS.index(split) - 1], axis=1)
        elif task in EVALUATED:
            first = (
                np.maximum(1, train - self.args.train_positions) if self.args.train_positions else np.ones_like(train)
            )
            counts = np.maximum(train - first, 0)
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            keys = np.stack([np.repeat(users, counts), np.repeat(first, counts) + within], axis=1)
        else:
            keys = np.stack([users, train], axis=1)
        kept = np.ones(len(keys), bool)
        if task == "rating":
            kept = ~np.isnan(self._ratings[self._offsets[keys[:, 0]] + keys[:, 1]])
        elif task in ("index_to_preference", "preference_to_index"):
            kept = np.array([self._preference(user, position) != NONE for user, position in keys.tolist()], bool)
        self.skipped.setdefault(task, {})[split] = int((~kept).sum())
        return keys[kept].astype(np.int32)

    def row(self, task: str, split: str, user: int, position: int, *, history: bool = True) -> dict[str, Any]:
        """One rendered row with the columns of `FEATURES`, the task by name.

        Raises:
            ValueError: the row does not fit in max_length, or a table lacks the user's row.
        """
        begin = self._offsets[user]
        target = int(self._items[begin + position]) if task in EVALUATED else 0
        oldest = max(0, position - self.args.max_history) if history else position
        past = self._items[begin + oldest : begin + position].tolist()
        ratings, kept_lines = None, 0
        fields: dict[str, str] = {}
        candidates: list[int] = []
        label = MISS
        if "user" in _FIELDS[task]:
            fields["user"] = self._spell(user)
        if "preference" in _FIELDS[task]:
            fields["preference"] = self._preference(user, position)
        if task in RANKING_TASKS:
            candidates = self._choose_candidates(task, split, user, position, target)
            label = candidates.index(target) if target in candidates else MISS
            fields["candidates"] = render_candidates([self._titles[item] for item in candidates])
            fields["letter"] = LETTERS[label] if label != MISS else ""
        if task == "rating":
            # what describes a user comes from the train part: in a test row the validation item's rating is not told
            known = self._ratings[begin + oldest : begin + min(position, self._lengths[user] - HELD_OUT)]
            ratings = [_spell_rating(rating) for rating in known.tolist()]
            ratings += [UNKNOWN] * (len(past) - len(ratings)) + ["?"]
            past, kept_lines = [*past, target], 1
            fields["rating"] = _spell_rating(float(self._ratings[begin + position]))
        if "history" not in _FIELDS[task]:
            past = []
        prompt, completion = self._fit(task, fields, past, ratings, kept_lines, candidates, user)
        return {
            "task": task,
            "user": user,
            "prompt": prompt,
            "completion": completion,
            "candidates": candidates,
            "label": label,
            "target": target,
        }

    def rows(self, config: str, split: str, *, history: bool = True) -> Iterator[dict[str, Any]]:
        """The rows of a config's split, one after the other.

        Args:
            config: one of the six tasks or `mixture`, whose validation and test rows are those of `next_item`.
            history: False shows no history, for ranking by the user index alone.
        """
        if config == MIXTURE and split != "train":
            config = "next_item"
        if config == MIXTURE:
            for task, user, position in self._mixture_keys().tolist():
                yield self.row(TASKS[task], split, user, position, history=history)
        else:
            for user, position in self.keys(config, split).tolist():
                yield self.row(config, split, user, position, history=history)

    def _mixture_keys(self) -> np.ndarray:
        """(task number, user, position) of the mixture's training rows, int32 [rows, 3], shuffled."""
        parts = []
        for number, task in enumerate(TASKS):
            whole, share = divmod(self.args.mixture.get(task, 0.0), 1)
            keys = self.keys(task, "train")
            sample = np.random.default_rng([self.args.task_seed, number]).permutation(len(keys))[
                : round(share * len(keys))
            ]
            keys = np.concatenate([np.tile(keys, (int(whole), 1)), keys[sample]])
            parts.append(np.column_stack([np.full(len(keys), number, np.int32), keys]))
        keys = np.concatenate(parts)
        return keys[np.random.default_rng([self.args.task_seed, len(TASKS)]).permutation(len(keys))]

    def _spell(self, user: int) -> str:
        if self._user_index is None:
            return ""
        user_id = self._user_ids[user].as_py()
        try:
            return spell_user(self._user_index, user_id, self._reserved)
        except KeyError:
            raise ValueError(f"user_index: user {user_id!r} has no index; run the indexing on these users.") from None

    def _preference(self, user: int, position: int) -> str:
        position = min(position, int(self._lengths[user]) - HELD_OUT)
        text = self._preferences.get(user, position)
        if text is None:
            raise ValueError(
                f"preferences: user {self._user_ids[user].as_py()!r} has no row for position {position}; extract "
                "preferences for these sequences and at least as many train_positions."
            )
        return neutralise(text, self._reserved) or NONE

    def _choose_candidates(self, task: str, split: str, user: int, position: int, target: int) -> list[int]:
        # one generator a row, so that more users or another order of the rows changes no row
        rng = np.random.default_rng([self.args.task_seed, TASKS.index(task), user, position])
        retrieved = self._candidates[split].get(user, position)
        if retrieved is None and (split != "train" or self.args.hard_negatives > 0):
            raise ValueError(
                f"candidates: user {self._user_ids[user].as_py()!r} has no {split} row for position {position}; run "
                "the retriever on these sequences with at least as many train_positions."
            )
        if split == "train":
            candidates = [target, *self._negatives(rng, user, position, target, retrieved or [])]
        else:
            candidates = retrieved[: self.args.num_candidates]  # the target is never added: a miss stays a miss
        if split == "train" or self.args.evaluation_order == "shuffled":
            candidates = [candidates[place] for place in rng.permutation(len(candidates))]
        return candidates

    def _negatives(
        self, rng: np.random.Generator, user: int, position: int, target: int, retrieved: list[int]
    ) -> list[int]:
        """Wrong candidates of a training row; fewer than asked for only where the catalogue is too small."""
        wanted = self.args.num_candidates - 1
        pool = [item for item in retrieved if item != target]
        hard = rng.permutation(pool)[: round(self.args.hard_negatives * wanted)].tolist() if pool else []
        begin = self._offsets[user]
        # the items after `position` are not looked at: a negative that the user will choose later stays possible
        excluded = {target, *hard, *self._items[begin : begin + position].tolist()}
        wanted = min(wanted, len(hard) + len(self._titles) - 1 - len(excluded))
        negatives = hard
        while len(negatives) < wanted:
            item = int(rng.integers(1, len(self._titles)))
            if item not in excluded:
                excluded.add(item)
                negatives.append(item)
        return negatives

    def _fit(
        self,
        task: str,
        fields: dict[str, str],
        past: Sequence[int],
        ratings: Sequence[str] | None,
        kept_lines: int,
        candidates: Sequence[int],
        user: int,
    ) -> tuple[str, str]:
        """Renders with as much of the newest history as max_length allows; the last `kept_lines` always stay."""
        # Counting by a tokenizer is slow, so it is done only where this sum of parts comes near the limit: whole
        # fields by their bytes, titles by their tokens, and 12 for what surrounds a title in its line.
        bound = self._frame_tokens[task] + sum(
            len(value.encode()) for name, value in fields.items() if name != "candidates"
        )
        bound += int(sum(self._title_tokens[item] + 12 for item in (*past, *candidates)))
        titles = [self._titles[item] for item in past]
        for first in range(max(len(past) - kept_lines, 0) + 1):
            if "history" in _FIELDS[task]:
                fields["history"] = render_history(titles[first:], ratings[first:] if ratings is not None else None)
            prompt, completion = self._templates.render(task, **fields)
            if bound <= self.args.max_length or self._count(prompt, completion) <= self.args.max_length:
                return prompt, completion
        raise ValueError(
            f"max_length is {self.args.max_length}, but the {task} row of user {self._user_ids[user].as_py()!r} has "
            f"{self._count(prompt, completion)} tokens even without history: raise max_length, or lower num_candidates "
            "or max_title_tokens."
        )

    def _count(self, prompt: str, completion: str) -> int:
        # a miss is counted as if it had a letter, so that the target decides nothing about the prompt
        return len(self._tokenizer(prompt + (completion or LETTERS[0]), verbose=False)["input_ids"]) + 1

    def _clean_titles(self, titles: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
        """Neutralised titles of at most max_title_tokens tokens, and their tokens; entry 0 is the padding item's."""
        limit = self.args.max_title_tokens
        cleaned, counts = [NONE], [0]
        for begin in range(0, len(titles), 1000):
            texts = [
                neutralise(title or "", self._reserved) or NONE for title in titles[begin : begin + 1000].to_pylist()
            ]
            encoded = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            for text, offsets in zip(texts, encoded["offset_mapping"], strict=True):
                # where the first dropped token begins: a character that is several tokens goes as a whole
                cleaned.append(text[: offsets[limit][0]].rstrip() or NONE if len(offsets) > limit else text)
                counts.append(min(len(offsets), limit))
        return cleaned, np.array(counts, np.int64)


class _Lookup:
    """A table's column by (user, position); holds 16 bytes a row beside the table, which may be memory-mapped."""

    def __init__(self, table: pa.Table, column: str, mask: np.ndarray | None = None):
        rows = np.arange(table.num_rows) if mask is None else np.flatnonzero(mask)
        keys = (table["user"].to_numpy().astype(np.int64)[rows] << 32) | table["position"].to_numpy()[rows]
        order = np.argsort(keys, kind="stable")
        self._keys, self._rows, self._column = keys[order], rows[order], table[column]

    def get(self, user: int, position: int) -> Any:
        key = (user << 32) | position
        place = int(np.searchsorted(self._keys, key))
        if place == len(self._keys) or self._keys[place] != key:
            return None
        return self._column[int(self._rows[place])].as_py()


def _flatten(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The offsets (int64) and values of a column of lists; unknown values become NaN."""
    array = column.combine_chunks()
    return array.offsets.to_numpy().astype(np.int64), array.values.to_numpy(zero_copy_only=False)


def _spell_rating(rating: float) -> str:
    return UNKNOWN if math.isnan(rating) else f"{rating:g}"


def strip_user_tokens(text: str) -> str:
    """Removes every user token from a prompt or completion, for runs without a user index.

    An index of another kind is text like any other: render its rows anew, by `TaskRows` with `user_index=None`.
    """
    return USER_TOKENS.sub("", text)


@dataclass
class TaskConfig(datasets.BuilderConfig):
    """One config of the dataset: a task, or the mixture of all.

    Attributes:
        rows: renders the rows.
    """

    rows: TaskRows | None = None


class ULMRecTasks(datasets.GeneratorBasedBuilder):
    """The alignment dataset: a config for each of the six tasks and one for their mixture.

    `ULMRecTasks(config_name="next_item", rows=TaskRows(...), config_id=..., cache_dir=...)`; `config_id` must differ
    where the rows do, since a cache folder is known by it alone. `write_tasks` writes all configs as Parquet, which
    `datasets.load_dataset` reads without this package.
    """

    BUILDER_CONFIG_CLASS = TaskConfig
    BUILDER_CONFIGS = [TaskConfig(name=name, version=datasets.Version("1.0.0")) for name in CONFIGS]  # noqa: RUF012

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=FEATURES)

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        splits = SPLITS if self.config.name in EVALUATED else SPLITS[:1]
        return [datasets.SplitGenerator(name=split, gen_kwargs={"split": split}) for split in splits]

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(self.config.rows.rows(self.config.name, split))


def write_tasks(
    args: TaskArguments,
    *,
    sequences: pa.Table,
    items: pa.Table,
    candidates: pa.Table,
    preferences: pa.Table,
    user_index: "UserIndex | None",
    tokenizer: "PreTrainedTokenizerBase",
    folder: str | os.PathLike,
) -> dict[str, dict[str, int]]:
    """Writes `<folder>/<config>/<split>-00000-of-00001.parquet` for the seven configs, and README.md, the dataset card.

    `datasets.load_dataset(folder, "next_item")` reads it. Equal input gives equal bytes.

    Args:
        folder: where to write; see `TaskRows` for the tables.

    Returns:
        The number of rows by config and split.

    Raises:
        ValueError: see `TaskRows`.
    """
    rows = TaskRows(
        args,
        sequences=sequences,
        items=items,
        candidates=candidates,
        preferences=preferences,
        user_index=user_index,
        tokenizer=tokenizer,
    )
    folder = Path(folder).absolute()
    work = folder / ".builder"
    counts = {}
    try:
        for name in CONFIGS:
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
    for task, splits in rows.skipped.items():
        for split, skipped in splits.items():
            if skipped:
                logger.warning("%s, %s: %d rows left out: %s", task, split, skipped, _why_skipped(task))
    content = hash_value([hash_file(path) for path in sorted(folder.rglob("*.parquet"))])
    kind = user_index.kind if user_index is not None else "none"
    (folder / "README.md").write_text(_card(args, counts, rows.skipped, content, kind), encoding="utf-8")
    return counts


def _why_skipped(task: str) -> str:
    return "the target's rating is unknown" if task == "rating" else "the user's preference is empty"


def _card(
    args: TaskArguments, counts: dict[str, dict[str, int]], skipped: dict[str, dict[str, int]], content: str, kind: str
) -> str:
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
    table = [
        f"| {name} | " + " | ".join(str(splits.get(split, "-")) for split in SPLITS) + f" | {proportion} |"
        for name, splits in counts.items()
        for proportion in [f"{args.mixture.get(name, 0):g}" if name != MIXTURE else ""]
    ]
    left_out = [
        f"- {number} rows of {task}, {split}: {_why_skipped(task)}."
        for task, splits in skipped.items()
        for split, number in splits.items()
        if number
    ]
    positions = f"the newest {args.train_positions}" if args.train_positions else "all"
    lines = [
        "---",
        yaml.safe_dump({"configs": configs}, sort_keys=False).rstrip(),
        "---",
        "",
        "# Alignment tasks",
        "",
        f"Rows that teach a language model what the {'user tokens' if kind == 'codes' else 'user indices'} mean and "
        "which item a user chooses next.",
        "",
        "| config | train | validation | test | proportion in the mixture |",
        "|---|---|---|---|---|",
        *table,
        "",
        "The validation and test rows of `mixture` are those of `next_item`.",
        *(["", "Left out:", "", *left_out] if left_out else []),
        "",
        "## Columns",
        "",
        f"- `task`: one of {', '.join(TASKS)}",
        "- `user`: number of the user, int32",
        "- `prompt`, `completion`: text; the completion of a missed candidate list is empty",
        "- `candidates`: item numbers in the order of their letters; empty where nothing is ranked",
        "- `label`: place of the target among the candidates; -1 = a miss, or nothing is ranked",
        "- `target`: item number of the target; 0 where there is none",
        "",
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
    return "\n".join(lines)
