"""UserRanker: a user, a history and candidates in; ranked titles with scores out."""

import copy
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import Pipeline, PreTrainedModel, PreTrainedTokenizerBase

from .files import write_table
from .prompts import (
    check_spellings,
    clean_titles,
    fit_history,
    render_candidates,
    render_history,
    reserved_tokens,
    spell_user,
)
from .publishing import (
    ITEMS_FILE,
    TEMPLATES_FILE,
    USER_INDEX_FILE,
    Published,
    load_published,
    publish_model,
    read_ranker_file,
)
from .tasks.templates import PromptTemplates
from .user_index import UserIndex
from .verbalizer import LetterVerbalizer

if TYPE_CHECKING:
    from .tasks.arguments import TaskArguments
    from .tasks.dataset import AlignmentTasks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankerSettings:
    """The fields of `TaskArguments` in tuning that the prompts of ranking must repeat; part of ranker.json."""

    num_candidates: int = 20
    max_history: int = 20
    max_title_tokens: int = 32
    max_length: int = 1024

    @classmethod
    def of(cls, tasks: "TaskArguments") -> Self:
        """Those of the tasks that a model is tuned on."""
        return cls(**{field.name: getattr(tasks, field.name) for field in fields(cls)})


class UserRanker:
    """Ranks a user's candidates by the letter logits of one forward pass.

    Args:
        model, tokenizer, settings: as in tuning.
        templates: as in tuning; the package's own by default.
        user_index: spells a user id as in tuning; without one every user is ranked by history alone.
        titles: the title of each item id.

    Raises:
        ValueError: the letters are not single tokens of this tokenizer (see `LetterVerbalizer`), or two user ids are
            spelled alike.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: RankerSettings | None = None,
        *,
        templates: PromptTemplates | None = None,
        user_index: UserIndex | None = None,
        titles: dict[str, str] | None = None,
    ):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.settings = settings or RankerSettings()
        self.user_index = user_index
        self.titles = titles or {}
        self._item_ids = {title: item_id for item_id, title in reversed(self.titles.items())}
        self.templates = templates or PromptTemplates.from_yaml()
        self._reserved = reserved_tokens(tokenizer)
        if user_index is not None:
            check_spellings(user_index, tokenizer, self._reserved)
        self._verbalizer = LetterVerbalizer(tokenizer, self._render("", [], []), self.settings.num_candidates)
        self._warned_of_unknown = False

    @classmethod
    def from_tasks(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: "AlignmentTasks") -> Self:
        """A ranker with the prompts of the tasks that the model was tuned on, their users and their catalogue."""
        titles = dict(zip(tasks.data.item_ids, tasks.data.titles, strict=True))
        return cls(
            model,
            tokenizer,
            RankerSettings.of(tasks.args),
            templates=tasks.templates,
            user_index=tasks.users,
            titles=titles,
        )

    def save_pretrained(self, folder: str | os.PathLike, *, user_map: bool = True, merged: bool = False) -> None:
        """Writes what `from_pretrained` reads; other files in the folder are left alone.

        Args:
            user_map: write the users' indices with their ids, which are personal data.
            merged: also write the adapter merged into its base.
        """
        folder = Path(folder)
        published = Published(self.model.base_source, asdict(self.settings), merged=merged)
        publish_model(self.model, self.tokenizer, folder, published)
        self.templates.to_yaml(folder / TEMPLATES_FILE)
        items = {"item_id": pa.array(self.titles, pa.string()), "title": pa.array(self.titles.values(), pa.string())}
        write_table(
            folder / ITEMS_FILE, pa.table({"item": pa.array(range(1, len(self.titles) + 1), pa.int32())} | items)
        )
        (folder / USER_INDEX_FILE).unlink(missing_ok=True)  # of an earlier save
        if user_map and self.user_index is not None:
            self.user_index.to_parquet(folder / USER_INDEX_FILE, earlier=False)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        base: str | os.PathLike | None = None,
        *,
        device: str | torch.device | None = None,
        **model_kwargs: Any,
    ) -> "UserRanker":
        """Loads a published model folder, wherever it was moved.

        Args:
            folder: holds ranker.json and adapter/, base/ or merged/ (the last is used without the others).
            base: hub id or folder of the base to put the adapter on, instead of what the adapter names.
            device: where to run; an accelerator if there is one by default.
            model_kwargs: instead of the dtype and quantisation of the tuning; see `publishing.load_published`.

        Raises:
            ValueError: the folder is no published model, or its base is not there.
        """
        folder = Path(folder)
        record = read_ranker_file(folder)
        settings = {field.name: record[field.name] for field in fields(RankerSettings) if field.name in record}
        model_kwargs.setdefault("device_map", {"": device or torch.accelerator.current_accelerator() or "cpu"})
        model, tokenizer = load_published(folder, base, **model_kwargs)
        titles = {}
        if (folder / ITEMS_FILE).is_file():
            items = pq.read_table(folder / ITEMS_FILE, columns=["item_id", "title"])
            titles = dict(zip(items["item_id"].to_pylist(), items["title"].to_pylist(), strict=True))
        templates, user_index = folder / TEMPLATES_FILE, folder / USER_INDEX_FILE
        return cls(
            model,
            tokenizer,
            RankerSettings(**settings),
            templates=PromptTemplates.from_yaml(templates) if templates.is_file() else None,
            user_index=UserIndex.from_parquet(user_index) if user_index.is_file() else None,
            titles=titles,
        )

    def rank(
        self,
        user_id: str,
        history: Sequence[str],
        candidates: Sequence[str],
        *,
        orders: int = 1,
        seed: int = 0,
        batch_size: int = 8,
    ) -> list[dict[str, Any]]:
        """Ranks candidates for a user, best first.

        Args:
            user_id: a user without an index is ranked by history alone, with a warning the first time.
            history: item ids or titles, oldest first; the newest `max_history` are shown.
            candidates: item ids or titles; a string that is no known item id is taken as a title.
            orders: 1 shows the candidates as given; more averages the scores over that many seeded permutations.
            seed: of the permutations.
            batch_size: prompts a forward pass.

        Returns:
            One dict a candidate: title, item_id (None where unknown), score (the letter's logit; only differences
            between candidates of one call mean something). Equal scores keep the given order.

        Raises:
            ValueError: more candidates than the model was tuned with, none, or a prompt that is longer than max_length.
        """
        if orders < 1:
            raise ValueError(f"orders is {orders}; it must be at least 1.")
        history, candidates = _titles("history", history), _titles("candidates", candidates)
        rng = np.random.default_rng(seed)
        count = len(candidates)
        places = [rng.permutation(count) if orders > 1 else np.arange(count) for _ in range(orders)]
        prompts = [self.prompt(user_id, history, [candidates[place] for place in order]) for order in places]
        scores = np.zeros(count)
        for order, row in zip(places, self.scores(prompts, count, batch_size=batch_size), strict=True):
            scores[order] += row / orders
        return self.ranked(candidates, scores)

    def ranked(self, candidates: Sequence[str], scores: Sequence[float]) -> list[dict[str, Any]]:
        """Candidates (item ids or titles) with their scores as `rank` returns them, best first."""
        rows = []
        for place in np.argsort(-np.asarray(scores), kind="stable").tolist():
            title = self.titles.get(candidates[place], candidates[place])
            item_id = candidates[place] if candidates[place] in self.titles else self._item_ids.get(title)
            rows.append({"title": title, "item_id": item_id, "score": float(scores[place])})
        return rows

    def prompt(
        self, user_id: str | None, history: Sequence[str], candidates: Sequence[str], *, index: UserIndex | None = None
    ) -> str:
        """The prompt of the next-item task, the same as in tuning.

        Args:
            user_id: None = a user without an index.
            history, candidates: see `rank`, also for the errors.
            index: where this user's index is; by default in the ranker's own map, if at all.
        """
        history, candidates = _titles("history", history), _titles("candidates", candidates)
        self._check_candidates(len(candidates))
        newest = history[max(0, len(history) - self.settings.max_history) :]
        titles, _ = clean_titles(
            [self.titles.get(item, item) for item in (*newest, *candidates)],
            self.tokenizer,
            self.settings.max_title_tokens,
            self._reserved,
        )
        past, offered = titles[: len(newest)], titles[len(newest) :]
        user = self._spell(user_id) if index is None else spell_user(index, user_id, self._reserved)
        prompt, _ = fit_history(
            lambda dropped: (self._render(user, past[dropped:], offered), ""),
            len(past),
            self.tokenizer,
            self.settings.max_length,
            subject=f"the prompt of user {user_id!r}",
            advice="give fewer candidates",
        )
        return prompt

    def scores(self, prompts: Sequence[str], num_candidates: int, *, batch_size: int = 8) -> np.ndarray:
        """Letter logits float32 [prompts, num_candidates], in the order of the letters.

        Prompts of similar length share a batch, which is one forward pass; only its last position is read.
        """
        self._check_candidates(num_candidates)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        scores = np.empty((len(prompts), num_candidates), np.float32)
        if not len(prompts):
            return scores
        ids = self.tokenizer(list(prompts), verbose=False)["input_ids"]
        # the longest first, so that a lack of memory shows at once
        order = sorted(range(len(ids)), key=lambda place: -len(ids[place]))
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            padded = self.tokenizer.pad(
                {"input_ids": [ids[place] for place in batch]}, padding_side="left", return_tensors="pt"
            )
            scores[batch] = self.letter_scores(padded["input_ids"], padded["attention_mask"])[:, :num_candidates]
        return scores

    @torch.inference_mode()
    def letter_scores(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> np.ndarray:
        """Logits float32 [batch, letters] at the last position of a batch padded on the left."""
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
        }
        batch = {name: values.to(self.model.device) for name, values in batch.items()}
        return self._verbalizer.scores(self.model, batch).cpu().numpy()

    def _render(self, user: str, history: Sequence[str], candidates: Sequence[str]) -> str:
        fields = {"history": render_history(history), "candidates": render_candidates(candidates)}
        return self.templates.render("next_item", user=user, letter="", **fields)[0]

    def _spell(self, user_id: str | None) -> str:
        if user_id is None:
            return ""
        if not isinstance(user_id, str):
            raise ValueError(f"user ids are strings, {str(user_id)!r} for example; got {user_id!r}.")
        if self.user_index is not None and user_id in self.user_index:
            return spell_user(self.user_index, user_id, self._reserved)
        if not self._warned_of_unknown:
            logger.warning(
                "User %r has no user index and is ranked by history alone; later such users are not named.", user_id
            )
            self._warned_of_unknown = True
        return ""

    def _check_candidates(self, count: int) -> None:
        limit = self.settings.num_candidates
        if not 1 <= count <= limit:
            raise ValueError(
                f"{count} candidates were given, but this model was tuned with letters for 1 to {limit} "
                f"(num_candidates): rank at most {limit} at a time."
            )


def _titles(name: str, values: Sequence[str]) -> list[str]:
    """The values as a list; ValueError where they are not strings."""
    listed = [values] if values is None or isinstance(values, str) else list(values)
    wrong = listed if listed == [values] else [value for value in listed if not isinstance(value, str)]
    if wrong:
        raise ValueError(f"{name} must be a list of item ids or titles, all strings; got {wrong[0]!r}.")
    return listed


class UserRankingPipeline(Pipeline):
    """A transformers pipeline over a UserRanker, for lists, datasets and generators of requests.

    `UserRankingPipeline(ranker)([{"user_id": ..., "history": [...], "candidates": [...]}, ...], batch_size=8)` gives
    what `UserRanker.rank` gives, a list for each request.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(self, ranker: UserRanker, **kwargs: Any):
        self.ranker = ranker
        tokenizer = copy.copy(ranker.tokenizer)
        tokenizer.padding_side = "left"  # the last position is read
        super().__init__(model=ranker.model, tokenizer=tokenizer, device=ranker.model.device, **kwargs)

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        if kwargs:
            raise ValueError(f"UserRankingPipeline has no parameters {sorted(kwargs)}.")
        return {}, {}, {}

    def preprocess(self, request: dict[str, Any]) -> dict[str, Any]:
        """Tokenises one request's prompt."""
        prompt = self.ranker.prompt(request["user_id"], request["history"], request["candidates"])
        encoded = self.tokenizer(prompt, return_tensors="pt", verbose=False)
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "candidates": request["candidates"],
        }

    def _forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {
            "scores": torch.from_numpy(self.ranker.letter_scores(batch["input_ids"], batch["attention_mask"])),
            "candidates": batch["candidates"],
        }

    def postprocess(self, outputs: dict[str, Any]) -> list[dict[str, Any]]:
        """One request's ranking, best first."""
        candidates = outputs["candidates"]
        return self.ranker.ranked(candidates, outputs["scores"][0, : len(candidates)].tolist())
