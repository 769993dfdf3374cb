"""Title text: items whose titles resemble those of the history."""

import functools
from collections.abc import Sequence
from typing import Self

import numpy as np
from scipy import sparse

from ..sentence_encoder import load_sentence_encoder
from ..tables import Sequences
from .arguments import RetrieverArguments
from .neighbours import NeighbourConfig, NeighbourRetriever

_CELLS = 1 << 22  # similarities that are held at once: 16 MB


class TextConfig(NeighbourConfig):
    """The config of `TitleText`: the settings `text_...` of `RetrieverArguments`."""

    model_type = "text"

    encoder: str = "tfidf"
    neighbours: int = 200


class TitleText(NeighbourRetriever):
    """Neighbours are items with similar titles: W[i, j] is the cosine of their TF-IDF rows or embeddings.

    Only each item's most similar items are kept, so that memory and time at scoring do not grow with the square of the
    catalogue. Interactions are read only for the popularity that orders all other items.
    """

    config_class = TextConfig
    settings_prefix = "text_"

    @classmethod
    def fit_sequences(cls, sequences: Sequences, titles: Sequence[str], args: RetrieverArguments) -> Self:
        """See `Retriever.fit_sequences`.

        Raises:
            ValueError: another number of titles than items, or titles without words.
        """
        if len(titles) != sequences.num_items:
            raise ValueError(f"the catalogue has {sequences.num_items} items but {len(titles)} titles were given.")
        config = cls.make_config(sequences, args)
        weights = _most_similar(encode_titles(titles, config.encoder), config.neighbours)
        return cls.from_weights(config, weights, sequences.train_part().counts())


def encode_titles(titles: Sequence[str], encoder: str) -> np.ndarray | sparse.csr_array:
    """Unit vectors of the titles, float32 [titles, dim]: TF-IDF rows (sparse) or a sentence encoder's embeddings."""
    return _encode_titles(tuple(titles), encoder)


@functools.lru_cache(maxsize=1)  # the components of a hybrid need the same
def _encode_titles(titles: tuple[str, ...], encoder: str) -> np.ndarray | sparse.csr_array:
    if encoder != "tfidf":
        return load_sentence_encoder(encoder).encode(list(titles), normalize_embeddings=True, batch_size=128)
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, stop_words="english", dtype=np.float32)
        return vectorizer.fit_transform(titles)
    except ValueError as error:
        raise ValueError(f"the {len(titles)} titles hold no words to compare: {error}") from error


def title_embeddings(titles: Sequence[str], encoder: str, size: int) -> np.ndarray:
    """float32 [titles, at most size]: the principal directions of `encode_titles`, with mean square 1."""
    from sklearn.decomposition import TruncatedSVD

    vectors = encode_titles(titles, encoder)
    size = min(size, *vectors.shape)
    vectors = TruncatedSVD(size, random_state=0).fit_transform(vectors) if size > 1 else np.ones((len(titles), 1))
    return (vectors / np.sqrt(np.square(vectors).mean())).astype(np.float32)


def _most_similar(vectors: np.ndarray | sparse.csr_array, neighbours: int) -> sparse.csr_array:
    """float32 csr [items + 1, items + 1] of the highest positive similarities of each row, itself excluded."""
    items = vectors.shape[0]
    kept = min(neighbours, items - 1)
    rows = max(1, _CELLS // items)
    columns, values = [], []
    for start in range(0, items, rows):
        block = vectors[start : start + rows] @ vectors.T
        block = block.toarray() if sparse.issparse(block) else block
        place = np.arange(len(block))
        block[place, start + place] = 0
        best = np.argpartition(-block, kept - 1, axis=1)[:, :kept] if kept else np.empty((len(block), 0), np.int64)
        columns.append(best + 1)
        values.append(np.take_along_axis(block, best, 1))
    columns, values = np.concatenate(columns), np.concatenate(values)
    rows = np.broadcast_to(np.arange(1, items + 1)[:, None], columns.shape)
    found = values > 0
    return sparse.csr_array((values[found], (rows[found], columns[found])), shape=(items + 1, items + 1))
