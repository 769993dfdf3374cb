"""The rows of the alignment tasks, rendered from the data, the candidates, the preferences and the user index."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..prompts import (
    NONE,
    check_spellings,
    clean_titles,
    count_tokens,
    fit_history,
    neutralise,
    render_candidates,
    render_history,
    reserved_tokens,
    spell_user,
)
from ..protocol import MIN_ITEMS, MISS, SPLITS, target_positions, train_lengths
from ..tables import LeaveOneOut, RowLookup
from ..user_index import UserIndex
from ..verbalizer import LETTERS
from .arguments import TaskArguments
from .records import MIXTURE, MIXTURE_SEED, TASKS, Task
from .templates import PromptTemplates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNKNOWN = "unknown"


class _Row(NamedTuple):
    """A row that is still to be rendered."""

    task: Task
    user: int
    position: int
    target: int  # 0: none
    candidates: list[int]
    label: int
    anonymous: bool  # the place of the user index stays empty


class TaskRows:
    """Renders the rows of all registered tasks, in any order: a row depends on its user and position alone.

    Titles and preferences are neutralised, titles cut to `max_title_tokens`. A prompt holds what came before its
    target: history before the position, index and preference from interactions before the position and of the train
    part alone, ratings of the train part alone.

    Args:
        candidates: user, split, position, items list<int32> (the retriever's order); see `tables.CANDIDATES`.
        preferences: user, position, preference; see `tables.PREFERENCES`.
        user_index: spells a user id; None leaves the place of the user index empty in all rows.
        tokenizer: counts tokens; a fast one.

    Attributes:
        tasks: the records of the tasks by name.
        skipped: how many rows were left out, by task and split, of those asked for.

    Raises:
        ValueError: users with too few items, a template that names an unknown field, or two user ids that are spelled
            alike.
    """

    def __init__(
        self,
        args: TaskArguments,
        data: LeaveOneOut,
        candidates: pa.Table,
        preferences: pa.Table,
        user_index: UserIndex | None,
        tokenizer: "PreTrainedTokenizerBase",
    ):
        self.args, self.data, self.user_index, self.tokenizer = args, data, user_index, tokenizer
        self.tasks: dict[str, Task] = dict(TASKS)
        self.skipped: dict[str, dict[str, int]] = {}
        self._reserved = reserved_tokens(tokenizer)
        if user_index is not None:
            check_spellings(user_index, tokenizer, self._reserved)
        self._sequences = data.sequences
        self._lengths = self._sequences.lengths
        self._train_lengths = train_lengths(self._lengths)
        short = np.flatnonzero(self._lengths < MIN_ITEMS)
        if len(short):
            raise ValueError(
                f"sequences: {len(short)} users have fewer than {MIN_ITEMS} items and cannot be split, the first is "
                f"{data.user_ids[short[0]]!r}; raise k_core."
            )
        titles, counts = clean_titles(data.titles, tokenizer, args.max_title_tokens, self._reserved)
        self._titles, self._title_tokens = [NONE, *titles], [0, *counts]  # place 0 is the padding item's
        self._candidates = {
            split: RowLookup(candidates, "items", pc.equal(candidates["split"], split).to_numpy()) for split in SPLITS
        }
        self._preferences = RowLookup(preferences, "preference")
        self.templates = PromptTemplates.from_yaml(args.prompt_templates)
        # rendering every template once finds one that names an unknown field before any row is made
        self._frame_tokens = {
            name: count_tokens(tokenizer, *self.templates.render(name, **dict.fromkeys(task.fields, NONE)))
            for name, task in self.tasks.items()
        }

    def splits(self, config: str) -> tuple[str, ...]:
        """The splits of a task or of the mixture.

        Raises:
            ValueError: there is no such config.
        """
        if config != MIXTURE and config not in self.tasks:
            raise ValueError(f"config is {config!r}; it must be one of {', '.join([*self.tasks, MIXTURE])}.")
        return SPLITS if config == MIXTURE or self.tasks[config].evaluated else SPLITS[:1]

    def keys(self, name: str, split: str) -> np.ndarray:
        """The (user, position) of each row of a task's split, int32 [rows, 2], by user, then position.

        `position` is the place of the row's target in the user's items; for the tasks that have no target it is the
        length of the train part.
        """
        task = self.tasks[name]
        if split not in self.splits(name):
            return np.empty((0, 2), np.int32)
        if task.evaluated:
            users, positions = target_positions(self._lengths, split, self.args.train_positions)
        else:
            users, positions = np.arange(len(self._lengths)), self._train_lengths
        kept = self._known(task.requires, users, positions)
        self.skipped.setdefault(name, {})[split] = int((~kept).sum())
        return np.stack([users, positions], axis=1)[kept].astype(np.int32)

    def row(self, name: str, split: str, user: int, position: int) -> dict[str, Any]:
        """One rendered row with the columns of `dataset.features`, the task by name.

        Raises:
            ValueError: the row does not fit in max_length, or a table lacks the user's row.
        """
        task = self.tasks[name]
        target = int(self._sequences[user][position]) if task.evaluated else 0
        candidates = self._choose_candidates(task, split, user, position, target) if task.ranks else []
        label = candidates.index(target) if target in candidates else MISS
        anonymous = split == "train" and self._is_anonymous(task, user, position)
        prompt, completion = self._render(_Row(task, user, position, target, candidates, label, anonymous))
        return {
            "task": name,
            "user": user,
            "prompt": prompt,
            "completion": completion,
            "candidates": candidates,
            "label": label,
            "target": target,
        }

    def rows(self, config: str, split: str) -> Iterator[dict[str, Any]]:
        """The rows of a task or of `mixture`, whose validation and test rows are those of `next_item`."""
        if config == MIXTURE and split == "train":
            names = list(self.tasks)
            for number, user, position in self._mixture_keys().tolist():
                yield self.row(names[number], split, user, position)
            return
        name = "next_item" if config == MIXTURE else config
        for user, position in self.keys(name, split).tolist():
            yield self.row(name, split, user, position)

    def _mixture_keys(self) -> np.ndarray:
        """(task number, user, position) of the training rows of the mixture, int32 [rows, 3], shuffled."""
        parts = []
        for number, (name, task) in enumerate(self.tasks.items()):
            whole, share = divmod(self.args.mixture.get(name, 0.0), 1)
            keys = self.keys(name, "train")
            order = np.random.default_rng([self.args.task_seed, task.seed]).permutation(len(keys))
            keys = np.concatenate([np.tile(keys, (int(whole), 1)), keys[order[: round(share * len(keys))]]])
            parts.append(np.column_stack([np.full(len(keys), number, np.int32), keys]))
        keys = np.concatenate(parts)
        if not len(keys):
            raise ValueError(
                f"mixture is {self.args.mixture}, but these tasks have no training rows: no user has "
                f"{MIN_ITEMS + 1} items, or what a task requires (rating: ratings; preference: words of the user) is "
                "missing. Add tasks to the mixture or users with more items."
            )
        return keys[np.random.default_rng([self.args.task_seed, MIXTURE_SEED]).permutation(len(keys))]

    def _known(self, field: str | None, users: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """bool [rows]: whether a required field has a value in each row."""
        if field == "rating":
            return ~np.isnan(self.data.ratings[self._sequences.offsets[users] + positions])
        if field == "preference":
            rows = zip(users.tolist(), positions.tolist(), strict=True)
            return np.array([self._preference(user, position) != NONE for user, position in rows], bool)
        return np.ones(len(users), bool)

    def _is_anonymous(self, task: Task, user: int, position: int) -> bool:
        """Whether a training row leaves the index out; not where it is what the row is about."""
        share = self.args.anonymous_share
        if not share or not task.evaluated:
            return False
        # the 1 keeps the draw apart from that of the row's candidates
        return np.random.default_rng([self.args.task_seed, task.seed, user, position, 1]).random() < share

    def _render(self, row: _Row) -> tuple[str, str]:
        """Prompt and completion, with as much of the newest history as max_length allows."""
        name, shown = row.task.name, row.task.fields
        fields = {field: _FIELDS[field](self, row) for field in shown if field != "history"}
        past, ratings, kept_lines = self._history(row) if "history" in shown else ([], None, 0)
        titles = [self._titles[item] for item in past]
        # Counting by a tokenizer is slow, so it is done only where this sum of parts comes near the limit: whole
        # fields by their bytes, titles by their tokens, and 12 for what surrounds a title in its line.
        whole = (value for field, value in fields.items() if field != "candidates")
        bound = self._frame_tokens[name] + sum(len(value.encode()) for value in whole)
        bound += sum(self._title_tokens[item] + 12 for item in (*past, *row.candidates))

        def render(dropped: int) -> tuple[str, str]:
            if "history" in shown:
                fields["history"] = render_history(titles[dropped:], None if ratings is None else ratings[dropped:])
            return self.templates.render(name, **fields)

        return fit_history(
            render,
            max(len(past) - kept_lines, 0),
            self.tokenizer,
            self.args.max_length,
            subject=f"the {name} row of user {self.data.user_ids[row.user]!r}",
            advice="raise max_length, or lower num_candidates or max_title_tokens",
            bound=bound,
        )

    def _history(self, row: _Row) -> tuple[list[int], list[str] | None, int]:
        """Items oldest first, their ratings if the task is about ratings, and how many of the last lines must stay."""
        begin = self._sequences.offsets[row.user]
        oldest = max(0, row.position - self.args.max_history)
        past = self._sequences.items[begin + oldest : begin + row.position].tolist()
        if "rating" not in row.task.fields:
            return past, None, 0
        # what describes a user comes from the train part: a test row does not show the validation item's rating
        known = self.data.ratings[begin + oldest : begin + min(row.position, self._train_lengths[row.user])]
        ratings = [_spell_rating(rating) for rating in known.tolist()]
        return [*past, row.target], [*ratings, *[UNKNOWN] * (len(past) - len(ratings)), "?"], 1

    def _spell(self, user: int, position: int) -> str:
        """The user's index from the train part, before `position` where it is within."""
        if self.user_index is None:
            return ""
        user_id = self.data.user_ids[user]
        before = max(0, int(self._train_lengths[user]) - position)
        try:
            return spell_user(self.user_index, user_id, self._reserved, before)
        except KeyError:
            raise ValueError(f"user_index: user {user_id!r} has no index; run the indexing on these users.") from None

    def _preference(self, user: int, position: int) -> str:
        position = min(position, int(self._train_lengths[user]))
        text = self._preferences.get(user, position)
        if text is None:
            raise ValueError(
                f"preferences: user {self.data.user_ids[user]!r} has no row for position {position}; extract "
                "preferences for these sequences and at least as many train_positions."
            )
        return neutralise(text, self._reserved) or NONE

    def _choose_candidates(self, task: Task, split: str, user: int, position: int, target: int) -> list[int]:
        # one generator a row, so that more users or another order of the rows changes no row
        rng = np.random.default_rng([self.args.task_seed, task.seed, user, position])
        retrieved = self._candidates[split].get(user, position)
        if retrieved is None and (split != "train" or self.args.hard_negatives > 0):
            raise ValueError(
                f"candidates: user {self.data.user_ids[user]!r} has no {split} row for position {position}; run "
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
        # the items after `position` are not looked at: a negative that the user will choose later stays possible
        excluded = {target, *hard, *self._sequences[user][:position].tolist()}
        wanted = min(wanted, len(hard) + len(self._titles) - 1 - len(excluded))
        negatives = hard
        while len(negatives) < wanted:
            item = int(rng.integers(1, len(self._titles)))
            if item not in excluded:
                excluded.add(item)
                negatives.append(item)
        return negatives


# The fields of `records.FIELDS` but the history, which is fitted to max_length.
_FIELDS: dict[str, Callable[[TaskRows, _Row], str]] = {
    "user": lambda rows, row: "" if row.anonymous else rows._spell(row.user, row.position),
    "preference": lambda rows, row: rows._preference(row.user, row.position),
    "candidates": lambda rows, row: render_candidates([rows._titles[item] for item in row.candidates]),
    "letter": lambda rows, row: LETTERS[row.label] if row.label != MISS else "",
    "rating": lambda rows, row: _spell_rating(rows.data.ratings[rows._sequences.offsets[row.user] + row.position]),
    "title": lambda rows, row: rows._titles[row.target],
}


def _spell_rating(rating: float) -> str:
    return UNKNOWN if math.isnan(rating) else f"{float(rating):g}"
