"""Text encoders: texts and user-id strings -> vectors."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..files import write_json
from ..texts import load_sentence_encoder

_ID_FEATURES = 4096


class TextEncoder:
    """What turns texts into vectors.

    Attributes:
        name: the setting that it was made from.
        dim: length of a vector; known after `fit`.
    """

    name: str
    dim: int

    def fit(self, texts: Sequence[str]) -> "TextEncoder":
        """Learns from texts of the train part whatever the encoder has to learn; nothing by default."""
        return self

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, dim]."""
        raise NotImplementedError

    def encode_user_ids(self, user_ids: Sequence[str]) -> np.ndarray:
        """float32 [users, dim]: `e_ou` of eq. (1)."""
        return self.encode(user_ids)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes what `load_encoder` reads."""
        write_json(Path(folder) / "encoder.json", {"name": self.name, "dim": self.dim})


class TfidfEncoder(TextEncoder):
    """TF-IDF over words and word pairs, reduced by a truncated SVD; the default, which needs no model at all.

    User-id strings share no words with reviews, so they are encoded by hashed character n-grams and a fixed random
    projection: zero vectors would leave the attention of eq. (1) nothing to learn from.

    Args:
        dim: length of a vector; fewer where the texts have fewer different words.
        seed: of the SVD.
    """

    name = "tfidf"

    def __init__(self, dim: int = 384, seed: int = 0):
        self.dim, self.seed = dim, seed

    def fit(self, texts: Sequence[str]) -> "TfidfEncoder":
        from sklearn.decomposition import TruncatedSVD

        vectorizer = _tfidf(min_df=2 if len(texts) >= 100 else 1)
        try:
            weights = vectorizer.fit_transform(texts)
        except ValueError as error:
            raise ValueError(f"The {len(texts)} train texts hold no words to learn an encoder from.") from error
        components = np.eye(1)
        if weights.shape[1] > 1:  # the SVD refuses a single word
            components = TruncatedSVD(min(self.dim, *weights.shape), random_state=self.seed).fit(weights).components_
        self._set(vectorizer.get_feature_names_out().tolist(), vectorizer.idf_, components)
        return self

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        from sklearn.preprocessing import normalize

        if not texts:
            return np.zeros((0, self.dim), np.float32)
        return normalize(self._vectorizer.transform(texts) @ self._components.T).astype(np.float32)

    def encode_user_ids(self, user_ids: Sequence[str]) -> np.ndarray:
        from sklearn.feature_extraction.text import HashingVectorizer
        from sklearn.preprocessing import normalize

        hashing = HashingVectorizer(analyzer="char_wb", ngram_range=(2, 4), n_features=_ID_FEATURES, dtype=np.float32)
        projection = np.random.default_rng(0).standard_normal((_ID_FEATURES, self.dim), dtype=np.float32)
        return normalize(hashing.transform(user_ids) @ projection).astype(np.float32)

    def save(self, folder: str | os.PathLike) -> None:
        from safetensors.numpy import save_file

        super().save(folder)
        write_json(Path(folder) / "vocabulary.json", self._terms)
        save_file({"idf": self._idf, "components": self._components}, Path(folder) / "tfidf.safetensors")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "TfidfEncoder":
        """Reads what `save` wrote."""
        from safetensors.numpy import load_file

        terms = json.loads((Path(folder) / "vocabulary.json").read_text(encoding="utf-8"))
        arrays = load_file(Path(folder) / "tfidf.safetensors")
        encoder = cls()
        encoder._set(terms, arrays["idf"], arrays["components"])
        return encoder

    def _set(self, terms: list[str], idf: np.ndarray, components: np.ndarray) -> None:
        self._terms, self._idf = terms, idf.astype(np.float32)
        self._components = np.ascontiguousarray(components, dtype=np.float32)
        self.dim = len(components)
        self._vectorizer = _tfidf(vocabulary=terms)
        self._vectorizer.idf_ = self._idf


class PretrainedEncoder(TextEncoder):
    """A sentence-transformers or BERT model, by hub id or folder, or the packaged model by its name.

    Raises:
        ValueError: the packaged model is not installed, or the model cannot be loaded.
    """

    def __init__(self, name: str, batch_size: int = 64):
        self.name, self.batch_size = name, batch_size
        self._model = load_sentence_encoder(name)
        self.dim = self._model.get_embedding_dimension()

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        if not len(texts):
            return np.zeros((0, self.dim), np.float32)
        vectors = self._model.encode(list(texts), batch_size=self.batch_size, show_progress_bar=len(texts) > 1000)
        return np.asarray(vectors, np.float32)


def make_encoder(name: str, dim: int = 384, seed: int = 0) -> TextEncoder:
    """The encoder that the setting `encoder` names; `dim` and `seed` serve "tfidf" only."""
    return TfidfEncoder(dim, seed) if name == TfidfEncoder.name else PretrainedEncoder(name)


def load_encoder(folder: str | os.PathLike) -> TextEncoder:
    """Reads an encoder that `TextEncoder.save` wrote.

    Raises:
        ValueError: there is none, or its model now gives vectors of another length.
    """
    description = Path(folder) / "encoder.json"
    if not description.is_file():
        raise ValueError(f"{folder} holds no saved encoder: {description.name} is missing.")
    saved = json.loads(description.read_text(encoding="utf-8"))
    encoder = TfidfEncoder.load(folder) if saved["name"] == TfidfEncoder.name else PretrainedEncoder(saved["name"])
    if encoder.dim != saved["dim"]:
        raise ValueError(
            f"The encoder {saved['name']!r} gives vectors of length {encoder.dim}, but {saved['dim']} were saved in "
            f"{folder}: name the model that the index was made with."
        )
    return encoder


def _tfidf(**settings):
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        ngram_range=(1, 2), stop_words="english", sublinear_tf=True, max_features=50_000, dtype=np.float32, **settings
    )
