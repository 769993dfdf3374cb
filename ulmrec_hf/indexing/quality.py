"""How much a user index tells: lift of its prefixes, agreement of ratings, words, cases; as JSON, Markdown and plots.

The lift of a prefix length n is P(two users share a thing | same first n codes) / P(any two users share one). What they
share may be train items, held-out items, which no index has seen, or words. A random index has a lift of 1. The term is
that of association rules: Brin et al. 1997, "Dynamic itemset counting and implication rules for market basket data".
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy import sparse

from ..files import atomic_path, write_json, write_text
from ..protocol import HELD_OUT
from ..tables import UserTexts
from ..user_index import UserIndex, spell_codes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOTS = {
    "lift.png": "Lift by prefix length",
    "code_frequency.png": "Users of each code",
    "prefix_sizes.png": "Users of each prefix",
    "user_map.png": "Users by their latent vectors, coloured by their first code",
    "reconstruction_error.png": "Reconstruction error",
}
_WORDS = 5  # of a user, or of a prefix
_NEAREST = 5
_MAP_USERS = 20_000
_BLOCK = 2**24  # how many pairs are held at once
_MIN_GROUPS = 10  # fewer prefixes make no interval
_BLUE, _ORANGE, _GREY = "#3b6ea8", "#d9822b", "#9aa5b1"


def share_rate(things: sparse.csr_matrix, *, max_users: int = 200_000, seed: int = 0) -> float:
    """P(two users share at least one thing), exact over all pairs.

    Args:
        things: sparse [users, things]; what is stored and not 0 counts.
        max_users: with more users than this, the pairs are those among so many users drawn at random.
        seed: of that draw.

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
        codes: integers of 0 or more, [users, levels]. A grouping of users is the codes [users, 1].
        things: sparse [users, things], such as items or words; what is stored and not 0 counts.
        base_rate: `share_rate` of `things`, where it is known already.
        max_users, seed: see `share_rate`; the pairs under a prefix are always all counted.

    Returns:
        One value for each prefix length 1..levels: `lift`, None where no two users share a prefix, or no two users of
        all share a thing; `interval`, its [low, high] of 95 %, by bootstrap over the prefixes and with the base rate as
        given, None for fewer than 10 prefixes of two users or where no pair shares a thing; `pairs`, how many pairs of
        users share a prefix; `shared`, how many of these share a thing.

    Raises:
        ValueError: codes are not such integers, or not of the users of `things`.
    """
    things = _binary(things)
    if len(codes) != things.shape[0]:
        raise ValueError(f"codes has {len(codes)} users but things has {things.shape[0]}: they must be the same.")
    if base_rate is None:
        base_rate = share_rate(things, max_users=max_users, seed=seed)
    result = {"lift": [], "interval": [], "pairs": [], "shared": []}
    for groups in _prefix_groups(codes):
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

    The search is exact. A user whose vector is zero has no neighbours and is nobody's.

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
        One value for each prefix length 1..levels: `ratio`, the mean absolute difference under one prefix divided by
        that of any two users, so that below 1 is agreement and None is unknown; `pairs`, how many triples it is from.
    """
    known = ~np.isnan(ratings)
    users, items, ratings = (
        users[known][::-1].astype(np.int64),
        items[known][::-1].astype(np.int64),
        ratings[known][::-1],
    )
    width = int(items.max(initial=0)) + 1
    first = np.unique(users * width + items, return_index=True)[1]
    users, items, ratings = users[first], items[first], ratings[first].astype(np.float64)
    total, count = _absolute_differences(items, ratings)
    result = {"ratio": [], "pairs": []}
    for groups in _prefix_groups(codes):
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


def index_quality(
    index: UserIndex,
    users: UserTexts,
    latents: np.ndarray,
    data_folder: str | os.PathLike,
    *,
    collisions_before: int,
    collisions_after: int,
    reconstruction_error: Sequence[float],
    extra: Mapping[str, Any] | None = None,
    cases: int = 5,
    max_users: int = 200_000,
    seed: int = 0,
) -> dict[str, Any]:
    """The quality of a user index; JSON-able.

    Held-out items, the last two of each user, are read for `lift_heldout` and go nowhere else.

    Args:
        index: of all users of the data stage, in its order.
        users: the train texts that the index was made from.
        latents: float [users, code_dim].
        data_folder: the data stage; its sequences.parquet is read.
        collisions_before, collisions_after: users who share their codes before and after the assignment.
        reconstruction_error: one value a level.
        extra: what else shall stand in the report.
        cases: how many users are told of one by one.
        max_users, seed: see `share_rate`; the seed is the bootstrap's as well.

    Returns:
        What `UserIndex.report` returns, the arguments that are figures, `extra`; `lift_users`, how many users the base
        rate of the lifts is from; `cases`; and lists by prefix length: `lift_train`, `lift_heldout` with
        `lift_heldout_interval`, `lift_words` (the five words of a user with the highest TF-IDF), `pairs_heldout` (all
        pairs of users under one prefix, the same for every lift), `shared_train`, `shared_heldout`, `shared_words` (how
        many of these share an item or a word), `rating_agreement`, `rated_pairs`. See `lift` and `rating_agreement`.

    Raises:
        ValueError: sequences.parquet is missing, or its users, those of the index, of the texts and of the latents are
            not the same.
    """
    path = Path(data_folder) / "sequences.parquet"
    if not path.is_file():
        raise ValueError(f"{path} is missing: run recipes/prepare_data.py first.")
    table = pq.read_table(path)
    if not index.user_ids == users.user_ids == table["user_id"].to_pylist() or len(latents) != len(index):
        raise ValueError(
            f"The users of the index ({len(index)}), of the texts ({len(users)}), of the latents ({len(latents)}) and "
            f"of {path} ({len(table)}) must be the same, in the same order."
        )
    rows, items, ratings, held_out = _interactions(table)
    shape = (len(index), int(items.max(initial=0)) + 1)
    weights, words = word_weights(users)
    top = _top_words(weights)
    things = {
        "train": _incidence(rows[~held_out], items[~held_out], shape),
        "heldout": _incidence(rows[held_out], items[held_out], shape),
        "words": top,
    }
    lifts = {name: lift(index.codes, shared, max_users=max_users, seed=seed) for name, shared in things.items()}
    agreement = rating_agreement(index.codes, rows[~held_out], items[~held_out], ratings[~held_out])
    return {
        **index.report(),
        "collisions_before": int(collisions_before),
        "collisions_after": int(collisions_after),
        "reconstruction_error": [float(error) for error in reconstruction_error],
        **(extra or {}),
        "lift_users": min(len(index), max_users),
        "pairs_heldout": lifts["heldout"]["pairs"],
        **{f"lift_{name}": _rounded(values["lift"]) for name, values in lifts.items()},
        **{f"shared_{name}": values["shared"] for name, values in lifts.items()},
        "lift_heldout_interval": [bounds and _rounded(bounds) for bounds in lifts["heldout"]["interval"]],
        "rating_agreement": _rounded(agreement["ratio"]),
        "rated_pairs": agreement["pairs"],
        "cases": _cases(index, np.asarray(latents), weights, top, words, cases),
    }


def write_quality_report(
    folder: str | os.PathLike, quality: Mapping[str, Any], index: UserIndex, latents: np.ndarray
) -> None:
    """Writes report.json, report.md and the `PLOTS` into `folder`; equal input gives equal bytes.

    Args:
        folder: made where it is missing; each file is replaced atomically.
        quality: what `index_quality` returned for this index.
        index: the user index.
        latents: float [users, code_dim].
    """
    folder = Path(folder)
    write_json(folder / "report.json", quality)
    plot_lift(folder / "lift.png", quality)
    plot_code_frequency(folder / "code_frequency.png", index)
    plot_prefix_sizes(folder / "prefix_sizes.png", index)
    plot_user_map(folder / "user_map.png", index, latents)
    plot_reconstruction_error(folder / "reconstruction_error.png", quality["reconstruction_error"])
    write_text(folder / "report.md", quality_markdown(quality))


def quality_markdown(quality: Mapping[str, Any]) -> str:
    """report.md: tables of the levels, of the prefix lengths and of the cases, and the plots."""
    levels = range(len(quality["codes_used"]))
    facts = [
        f"- {name.replace('_', ' ')}: {value}"
        for name, value in quality.items()
        if name not in ("users", "lift_users") and not isinstance(value, (list, dict))
    ]
    alone = [f"{users:,} of length {length}" for length, users in enumerate(quality["users_alone"], 1)]
    parts = ["# User index", f"{quality['users']:,} users.", "\n".join(facts), "## Levels"]
    table = [["Level", "Codes used", "Perplexity", "Reconstruction error"]]
    names = ("codes_used", "perplexity", "reconstruction_error")
    table += [[str(level + 1), *(f"{quality[name][level]:,}" for name in names)] for level in levels]
    alone = f"Users alone under their prefix: {', '.join(alone)}."
    parts += [_markdown_table(table), f"{alone} The error is that of the nearest codes, before collisions are settled."]

    parts.append("## Prefixes")
    table = [["Prefix length", "Pairs of users", "Train items", "Held-out items", "95 %", "Words", "Ratings"]]
    for level in levels:
        interval = quality["lift_heldout_interval"][level]
        train, held_out, words = (
            f"{_number(quality[f'lift_{name}'][level])} ({quality[f'shared_{name}'][level]:,})"
            for name in ("train", "heldout", "words")
        )
        bounds = "n/a" if interval is None else f"{_number(interval[0])} to {_number(interval[1])}"
        ratings = f"{_number(quality['rating_agreement'][level])} ({quality['rated_pairs'][level]:,})"
        pairs = f"{quality['pairs_heldout'][level]:,}"
        table.append([str(level + 1), pairs, train, held_out, bounds, words, ratings])
    parts.append(_markdown_table(table))
    base = "all users" if quality["lift_users"] == quality["users"] else f"{quality['lift_users']:,} random users"
    parts.append(
        "Train items, held-out items, words: the lift, how much more often two users share one if they share the prefix"
        " than any two users do; 1 is a random index. In parentheses: how many pairs under a prefix share one. The "
        f"base rates are over all pairs of {base}. Held-out items, the last two of each user, were not seen by the "
        "index; their 95 % interval is a bootstrap over prefixes. Words are the five of each user's train texts with "
        "the highest TF-IDF. Ratings: the mean absolute difference of two users' ratings of an item, over that of any "
        "two users, so that below 1 is agreement; in parentheses, of how many pairs of ratings."
    )
    parts += ["\n\n".join(f"![{title}]({name})" for name, title in PLOTS.items()), "## Cases"]
    for case in quality["cases"]:
        parts.append(f"### {_code(case['user_id'])} is {_code(case['index'])}")
        parts.append(f"Own words: {', '.join(case['words']) or 'none'}.")
        table = [["Prefix", "Users", "Words more frequent than with all users"]]
        table += [
            [_code(prefix["prefix"]), f"{prefix['users']:,}", ", ".join(prefix["words"])] for prefix in case["prefixes"]
        ]
        parts.append(_markdown_table(table))
        table = [["Nearest users", "Index", "Codes shared", "Latent distance", "Words"]]
        table += [
            [
                _code(user["user_id"]),
                _code(user["index"]),
                str(user["codes_shared"]),
                _number(user["distance"]),
                ", ".join(user["words"]),
            ]
            for user in case["nearest"]
        ]
        parts.append(_markdown_table(table))
    return "\n\n".join(part for part in parts if part) + "\n"


def plot_lift(path: str | os.PathLike, quality: Mapping[str, Any]) -> None:
    """Lift by prefix length on a log axis: train items, held-out items with their interval, and 1."""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for name, label, color in (("train", "train items", _GREY), ("heldout", "held-out items", _BLUE)):
            lifts = quality[f"lift_{name}"]
            lengths = [length for length, value in enumerate(lifts, 1) if value]  # neither None nor 0 has a place here
            axes.plot(lengths, [lifts[length - 1] for length in lengths], color=color, marker="o", ms=5, label=label)
        for length, interval in enumerate(quality["lift_heldout_interval"], 1):
            if interval and interval[0] > 0:
                axes.vlines(length, *interval, color=_BLUE, lw=1.2)
        axes.axhline(1, color=_ORANGE, lw=1.4, ls="--", label="random index")
        axes.set_yscale("log")
        axes.set_xticks(range(1, len(quality["lift_train"]) + 1))
        axes.set_xlabel("prefix length")
        axes.set_ylabel("lift")
        axes.legend(frameon=False)
        _plain_axes(axes)

    _save_figure(path, draw)


def plot_code_frequency(path: str | os.PathLike, index: UserIndex) -> None:
    """How many users each code of a level has, most used first, beside an even use."""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for level, codes in enumerate(index.codes.T, 1):
            use = np.sort(np.bincount(codes, minlength=index.codebook_size))[::-1]
            axes.plot(np.arange(1, len(use) + 1), use, lw=1.6, label=f"level {level}")
        axes.axhline(len(index) / index.codebook_size, color="black", lw=1.2, ls="--", label="even use")
        axes.set_xlabel("code, most used first")
        axes.set_ylabel("users")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        _plain_axes(axes)

    _save_figure(path, draw)


def plot_prefix_sizes(path: str | os.PathLike, index: UserIndex) -> None:
    """How many users each prefix has, largest first, a line for each prefix length; both axes are logarithmic."""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for length, groups in enumerate(_prefix_groups(index.codes), 1):
            sizes = np.sort(np.bincount(groups))[::-1]
            axes.plot(np.arange(1, len(sizes) + 1), sizes, lw=1.6, label=f"length {length}: {len(sizes):,} prefixes")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("prefix, largest first")
        axes.set_ylabel("users")
        axes.legend(frameon=False)
        _plain_axes(axes)

    _save_figure(path, draw)


def plot_user_map(path: str | os.PathLike, index: UserIndex, latents: np.ndarray) -> None:
    """The first two principal components of at most 20,000 users' latents; colours repeat after 20 codes."""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        shown = _evenly(len(index), _MAP_USERS)
        centred = latents[shown].astype(np.float64)
        centred -= centred.mean(axis=0)
        components = np.linalg.eigh(centred.T @ centred)[1][:, :-3:-1]  # eigh sorts them ascending
        points = np.zeros((len(shown), 2))
        points[:, : components.shape[1]] = centred @ components  # a latent of length 1 has one component
        axes.scatter(*points.T, c=index.codes[shown, 0] % 20, cmap="tab20", vmin=0, vmax=19, s=4, linewidths=0)
        axes.set_xlabel("first principal component")
        axes.set_ylabel("second principal component")
        axes.set_title(f"{len(shown):,} users, coloured by their first code", fontsize=11)
        _plain_axes(axes)

    _save_figure(path, draw)


def plot_reconstruction_error(path: str | os.PathLike, errors: Sequence[float]) -> None:
    """The reconstruction error after each level."""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        axes.plot(range(1, len(errors) + 1), errors, color=_BLUE, marker="o", ms=5)
        axes.set_xticks(range(1, len(errors) + 1))
        axes.set_xlabel("codes")
        axes.set_ylabel("mean squared error")
        axes.set_ylim(0, 1.1 * max(errors) or 1)
        _plain_axes(axes)

    _save_figure(path, draw)


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


def _prefix_groups(codes: np.ndarray) -> list[np.ndarray]:
    """For each prefix length the number of each user's prefix: int64 [users], dense from 0."""
    codes = np.asarray(codes)
    if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer) or codes.min(initial=0) < 0:
        raise ValueError(
            f"codes must be integers of 0 or more of shape [users, levels]; got {codes.dtype} of shape "
            f"{list(codes.shape)}."
        )
    groups, found = np.zeros(len(codes), np.int64), []
    for level in codes.T.astype(np.int64):
        groups = np.unique(groups * (level.max(initial=0) + 1) + level, return_inverse=True)[1]
        found.append(groups)
    return found


def _columns_by_group(groups: np.ndarray, things: sparse.csr_matrix) -> sparse.csr_matrix:
    rows, width = np.repeat(np.arange(len(groups)), np.diff(things.indptr)), things.shape[1]
    columns = np.unique(groups[rows] * width + things.indices, return_inverse=True)[1]
    return _incidence(rows, columns, (len(groups), int(columns.max(initial=0)) + 1))


def _incidence(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sparse.csr_matrix:
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


def _interactions(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of each interaction: row of its user, item, rating (NaN = unknown), whether it is held out."""
    lists = table["items"].combine_chunks()
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    items = lists.flatten().to_numpy().astype(np.int64)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    held_out = np.arange(len(items)) >= (np.cumsum(lengths) - HELD_OUT)[rows]
    ratings = np.full(len(items), np.nan)
    if "ratings" in table.column_names:
        rated = table["ratings"].cast(pa.list_(pa.float64())).combine_chunks()
        has_list = pc.is_valid(rated).to_numpy(zero_copy_only=False)
        ratings[has_list[rows]] = rated.flatten().to_numpy(zero_copy_only=False)
    return rows, items, ratings, held_out


def _top_words(weights: sparse.csr_matrix) -> sparse.csr_matrix:
    """The highest values of each row, ties by column."""
    rows = np.repeat(np.arange(weights.shape[0]), np.diff(weights.indptr))
    order = np.lexsort((weights.indices, -weights.data, rows))
    best = order[np.arange(len(order)) - weights.indptr[rows] < _WORDS]
    return sparse.csr_matrix((weights.data[best], (rows[best], weights.indices[best])), shape=weights.shape)


def _cases(
    index: UserIndex,
    latents: np.ndarray,
    weights: sparse.csr_matrix,
    top: sparse.csr_matrix,
    words: list[str],
    cases: int,
) -> list[dict[str, Any]]:
    def best(row: np.ndarray) -> list[str]:
        order = np.argsort(-row, kind="stable")[:_WORDS]
        return [words[column] for column in order if row[column] > 0]

    def own(user: int) -> list[str]:
        return best(top[user].toarray()[0])

    overall = np.asarray(weights.mean(axis=0)).ravel()
    groups = _prefix_groups(index.codes)
    found = []
    for user in _evenly(len(index), cases):
        prefixes = []
        for length, group in enumerate(groups, 1):
            members = np.flatnonzero(group == group[user])
            mean = np.asarray(weights[members].mean(axis=0)).ravel()
            prefix = spell_codes(index.codes[user, :length])
            prefixes.append({"prefix": prefix, "users": len(members), "words": best(mean - overall)})
        same = (index.codes == index.codes[user]).cumprod(axis=1).sum(axis=1)
        distances = np.linalg.norm(latents - latents[user], axis=1)
        order = np.lexsort((distances, -same))
        nearest = [
            {
                "user_id": index.user_ids[other],
                "index": spell_codes(index.codes[other]),
                "codes_shared": int(same[other]),
                "distance": round(float(distances[other]), 4),
                "words": own(other),
            }
            for other in order[: _NEAREST + 1]
            if other != user
        ]
        spelled = spell_codes(index.codes[user])
        case = {"user_id": index.user_ids[user], "index": spelled, "words": own(user)}
        found.append(case | {"prefixes": prefixes, "nearest": nearest})
    return found


def _evenly(users: int, most: int) -> np.ndarray:
    return np.arange(users) if users <= most else np.linspace(0, users - 1, most).astype(np.int64)


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else round(value, 4) for value in values]


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:,.2f}"


def _code(text: str) -> str:
    # In a table cell a bar ends the cell even inside of backticks.
    return "`" + " ".join(text.replace("`", "'").replace("|", "\\|").split()) + "`"


def _markdown_table(table: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def _plain_axes(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e3e7eb", lw=0.8)
    axes.set_axisbelow(True)


def _save_figure(path: str | os.PathLike, draw: Callable[["Figure"], None]) -> None:
    # A Figure without pyplot needs no display and leaves the user's backend alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    draw(figure)
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=130, metadata={"Software": None})
