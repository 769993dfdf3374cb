"""Text encoders: texts and user-id strings -> vectors."""

import contextlib
import hashlib
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from ..files import hash_value, write_json
from ..sentence_encoder import load_sentence_encoder
from ..tables import UserTexts
from .arguments import POOLINGS, IndexArguments

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)
_ID_FEATURES = 4096
_CHARACTERS_PER_TOKEN = 32  # English has 4 to 5; no more of a text is tokenized than this, times what the model reads
_TOKENS_WITHOUT_MAXIMUM = 512  # counted for a model that names no maximum
_WINDOW_TOKENS = 2**22  # tokenized at once, padded to the model's maximum: about 100 MB
_CHECKED_TEXTS = 128
_LEAST_COSINE = 0.999


@cache
def _id_projection(dim: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((_ID_FEATURES, dim), dtype=np.float32)


class TextEncoder(ABC):
    """What turns texts into vectors.

    Attributes:
        name: the setting that it was made from.
        dim: length of a vector; known after `fit`.
        weights: a hash of what was learned; known after `fit`.
    """

    name: str
    dim: int
    weights: str

    def fit(self, texts: Sequence[str]) -> "TextEncoder":
        """Learns from texts of the train part; nothing by default."""
        return self

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, dim]."""

    def encode_user_ids(self, user_ids: Sequence[str]) -> np.ndarray:
        """float32 [users, dim]: `e_ou` of eq. (1)."""
        return self.encode(user_ids)

    def identity(self) -> dict[str, Any]:
        """All that decides the vectors, as JSON: encoders of equal identity give equal vectors."""
        return {"name": self.name, "dim": self.dim, "weights": self.weights}

    def save(self, folder: str | os.PathLike) -> None:
        """Writes what `load_encoder` reads."""
        write_json(Path(folder) / "encoder.json", self.identity())


class TfidfEncoder(TextEncoder):
    """TF-IDF over words and word pairs, reduced by a truncated SVD; the default, which needs no model at all.

    User-id strings share no words with reviews, so they are encoded by hashed character n-grams and a fixed random
    projection: zero vectors would leave the attention of eq. (1) nothing to learn from. A vector has `dim` numbers, or
    as many as the texts have different words; `seed` is that of the SVD.
    """

    name = "tfidf"

    def __init__(self, dim: int = 384, seed: int = 0):
        self.dim, self.seed = dim, seed

    def fit(self, texts: Sequence[str]) -> "TfidfEncoder":
        from sklearn.decomposition import TruncatedSVD

        for least in (2, 1) if len(texts) >= 100 else (1,):
            vectorizer = _tfidf(min_df=least)
            with contextlib.suppress(ValueError):  # no word is in so many texts
                weights = vectorizer.fit_transform(texts)
                break
        else:
            raise ValueError(
                f"encoder is tfidf, which finds no words in the {len(texts)} train texts: it splits them at spaces and "
                "leaves English stop words out. Name a sentence encoder, or other inputs."
            )
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
        return normalize(hashing.transform(user_ids) @ _id_projection(self.dim)).astype(np.float32)

    def save(self, folder: str | os.PathLike) -> None:
        super().save(folder)
        write_json(Path(folder) / "vocabulary.json", self._terms)
        save_file({"idf": self._idf, "components": self._components}, Path(folder) / "tfidf.safetensors")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "TfidfEncoder":
        """Reads what `save` wrote."""
        terms = json.loads((Path(folder) / "vocabulary.json").read_text(encoding="utf-8"))
        arrays = load_file(Path(folder) / "tfidf.safetensors")
        encoder = cls()
        encoder._set(terms, arrays["idf"], arrays["components"])
        return encoder

    @property
    def weights(self) -> str:
        return hash_value([self._terms, _hash_arrays({"idf": self._idf, "components": self._components})])

    def _set(self, terms: list[str], idf: np.ndarray, components: np.ndarray) -> None:
        self._terms, self._idf = terms, idf.astype(np.float32)
        self._components = np.ascontiguousarray(components, dtype=np.float32)
        self.dim = len(components)
        self._vectorizer = _tfidf(vocabulary=terms)
        self._vectorizer.idf_ = self._idf


class PretrainedEncoder(TextEncoder):
    """A sentence-transformers or BERT model, by hub id or folder, or the packaged model by its name.

    The vectors are those of `SentenceTransformer.encode`, made faster: texts are tokenized once, batches are filled by
    tokens, and `fit` turns to bfloat16 where that is safe (benchmarks/encoding_speed.py). The texts of its batch change
    a vector by less than 1e-5 in float32, by up to about 1e-3 in bfloat16. A text is read up to the model's maximum of
    tokens, and at most 32 characters for each of them. A text without tokens has zeros.

    Args:
        name: hub id, folder, or the packaged model's name.
        pooling: "cls", "mean" or "max" of the token embeddings, or "auto": what the model names, else the mean.
        precision: "float32" or "bfloat16", of the matrix products; see `fit`. A model stored in another precision than
            float32 keeps its own.
        batch_tokens: tokens of a batch, padding included; None: 2,048 on a CPU (fastest of 256 to 4,096), else 65,536.

    Raises:
        ValueError: the packaged model is not installed, the model cannot be loaded, or does not offer this pooling.
    """

    def __init__(self, name: str, pooling: str = "auto", precision: str = "float32", batch_tokens: int | None = None):
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; got {pooling!r}.")
        self.name, self.pooling = name, pooling
        self._model = load_sentence_encoder(name).eval()
        if pooling != "auto":
            _set_pooling(self._model, pooling, name)
        self.dim = self._model.get_embedding_dimension()
        dtype = next((str(weight.dtype).removeprefix("torch.") for weight in self._model.parameters()), "float32")
        self.precision = precision if dtype == "float32" else dtype
        tokens = self._model.max_seq_length
        # None, infinity or 1e30: the model names none
        self.max_tokens = _TOKENS_WITHOUT_MAXIMUM if tokens is None or tokens > 10**6 else int(tokens)
        self._batch_tokens = batch_tokens or (2048 if self._model.device.type == "cpu" else 65_536)

    def fit(self, texts: Sequence[str]) -> "PretrainedEncoder":
        """Turns to bfloat16 where the device is made for it and a sample of the texts keeps its embeddings.

        Up to 128 texts, evenly spaced, are encoded both ways; one whose cosine falls below 0.999 forbids it.
        """
        if self.precision != "float32" or not len(texts) or not _has_bfloat16(self._model.device):
            return self
        rows = np.linspace(0, len(texts) - 1, min(len(texts), _CHECKED_TEXTS)).astype(int)
        sample = [texts[row] for row in rows]
        exact = self.encode(sample)
        self.precision = "bfloat16"
        cosine = _cosines(exact, self.encode(sample)).min()
        if not cosine >= _LEAST_COSINE:  # a NaN as well
            self.precision = "float32"
        logger.info(
            "The encoder %s computes in %s: its embeddings of %d texts in bfloat16 have cosine %.6f or more to float32",
            self.name,
            self.precision,
            len(sample),
            cosine,
        )
        return self

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), self.dim), np.float32)
        window = max(1, _WINDOW_TOKENS // self.max_tokens)
        device, bfloat16 = self._model.device.type, self.precision == "bfloat16"
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            for begin in range(0, len(texts), window):
                cut = [text[: _CHARACTERS_PER_TOKEN * self.max_tokens] for text in texts[begin : begin + window]]
                self._encode_window(cut, vectors[begin : begin + window])
        return vectors

    def _encode_window(self, texts: list[str], vectors: np.ndarray) -> None:
        model = self._model
        prompt = model.prompts.get(model.default_prompt_name)  # what `SentenceTransformer.encode` puts before a text
        features = model.preprocess(texts, prompt=prompt)
        mask = features.get("attention_mask")
        if mask is None:  # static embeddings and their like, which pad nothing
            vectors[:] = model.encode(texts, show_progress_bar=False)
            return
        lengths = mask.sum(dim=1)
        order = lengths.argsort(descending=True, stable=True)
        begin = 0
        while begin < len(order) and (longest := int(lengths[order[begin]])):
            rows = order[begin : begin + max(1, self._batch_tokens // longest)]
            columns = mask[rows].any(dim=0)  # padding may stand on either side
            batch = {
                name: _rows_and_columns(value, rows, columns).to(model.device) if hasattr(value, "shape") else value
                for name, value in features.items()
            }
            vectors[rows.numpy()] = model(batch)["sentence_embedding"][:, : self.dim].float().cpu().numpy()
            begin += len(rows)

    @cached_property
    def weights(self) -> str:
        return _hash_arrays(self._model.state_dict())

    def identity(self) -> dict[str, Any]:
        settings = {"pooling": self.pooling, "precision": self.precision, "max_tokens": self.max_tokens}
        return {**super().identity(), **settings}


def make_encoder(name: str, dim: int = 384, seed: int = 0, pooling: str = "auto") -> TextEncoder:
    """The encoder that the setting `encoder` names; `dim` and `seed` serve "tfidf" only, `pooling` all others."""
    if name == TfidfEncoder.name:
        return TfidfEncoder(dim, seed)
    return PretrainedEncoder(os.path.abspath(name) if os.path.isdir(name) else name, pooling)  # found from anywhere


def fit_encoder(args: IndexArguments, texts: Mapping[str, UserTexts]) -> TextEncoder | None:
    """The encoder of these settings, fitted on the texts of all inputs; None without texts."""
    if not texts:
        return None
    encoder = make_encoder(args.encoder, args.embedding_dim, args.seed, args.pooling)
    return encoder.fit([text for part in texts.values() for text in part.texts])


def load_encoder(folder: str | os.PathLike) -> TextEncoder:
    """Reads an encoder that `TextEncoder.save` wrote.

    Raises:
        ValueError: there is none, or its model now gives vectors of another length or has other weights.
    """
    description = Path(folder) / "encoder.json"
    if not description.is_file():
        raise ValueError(f"{folder} holds no saved encoder: {description.name} is missing.")
    saved = json.loads(description.read_text(encoding="utf-8"))
    if saved["name"] == TfidfEncoder.name:
        encoder = TfidfEncoder.load(folder)
    else:
        encoder = PretrainedEncoder(saved["name"], saved["pooling"], saved["precision"])
    if encoder.dim != saved["dim"]:
        raise ValueError(
            f"The encoder {saved['name']!r} gives vectors of length {encoder.dim}, but {saved['dim']} were saved in "
            f"{folder}: name the model that the index was made with."
        )
    if encoder.weights != saved["weights"]:
        raise ValueError(
            f"The encoder {saved['name']!r} has other weights than those that {folder} was made with: bring them back, "
            "or make the index anew."
        )
    return encoder


def _tfidf(**settings):
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        ngram_range=(1, 2), stop_words="english", sublinear_tf=True, max_features=50_000, dtype=np.float32, **settings
    )


def _set_pooling(model: "SentenceTransformer", pooling: str, name: str) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    for place, module in enumerate(model):
        if isinstance(module, Pooling):
            model[place] = Pooling(module.embedding_dimension, pooling, module.include_prompt)
            return
    raise ValueError(f"pooling is {pooling}, but the encoder {name!r} does not pool token embeddings: set it to auto.")


def _has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; where it is emulated, float32 is faster."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _rows_and_columns(values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    values = values[rows]
    return values[:, columns] if values.shape[1:] == columns.shape else values


def _cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """float32 [texts]; two zero vectors have 1."""
    left, right = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (left, right))
    return 1 - np.square(left - right).sum(axis=1) / 2


def _hash_arrays(arrays: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, values in arrays.items():
        values = torch.as_tensor(values).cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)} ".encode())
        digest.update(values.view(-1).view(torch.uint8).numpy())  # numpy has no bfloat16
    return digest.hexdigest()
