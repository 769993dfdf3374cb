"""The quality of a user index as JSON, Markdown and plots; the measures are those of `lift`."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from ..figures import BLUE, GREY, ORANGE, markdown_table, number, plain_axes, save_figure
from ..files import write_json, write_text
from ..protocol import train_lengths
from ..tables import LeaveOneOut, UserTexts
from ..user_index import UserIndex, spell_codes
from .assignment import Assignment, count_collisions
from .lift import TOP_WORDS, incidence, lift, prefix_groups, rating_agreement, top_words, word_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOTS = {
    "lift.png": "Lift by prefix length",
    "code_frequency.png": "Users of each code",
    "prefix_sizes.png": "Users of each prefix",
    "user_map.png": "Users by their latent vectors, coloured by their first code",
    "reconstruction_error.png": "Reconstruction error",
}
_SEEN = {"train": "were not seen by the index", "all": "were SEEN by the index (evidence: all): it leaks"}
_NEAREST = 5
_MAP_USERS = 20_000


def index_quality(
    index: UserIndex,
    assignment: Assignment,
    data: LeaveOneOut,
    texts: UserTexts,
    *,
    extra: Mapping[str, Any] | None = None,
    cases: int = 5,
    max_users: int = 200_000,
    seed: int = 0,
) -> dict[str, Any]:
    """The quality of a user index; JSON-able. Held-out items are read for `lift_heldout` and go nowhere else.

    Args:
        index: of all users of the data, in its order.
        assignment: what the index was made of.
        texts: the train texts of the users, which the cases and the lift of words are of.
        extra: further entries of the report.
        cases: how many users are described one by one.
        max_users, seed: see `lift`.

    Returns:
        What `UserIndex.report` returns, `collisions_before` and `collisions_after` the assignment (`count_collisions`),
        `reconstruction_error`, `extra`; `lift_users`, how many users the base rate of the lifts is from; `cases`; and
        by prefix length what `lift` and `rating_agreement` give: `lift_...` and `shared_...` of `train` and `heldout`
        items and of `words` (a user's `top_words`), `lift_heldout_interval`, `pairs_heldout` (the same for every lift),
        `rating_agreement`, `rated_pairs`.

    Raises:
        ValueError: the users of the index, the assignment, the data and the texts are not the same.
    """
    if not index.user_ids == texts.user_ids == data.user_ids or len(assignment.latents) != len(index):
        raise ValueError(
            f"The users of the index ({len(index)}), of the texts ({len(texts)}), of the assignment "
            f"({len(assignment.latents)}) and of the data ({len(data)}) must be the same, in the same order."
        )
    weights, words = word_weights(texts)
    top = top_words(weights)
    things, agreement = _shared_things(index, data)
    things["words"] = top
    lifts = {name: lift(index.codes, shared, max_users=max_users, seed=seed) for name, shared in things.items()}
    return {
        **index.report(),
        "collisions_before": count_collisions(assignment.nearest),
        "collisions_after": count_collisions(index.codes),
        "reconstruction_error": assignment.errors,
        **(extra or {}),
        "lift_users": min(len(index), max_users),
        "pairs_heldout": lifts["heldout"]["pairs"],
        **{f"lift_{name}": _rounded(values["lift"]) for name, values in lifts.items()},
        **{f"shared_{name}": values["shared"] for name, values in lifts.items()},
        "lift_heldout_interval": [bounds and _rounded(bounds) for bounds in lifts["heldout"]["interval"]],
        "rating_agreement": _rounded(agreement["ratio"]),
        "rated_pairs": agreement["pairs"],
        "cases": _cases(index, assignment.latents, weights, top, words, cases),
    }


def _shared_things(index: UserIndex, data: LeaveOneOut) -> tuple[dict[str, sparse.csr_matrix], dict[str, list]]:
    """The train and the held-out items of the users, and the agreement of their train ratings."""
    sequences = data.sequences
    later = ~sequences.oldest(train_lengths(sequences.lengths))
    rows = np.repeat(np.arange(len(sequences)), sequences.lengths)
    shape = (len(sequences), sequences.num_items + 1)
    things = {
        name: incidence(rows[mask], sequences.items[mask], shape)
        for name, mask in (("train", ~later), ("heldout", later))
    }
    return things, rating_agreement(index.codes, rows[~later], sequences.items[~later], data.ratings[~later])


def write_quality_report(
    folder: str | os.PathLike, quality: Mapping[str, Any], index: UserIndex, latents: np.ndarray
) -> None:
    """Writes report.json, report.md and the `PLOTS` into `folder`; equal input gives equal bytes.

    Args:
        quality: what `index_quality` returned for this index.
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
    parts += [markdown_table(table), f"{alone} The error is that of the nearest codes, before collisions are settled."]

    parts.append("## Prefixes")
    table = [["Prefix length", "Pairs of users", "Train items", "Held-out items", "95 %", "Words", "Ratings"]]
    for level in levels:
        interval = quality["lift_heldout_interval"][level]
        train, held_out, words = (
            f"{_plain(quality[f'lift_{name}'][level])} ({quality[f'shared_{name}'][level]:,})"
            for name in ("train", "heldout", "words")
        )
        bounds = "n/a" if interval is None else f"{_plain(interval[0])} to {_plain(interval[1])}"
        ratings = f"{_plain(quality['rating_agreement'][level])} ({quality['rated_pairs'][level]:,})"
        table.append([str(level + 1), f"{quality['pairs_heldout'][level]:,}", train, held_out, bounds, words, ratings])
    parts.append(markdown_table(table))
    base = "all users" if quality["lift_users"] == quality["users"] else f"{quality['lift_users']:,} random users"
    parts.append(
        "Train items, held-out items, words: the lift, how much more often two users share one if they share the prefix"
        " than any two users do; 1 is a random index. In parentheses: how many pairs under a prefix share one. The "
        f"base rates are over all pairs of {base}. Held-out items, the last two of each user, "
        f"{_SEEN[quality.get('evidence', 'train')]}; their 95 % interval is a bootstrap over prefixes. Words are the "
        "five of each user's train texts with the highest TF-IDF. Ratings: the mean absolute difference of two users' "
        "ratings of an item, over that of any two users, so that below 1 is agreement; in parentheses, of how many "
        "pairs of ratings."
    )
    parts += ["\n\n".join(f"![{title}]({name})" for name, title in PLOTS.items()), "## Cases"]
    for case in quality["cases"]:
        parts.append(f"### {_code(case['user_id'])} is {_code(case['index'])}")
        parts.append(f"Own words: {', '.join(case['words']) or 'none'}.")
        table = [["Prefix", "Users", "Words more frequent than with all users"]]
        table += [
            [_code(prefix["prefix"]), f"{prefix['users']:,}", ", ".join(prefix["words"])] for prefix in case["prefixes"]
        ]
        parts.append(markdown_table(table))
        table = [["Nearest users", "Index", "Codes shared", "Latent distance", "Words"]]
        table += [
            [
                _code(user["user_id"]),
                _code(user["index"]),
                str(user["codes_shared"]),
                _plain(user["distance"]),
                ", ".join(user["words"]),
            ]
            for user in case["nearest"]
        ]
        parts.append(markdown_table(table))
    return "\n\n".join(part for part in parts if part) + "\n"


def _plot(
    path: str | os.PathLike, draw: Callable[["Axes"], None], x_label: str, y_label: str, *, legend: bool = True
) -> None:
    """Writes what `draw` puts on the axes of a figure as PNG."""

    def draw_figure(figure: "Figure") -> None:
        axes = figure.subplots()
        draw(axes)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if legend:
            axes.legend(frameon=False)
        plain_axes(axes)

    save_figure(path, draw_figure)


def plot_lift(path: str | os.PathLike, quality: Mapping[str, Any]) -> None:
    """Lift by prefix length on a log axis: train items, held-out items with their interval, and 1."""

    def draw(axes: "Axes") -> None:
        for name, label, color in (("train", "train items", GREY), ("heldout", "held-out items", BLUE)):
            lifts = quality[f"lift_{name}"]
            lengths = [length for length, value in enumerate(lifts, 1) if value]  # neither None nor 0 has a place here
            axes.plot(lengths, [lifts[length - 1] for length in lengths], color=color, marker="o", ms=5, label=label)
        for length, interval in enumerate(quality["lift_heldout_interval"], 1):
            if interval and interval[0] > 0:
                axes.vlines(length, *interval, color=BLUE, lw=1.2)
        axes.axhline(1, color=ORANGE, lw=1.4, ls="--", label="random index")
        axes.set_yscale("log")
        axes.set_xticks(range(1, len(quality["lift_train"]) + 1))

    _plot(path, draw, "prefix length", "lift")


def plot_code_frequency(path: str | os.PathLike, index: UserIndex) -> None:
    """How many users each code of a level has, most used first, beside an even use."""

    def draw(axes: "Axes") -> None:
        for level, codes in enumerate(index.codes.T, 1):
            use = np.sort(np.bincount(codes, minlength=index.codebook_size))[::-1]
            axes.plot(np.arange(1, len(use) + 1), use, lw=1.6, label=f"level {level}")
        axes.axhline(len(index) / index.codebook_size, color="black", lw=1.2, ls="--", label="even use")
        axes.set_ylim(bottom=0)

    _plot(path, draw, "code, most used first", "users")


def plot_prefix_sizes(path: str | os.PathLike, index: UserIndex) -> None:
    """How many users each prefix has, largest first, a line for each prefix length; both axes are logarithmic."""

    def draw(axes: "Axes") -> None:
        for length, groups in enumerate(prefix_groups(index.codes), 1):
            sizes = np.sort(np.bincount(groups))[::-1]
            axes.plot(np.arange(1, len(sizes) + 1), sizes, lw=1.6, label=f"length {length}: {len(sizes):,} prefixes")
        axes.set_xscale("log")
        axes.set_yscale("log")

    _plot(path, draw, "prefix, largest first", "users")


def plot_user_map(path: str | os.PathLike, index: UserIndex, latents: np.ndarray) -> None:
    """The first two principal components of at most 20,000 users' latents; colours repeat after 20 codes."""

    def draw(axes: "Axes") -> None:
        shown = _evenly(len(index), _MAP_USERS)
        centred = latents[shown].astype(np.float64)
        centred -= centred.mean(axis=0)
        components = np.linalg.eigh(centred.T @ centred)[1][:, :-3:-1]  # eigh sorts them ascending
        points = np.zeros((len(shown), 2))
        points[:, : components.shape[1]] = centred @ components  # a latent of length 1 has one component
        axes.scatter(*points.T, c=index.codes[shown, 0] % 20, cmap="tab20", vmin=0, vmax=19, s=4, linewidths=0)
        axes.set_title(f"{len(shown):,} users, coloured by their first code", fontsize=11)

    _plot(path, draw, "first principal component", "second principal component", legend=False)


def plot_reconstruction_error(path: str | os.PathLike, errors: Sequence[float]) -> None:
    """The reconstruction error after each level."""

    def draw(axes: "Axes") -> None:
        axes.plot(range(1, len(errors) + 1), errors, color=BLUE, marker="o", ms=5)
        axes.set_xticks(range(1, len(errors) + 1))
        axes.set_ylim(0, 1.1 * max(errors) or 1)

    _plot(path, draw, "codes", "mean squared error", legend=False)


def _cases(
    index: UserIndex,
    latents: np.ndarray,
    weights: sparse.csr_matrix,
    top: sparse.csr_matrix,
    words: list[str],
    cases: int,
) -> list[dict[str, Any]]:
    def best(row: np.ndarray) -> list[str]:
        order = np.argsort(-row, kind="stable")[:TOP_WORDS]
        return [words[column] for column in order if row[column] > 0]

    def own(user: int) -> list[str]:
        return best(top[user].toarray()[0])

    overall = np.asarray(weights.mean(axis=0)).ravel()
    groups = prefix_groups(index.codes)
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


def _plain(value: float | None) -> str:
    return number(value, ",.2f")


def _code(text: str) -> str:
    # In a table cell a bar ends the cell even inside of backticks.
    return "`" + " ".join(text.replace("`", "'").replace("|", "\\|").split()) + "`"
