"""Preferences as key phrases: the words and word pairs that distinguish a user's texts from all others."""

from collections.abc import Sequence
from typing import Self

import numpy as np

from .arguments import PreferenceArguments
from .base import NO_PREFERENCE, PreferenceExtractor


class KeyPhrases(PreferenceExtractor):
    """The words and word pairs of highest TF-IDF, best first, joined by commas; deterministic.

    Args:
        num_phrases: phrases in a preference at most.

    Raises:
        ValueError: `num_phrases` is below 1.
    """

    name = "key_phrases"

    def __init__(self, num_phrases: int = 6):
        self.num_phrases = PreferenceArguments(num_phrases=num_phrases).num_phrases  # checks it

    @classmethod
    def from_arguments(cls, args: PreferenceArguments) -> Self:
        return cls(args.num_phrases)

    def fit(self, texts: Sequence[str]) -> Self:
        """Counts in how many of the texts each phrase occurs.

        Raises:
            ValueError: the texts hold no words.
        """
        from sklearn.feature_extraction.text import CountVectorizer

        # In a corpus of some size a phrase must recur: one that occurs once is shared with no other user.
        self._vectorizer = CountVectorizer(
            ngram_range=(1, 2), stop_words="english", min_df=min(3, 1 + len(texts) // 100), dtype=np.float32
        )
        try:
            counts = self._vectorizer.fit_transform(texts)
        except ValueError as error:
            raise ValueError(f"The {len(texts)} train texts hold no words to take preferences from.") from error
        occurrences = np.bincount(counts.indices, minlength=counts.shape[1])
        self._idf = (np.log((1 + len(texts)) / (1 + occurrences)) + 1).astype(np.float32)
        self._phrases = self._vectorizer.get_feature_names_out().tolist()
        self._words = [frozenset(phrase.split()) for phrase in self._phrases]
        return super().fit(texts)

    def describe(self, texts_per_user: Sequence[Sequence[str]]) -> list[str]:
        from scipy.sparse import csr_matrix

        rows: dict[str, int] = {}  # a text that occurs for several users is counted once
        columns = [rows.setdefault(text, len(rows)) for texts in texts_per_user for text in texts]
        if not rows:
            return [NO_PREFERENCE] * len(texts_per_user)
        ends = np.concatenate([[0], np.cumsum([len(texts) for texts in texts_per_user])])
        ones = np.ones(len(columns), np.float32)
        chosen = csr_matrix((ones, columns, ends), shape=(len(texts_per_user), len(rows)))
        scores = (chosen @ self._vectorizer.transform(list(rows))).multiply(self._idf).tocsr()
        scores.sort_indices()
        return [
            self._best(scores.indices[begin:end], scores.data[begin:end])
            for begin, end in zip(scores.indptr, scores.indptr[1:], strict=False)
        ]

    def _best(self, phrases: np.ndarray, scores: np.ndarray) -> str:
        """The best phrases that add a word to those before them; equal scores in alphabetical order."""
        best, words = [], set()
        for phrase in phrases[np.argsort(-scores, kind="stable")].tolist():
            if not self._words[phrase] <= words:
                best.append(self._phrases[phrase])
                words |= self._words[phrase]
                if len(best) == self.num_phrases:
                    break
        return ", ".join(best) or NO_PREFERENCE
