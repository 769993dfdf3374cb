"""What extracts preferences: what every extractor shares, and the registry of them."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np
import pyarrow as pa

from ..protocol import target_positions
from ..tables import PREFERENCES, LeaveOneOut, UserTexts
from .arguments import EXTRACTORS as EXTRACTORS
from .arguments import PreferenceArguments, check_rows

logger = logging.getLogger(__name__)
NO_PREFERENCE = "(none)"
_BATCH = 16_384  # rows described at a time


class PreferenceExtractor(ABC):
    """Turns users' texts into preferences. A subclass has a `name` and `describe`; `fit` where it has to learn.

    Attributes:
        name: its name in `EXTRACTORS`.
        model: the model it asks, None without one.
        prompt_hash: hash of the prompt it asks with, None without one.
        fitted: whether `fit` has been called.
    """

    name: str
    model: str | None = None
    prompt_hash: str | None = None
    fitted: bool = False

    @classmethod
    def from_arguments(cls, args: PreferenceArguments) -> Self:
        """Makes the extractor with the stage's settings; by default it has none."""
        return cls()

    def fit(self, texts: Sequence[str]) -> Self:
        """Learns what there is to learn from the texts of the train part; a subclass ends by calling this one."""
        self.fitted = True
        return self

    @abstractmethod
    def describe(self, texts_per_user: Sequence[Sequence[str]]) -> list[str]:
        """One preference for each list of texts, `NO_PREFERENCE` where they say nothing."""

    def extract(self, data: LeaveOneOut, *, train_positions: int = 0, evidence: str = "train") -> pa.Table:
        """The preferences that prompts may show, a table of schema `PREFERENCES`; fits an extractor that is not fitted.

        `position` = length of the train part is for validation and test and is made from all of the train part; a
        training target, at an earlier position, is described by the interactions before it alone.

        Args:
            data: the users' texts: reviews, or titles where there are none.
            train_positions: for how many of a user's newest training targets there is a row; 0 = for all.
            evidence: "train", or "all": everything a user wrote, the test target included, at every position.

        Raises:
            ValueError: a setting has a value that cannot be used.
        """
        batches = self.batches(data, train_positions=train_positions, evidence=evidence)
        return pa.Table.from_batches(batches, PREFERENCES)

    def batches(
        self, data: LeaveOneOut, *, train_positions: int = 0, evidence: str = "train"
    ) -> Iterator[pa.RecordBatch]:
        """The rows of `extract` in batches, so that memory need not hold them all."""
        check_rows(train_positions, evidence)
        train = data.texts()
        if not self.fitted:
            self.fit([train.texts[text] for text in train.text_ids if text >= 0])
        shown = train if evidence == "train" else data.texts(train.kind, train_only=False)
        users, positions = _rows(data.sequences.lengths, train_positions)
        empty = 0
        for begin in range(0, len(users), _BATCH):
            part = slice(begin, begin + _BATCH)
            preferences = self._describe_rows(shown, users[part], positions[part], evidence)
            empty += preferences.count(NO_PREFERENCE)
            count = len(preferences)
            columns = {
                "user": users[part],
                "user_id": [train.user_ids[user] for user in users[part]],
                "position": positions[part],
                "preference": preferences,
                "evidence": [evidence] * count,
                "extractor": [self.name] * count,
                "model": [self.model] * count,
                "prompt_hash": [self.prompt_hash] * count,
            }
            yield pa.RecordBatch.from_pydict(columns, PREFERENCES)
        if empty:
            logger.warning(
                "%d preferences are %s: their users have no words before that position", empty, NO_PREFERENCE
            )

    def _describe_rows(self, shown: UserTexts, users: np.ndarray, positions: np.ndarray, evidence: str) -> list[str]:
        if evidence == "train":
            rows = zip(users, positions, strict=True)
            return self.describe([[shown.texts[text] for text in shown.of_user(*row)] for row in rows])
        asked, rows = np.unique(users, return_inverse=True)  # one text for all positions of a user
        preferences = self.describe([[shown.texts[text] for text in shown.of_user(user)] for user in asked])
        return [preferences[row] for row in rows]


def _rows(lengths: np.ndarray, train_positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Users and positions, int64 [rows] each: of every user the training targets, then the end of the train part."""
    rows = [target_positions(lengths, "train", train_positions), target_positions(lengths, "validation")]
    users, positions = (np.concatenate(column) for column in zip(*rows, strict=True))
    order = np.lexsort((positions, users))
    return users[order], positions[order]
