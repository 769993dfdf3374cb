"""Measures of a user index: lift of its prefixes, agreement of ratings, words.

The lift of a prefix length n is P(two users share a thing | same first n codes) / P(any two users share one). What they
share may be train items, held-out items, which no index has seen, or words. A random index has a lift of 1. The term is
that of association rules: Brin et al. 1997, "Dynamic itemset counting and implication rules for market basket data".
"""

from typing import Any

import numpy as np
from scipy import sparse

from ..tables import UserTexts

TOP_WORDS = 5  # of a user, or of a prefix
_BLOCK = 2**24  # how many pairs are held at once
_MIN_GROUPS = 10  # fewer prefixes make no interval


def share_rate(things: sparse.csr_matrix, *, max_users: int = 200_000, seed: int = 0) -> float:
    """P(two users share at least one thing), exact over all pairs.

    Args:
        things: sparse [users, things]; what is stored and not 0 counts.
        max_users, seed: with more users than this, the pairs are those among so many users drawn at random.

    Returns:
        A probability; 0 with fewer than two users.
    """
    things = _binary(things)
    if things.shape[0] > max_users:
        drawn = np.random.default_rng(seed).choice(things.shape[0], max_users, replace=False)
        things = things[np.sort(drawn)]
    users = things.shape[0]
    return float(_partners(things).sum() / max(1, users * (users - 1)))


def lift(
    codes: np.ndarray,
    things: sparse.csr_matrix,
    *,
    base_rate: float | None = None,
    max_users: int = 200_000,
    seed: int = 0,
) -> dict[str, list]:
    """How much more often two users share a thing if they share a prefix of their codes; exact over all pairs.

    Args:
        codes: integers of 0 or more, [users, levels].
        things: sparse [users, things], such as items or words; what is stored and not 0 counts.
        base_rate: `share_rate` of `things`, where it is known already.
        max_users, seed: see `share_rate`; the pairs under a prefix are always all counted.

    Returns:
        One value for each prefix length 1..levels: `lift`, None where no two users share a prefix, or no two of all
        share a thing; `interval`, its [low, high] of 95 %, by bootstrap over the prefixes with a fixed base rate, None
        for fewer than 10 prefixes of two users or where no pair shares a thing; `pairs`, how many pairs of users share
        a prefix; `shared`, how many of these share a thing.

    Raises:
        ValueError: codes are not such integers, or not of the users of `things`.
    """
    things = _binary(things)
    if len(codes) != things.shape[0]:
        raise ValueError(f"codes has {len(codes)} users but things has {things.shape[0]}: they must be the same.")
    if base_rate is None:
        base_rate = share_rate(things, max_users=max_users, seed=seed)
    result = {"lift": [], "interval": [], "pairs": [], "shared": []}
    for groups in prefix_groups(codes):
        sizes = np.bincount(groups)
        pairs = sizes * (sizes - 1) // 2
        # A thing of one prefix is another thing than that of the next: then only users of one prefix can share it.
        partners = _partners(_binary(_columns_by_group(groups, things)))
        shared = np.bincount(groups, partners, minlength=len(sizes)) / 2
        rate = shared.sum() / max(1, pairs.sum())
        known = pairs.sum() > 0 and base_rate > 0
        interval = _bootstrap_rate(shared[pairs > 0], pairs[pairs > 0], seed) if known else None
        result["lift"].append(float(rate / base_rate) if known else None)
        result["interval"].append(None if interval is None else [float(bound / base_rate) for bound in interval])
        result["pairs"].append(int(pairs.sum()))
        result["shared"].append(int(shared.sum()))
    return result


def neighbour_lift(
    vectors: np.ndarray,
    things: sparse.csr_matrix,
    k: int,
    *,
    base_rate: float | None = None,
    max_users: int = 200_000,
    seed: int = 0,
) -> dict[str, Any]:
    """The lift of the pairs (user, each of its k nearest users by cosine): what an index is compared with.

    The search is exact. A user whose vector is zero has no neighbours and is not a neighbour.

    Args:
        vectors: float [users, dim].
        things: sparse [users, things]; see `lift`.
        k: how many neighbours; all other users where there are fewer.
        base_rate, max_users, seed: see `lift`.

    Returns:
        `lift`, `pairs`, `shared` as `lift` has them, one value each; a pair of mutual neighbours counts twice.

    Raises:
        ValueError: k is below 1, or the vectors are not [users, dim] for the users of `things`.
    """
    vectors, things = np.asarray(vectors, np.float32), _binary(things)
    if k < 1 or vectors.ndim != 2 or len(vectors) != things.shape[0]:
        raise ValueError(
            f"vectors must be [users, dim] for the {things.shape[0]} users of things, and k at least 1; "
            f"got shape {vectors.shape} and k={k}."
        )
    if base_rate is None:
        base_rate = share_rate(things, max_users=max_users, seed=seed)
    norms = np.linalg.norm(vectors, axis=1)
    somewhere = np.flatnonzero(norms > 0)
    directions, things = vectors[somewhere] / norms[somewhere, None], things[somewhere]
    users = len(directions)
    k = max(0, min(k, users - 1))
    shared, step = 0, max(1, _BLOCK // max(1, users))
    for begin in range(0, users if k else 0, step):
        similarity = directions[begin : begin + step] @ directions.T
        rows = np.arange(len(similarity))
        similarity[rows, begin + rows] = -np.inf
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        both = things[np.repeat(begin + rows, k)].multiply(things[nearest.ravel()])
        shared += np.count_nonzero(both.sum(axis=1))
    pairs = users * k
    known = pairs > 0 and base_rate > 0
    return {"lift": float(shared / pairs / base_rate) if known else None, "pairs": pairs, "shared": int(shared)}


def rating_agreement(codes: np.ndarray, users: np.ndarray, items: np.ndarray, ratings: np.ndarray) -> dict[str, list]:
    """How far apart two users of one prefix rate an item that both rated, over how far apart any two users do.

    Exact over all triples of two users and an item. If a user rated an item twice, the later rating counts.

    Args:
        codes: integers of 0 or more, [users, levels].
        users, items, ratings: one value a rating, oldest first within a user; a rating of NaN is left out.

    Returns:
        By prefix length: `ratio` of the mean absolute differences, None where unknown; `pairs`, how many triples.
    """
    known = ~np.isnan(ratings)
    users, items = (ids[known][::-1].astype(np.int64) for ids in (users, items))
    ratings = ratings[known][::-1]
    width = int(items.max(initial=0)) + 1
    first = np.unique(users * width + items, return_index=True)[1]
    users, items, ratings = users[first], items[first], ratings[first].astype(np.float64)
    total, count = _absolute_differences(items, ratings)
    result = {"ratio": [], "pairs": []}
    for groups in prefix_groups(codes):
        under, pairs = _absolute_differences(groups[users] * width + items, ratings)
        result["ratio"].append((under / pairs) / (total / count) if pairs and total else None)
        result["pairs"].append(pairs)
    return result


def word_weights(users: UserTexts) -> tuple[sparse.csr_matrix, list[str]]:
    """TF-IDF of the words of all texts of each user: float64 [users, words], and the words.

    From 100 users on, a word counts if at least five users have it: of what few say, nothing can be shared.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(
        stop_words="english",
        token_pattern=r"(?u)\b[^\W\d]\w+\b",  # words, not numbers
        sublinear_tf=True,
        max_features=50_000,
        min_df=5 if len(users) >= 100 else 1,
    )
    documents = (" ".join(users.texts[text] for text in users.of_user(user)) for user in range(len(users)))
    try:
        weights = vectorizer.fit_transform(documents)
    except ValueError:  # sklearn's answer to texts without a single word
        return sparse.csr_matrix((len(users), 0)), []
    return weights, vectorizer.get_feature_names_out().tolist()


def top_words(weights: sparse.csr_matrix) -> sparse.csr_matrix:
    """The five highest values of each row, ties by column."""
    rows = np.repeat(np.arange(weights.shape[0]), np.diff(weights.indptr))
    order = np.lexsort((weights.indices, -weights.data, rows))
    best = order[np.arange(len(order)) - weights.indptr[rows] < TOP_WORDS]
    return sparse.csr_matrix((weights.data[best], (rows[best], weights.indices[best])), shape=weights.shape)


def _binary(things: sparse.csr_matrix) -> sparse.csr_matrix:
    things = sparse.csr_matrix(things).astype(bool)
    things.sum_duplicates()
    things.eliminate_zeros()
    return things


def _partners(things: sparse.csr_matrix) -> np.ndarray:
    """With how many other users each user shares a thing: int64 [users], from a matrix that `_binary` made."""
    frequency = things.getnnz(axis=0)
    things = things[:, frequency > 1]
    transposed = things.T.tocsr()
    partners = np.zeros(things.shape[0], np.int64)
    # A row of things @ transposed has no more values than the things of its user have users.
    work = np.cumsum(things @ frequency[frequency > 1].astype(np.int64))
    ends = np.append(np.flatnonzero(np.diff(work // _BLOCK)) + 1, len(work))
    begin = 0
    for end in ends:
        partners[begin:end] = (things[begin:end] @ transposed).getnnz(axis=1)
        begin = end
    return partners - (things.getnnz(axis=1) > 0)


def prefix_groups(codes: np.ndarray) -> list[np.ndarray]:
    """For each prefix length the number of each user's prefix: int64 [users], dense from 0."""
    codes = np.asarray(codes)
    if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer) or codes.min(initial=0) < 0:
        raise ValueError(
            f"codes must be integers of 0 or more of shape [users, levels]; got {codes.dtype} of shape "
            f"{list(codes.shape)}."
        )
    groups, found = np.zeros(len(codes), np.int64), []
    for level in codes.T.astype(np.int64):  # numbered afresh at each level, so that no number of levels is too large
        groups = np.unique(groups * (level.max(initial=0) + 1) + level, return_inverse=True)[1]
        found.append(groups)
    return found


def _columns_by_group(groups: np.ndarray, things: sparse.csr_matrix) -> sparse.csr_matrix:
    rows, width = np.repeat(np.arange(len(groups)), np.diff(things.indptr)), things.shape[1]
    columns = np.unique(groups[rows] * width + things.indices, return_inverse=True)[1]
    return incidence(rows, columns, (len(groups), int(columns.max(initial=0)) + 1))


def incidence(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sparse.csr_matrix:
    """Sparse bool of this shape, true at the given rows and columns."""
    return sparse.csr_matrix((np.ones(len(rows), bool), (rows, columns)), shape=shape)


def _bootstrap_rate(shared: np.ndarray, pairs: np.ndarray, seed: int, samples: int = 2000) -> np.ndarray | None:
    """The 95 % interval of sum(shared) / sum(pairs), the prefixes drawn with replacement."""
    if len(pairs) < _MIN_GROUPS or not shared.any():
        return None
    # How often each distinct row is drawn is multinomial, and the rows of small prefixes are few.
    rows, counts = np.unique(np.stack([shared, pairs], axis=1), axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(pairs), counts / len(pairs), size=samples) @ rows
    return np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])


def _absolute_differences(keys: np.ndarray, values: np.ndarray) -> tuple[float, int]:
    """The sum of |a - b| over all pairs of values with one key, and how many pairs there are."""
    order = np.lexsort((values, keys))
    _, first, counts = np.unique(keys[order], return_index=True, return_counts=True)
    place = np.arange(len(order)) - np.repeat(first, counts)
    # The value at place i of n is added in its i pairs with smaller ones, and subtracted in the others.
    total = (values[order] * (2 * place + 1 - np.repeat(counts, counts))).sum()
    return float(total), int((counts * (counts - 1) // 2).sum())
