"""User indexing for up to ten million users: time and memory of unique codes, of one new user, and of the training.

    python benchmarks/indexing_scale.py                                           # 10,000 to 1 million users
    python benchmarks/indexing_scale.py --parts assign --users 1000000 10000000
    python benchmarks/indexing_scale.py --parts assign --users 10000000 --topics 20000      # ten times the tastes
    python benchmarks/indexing_scale.py --parts assign --users 100000 --equal 50000       # so many users are the same
    python benchmarks/indexing_scale.py --parts train --data_folder output/beauty/data

assign: unique codes for seeded synthetic latents, a mixture of flat clouds of Zipf sizes, where a hundredth of the
users are like others to the last bit, under 4 x 256 codebooks that `UserIndexer` starts by k-means on a sample.
new_user: `UserIndexer.index_new` of one user by co-occurrence, and `UserIndex.merge`, with the largest of the numbers
of users in the map. train: `UserIndexer.train_on` alone, with the settings of `--config`, on a finished data stage.
Each figure comes from a process of its own; the peak is all that this process ever held, its input too. On a busy
machine, and with one thread (OMP_NUM_THREADS=1), read the processor time.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

LEVELS, CODES, DIM = 4, 256, 32
SAMPLE = 20_000  # users that the codebooks are made from
BLOCK = 65_536
TOPICS, FLAT = 2_000, 12  # clouds of users, and how many directions each has
ALIKE = 0.01  # users that have one of LIKES vectors
LIKES = 1_000
ITEMS, ITEM_DIM = 100_000, 128  # of the new users
CONFIG = Path(__file__).parents[1] / "recipes" / "configs" / "indexing" / "titles.yaml"


def synthetic_latents(users: int, equal: int = 0, topics: int = TOPICS) -> np.ndarray:
    """Seeded float32 [users, DIM]; the first `equal` of them are one vector."""
    world = np.random.default_rng(0)
    centres = world.standard_normal((topics, DIM), dtype=np.float32)
    directions = world.standard_normal((topics, FLAT, DIM), dtype=np.float32) / 6
    shares = np.cumsum(np.arange(1, topics + 1) ** -0.8)

    def draw(rng: np.random.Generator, count: int) -> np.ndarray:
        drawn = np.searchsorted(shares, rng.random(count) * shares[-1])
        places = rng.standard_normal((count, 1, FLAT), dtype=np.float32)
        return centres[drawn] + (places @ directions[drawn])[:, 0]

    likes, rng = draw(world, LIKES), np.random.default_rng(1)
    latents = np.empty((users, DIM), np.float32)
    for begin in range(0, users, BLOCK):  # in blocks, so that making them is not the peak
        part = latents[begin : begin + BLOCK]
        part[:] = draw(rng, len(part))
        alike = rng.random(len(part)) < ALIKE
        part[alike] = likes[rng.integers(LIKES, size=alike.sum())]
    latents[:equal] = latents[0]
    return latents


def make_codebooks(folder: Path, topics: int) -> dict[str, float]:
    import torch

    from ulmrec_hf.indexing.indexer import UserIndexer, UserIndexerConfig

    torch.manual_seed(0)
    indexer = UserIndexer(UserIndexerConfig(DIM, CODES, LEVELS, DIM, attention=False))
    indexer.start_codebooks(torch.from_numpy(synthetic_latents(SAMPLE, topics=topics)))
    np.save(folder / "codebooks.npy", indexer.codebooks.numpy())
    return {}


def assign(users: int, equal: int, topics: int, folder: Path) -> dict[str, float]:
    from ulmrec_hf.indexing.assignment import assign_unique, count_collisions, nearest_codes

    codebooks, latents = np.load(folder / "codebooks.npy"), synthetic_latents(users, equal, topics)
    assign_unique(latents[:1000], codebooks)  # what only the first call costs
    before, start = peak(), (time.perf_counter(), time.process_time())
    codes = assign_unique(latents, codebooks)
    result = {"seconds": time.perf_counter() - start[0], "cpu_seconds": time.process_time() - start[1]}
    result |= {"peak": peak(), "before": before, "collisions": count_collisions(nearest_codes(latents, codebooks))}
    if count_collisions(codes):
        raise RuntimeError("two users have the same codes")
    return result


def index_new_user(users: int, calls: int) -> dict[str, float]:
    import torch
    from retrieval_scale import synthetic_sequences

    from ulmrec_hf.indexing.dataset import Input, UserDataset, unit
    from ulmrec_hf.indexing.indexer import UserIndexer, UserIndexerConfig
    from ulmrec_hf.indexing.inputs import InputEncoder
    from ulmrec_hf.user_index import UserIndex

    sequences = synthetic_sequences(users + calls, ITEMS)
    item_ids = [f"B{item:09d}" for item in range(ITEMS)]
    vectors = unit(np.random.default_rng(0).standard_normal((ITEMS, ITEM_DIM), dtype=np.float32))
    inputs = [Input(vectors, sequences.items - 1)]
    result = {}
    for attention in (False, True):
        torch.manual_seed(0)
        indexer = UserIndexer(UserIndexerConfig(ITEM_DIM, CODES, LEVELS, DIM, attention=attention, user_dim=64)).eval()
        indexer.inputs = InputEncoder({"cooccurrence": 1.0}, None, item_ids, vectors, user_ids=attention)
        if not attention:  # an untrained attention is the mean: the same latents and the same map
            dataset = UserDataset(inputs, sequences.offsets[: users + 1], None, 50)
            indexer.start_codebooks(indexer.latents(dataset, SAMPLE))
            quantizer = indexer.quantizer.state_dict()
            codes = indexer.assign(dataset).codes
            start = time.perf_counter(), time.process_time()
            used = UserIndex([f"A{user:013d}" for user in range(users)], codes, CODES)
            result["map"] = [1000 * (time.perf_counter() - start[0]), 1000 * (time.process_time() - start[1])]
        indexer.quantizer.load_state_dict(quantizer)
        times = {"encode": [], "index": [], "merge": []}
        for user in range(users, users + calls):
            items = sequences.items[slice(*sequences.offsets[user : user + 2])] - 1
            history, name = [item_ids[item] for item in items], f"new{user}"
            clocks = [(time.perf_counter(), time.process_time())]
            indexer.inputs.encode(cooccurrence=history)
            if attention:
                indexer.inputs.encode_user_ids([name])
            clocks.append((time.perf_counter(), time.process_time()))
            new = indexer.index_new(used=used, user_id=name, cooccurrence=history)
            clocks.append((time.perf_counter(), time.process_time()))
            if user < users + 5:
                used.merge(new)
                clocks.append((time.perf_counter(), time.process_time()))
            for part, duration in zip(times, np.diff(clocks, axis=0), strict=False):
                times[part].append(1000 * duration)
        for part, durations in times.items():
            result[f"{part}, attention {'on' if attention else 'off'}"] = np.median(durations, axis=0).tolist()
            if part == "index":
                result[f"{part}, attention {'on' if attention else 'off'}, first call"] = durations[0].tolist()
    return {"milliseconds": result, "peak": peak()}


def train(data_folder: str, config: str) -> dict[str, float]:
    import yaml
    from index_quality import encode_users, fit_users
    from transformers.utils import logging

    from ulmrec_hf.indexing.arguments import IndexArguments
    from ulmrec_hf.indexing.inputs import TrainPart
    from ulmrec_hf.tables import LeaveOneOut

    logging.set_verbosity_error()
    args = IndexArguments(**yaml.safe_load(Path(config).read_text(encoding="utf-8")))
    clocks = [(time.perf_counter(), time.process_time())]
    part = TrainPart.read(LeaveOneOut.load(data_folder), args.inputs, args.input_weights)
    inputs, dataset = encode_users(args, part)
    clocks.append((time.perf_counter(), time.process_time()))
    fit_users(args, inputs, dataset)
    clocks.append((time.perf_counter(), time.process_time()))
    (input_seconds, cpu_inputs), (seconds, cpu_seconds) = np.diff(clocks, axis=0).tolist()
    result = {"users": len(part.user_ids), "steps": args.autoencoder_steps + args.steps, "peak": peak()}
    return result | {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "input_seconds": input_seconds,
        "input_cpu_seconds": cpu_inputs,
    }


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(job: str, args: argparse.Namespace, folder: str, users: int = 0, equal: int = 0) -> dict:
    """Runs one job in a process of its own."""
    command = [sys.executable, __file__, "--job", job, "--folder", folder, "--users", str(users), "--equal", str(equal)]
    command += [
        "--topics",
        str(args.topics),
        "--calls",
        str(args.calls),
        "--config",
        args.config,
        "--data_folder",
        args.data_folder or "",
    ]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def measure_assignment(args: argparse.Namespace, folder: str) -> list[dict]:
    measure("codebooks", args, folder)
    head = ["users", "equal", "colliding", "users/s", "seconds", "CPU s", "CPU us/user", "before GiB", "peak GiB"]
    print("".join(f"{name:>12}" for name in head))
    results = []
    for equal in [0, *([args.equal] if args.equal else [])]:
        for users in sorted(args.users):
            if equal > users:
                continue
            result = {"users": users, "equal": equal} | measure("assign", args, folder, users, equal)
            results.append(result)
            row = f"{users:>12,}{equal:>12,}{result['collisions']:>12,}{users / result['seconds']:>12,.0f}"
            row += (
                f"{result['seconds']:>12.1f}{result['cpu_seconds']:>12.1f}{1e6 * result['cpu_seconds'] / users:>12.1f}"
            )
            print(f"{row}{result['before'] / 2**30:>12.2f}{result['peak'] / 2**30:>12.2f}", flush=True)
    first, last = results[0], [result for result in results if not result["equal"]][-1]
    growth = {name: last[name] / last["users"] * first["users"] / first[name] for name in ("seconds", "cpu_seconds")}
    last["growth"] = growth
    print(
        f"time per user {growth['seconds']:.2f}x, processor time {growth['cpu_seconds']:.2f}x from "
        f"{first['users']:,} to {last['users']:,} users"
    )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["assign", "new_user", "train"])
    parser.add_argument("--users", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--equal", type=int, default=0, help="measure also with so many users that are the same")
    parser.add_argument("--topics", type=int, default=TOPICS, help="clouds that the users fall into")
    parser.add_argument("--calls", type=int, default=200, help="new users that are timed")
    parser.add_argument("--data_folder", help="a finished data stage to train on")
    parser.add_argument("--config", default=str(CONFIG), help="YAML of the training")
    parser.add_argument("--folder", help="where the temporary files go (default: the system's)")
    parser.add_argument("--output", help="JSON file for the figures")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # of the measured process
    args = parser.parse_args()
    if args.job:
        jobs = {
            "codebooks": lambda: make_codebooks(Path(args.folder), args.topics),
            "assign": lambda: assign(args.users[0], args.equal, args.topics, Path(args.folder)),
            "new_user": lambda: index_new_user(args.users[0], args.calls),
            "train": lambda: train(args.data_folder, args.config),
        }
        print(json.dumps(jobs[args.job]()))
        return
    parts = args.parts or ["assign", "new_user", *(["train"] if args.data_folder else [])]
    if "train" in parts and not args.data_folder:
        parser.error("the part train needs --data_folder")
    results = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if "assign" in parts:
            results["assign"] = measure_assignment(args, folder)
        if "new_user" in parts:
            users = max(args.users)
            results["new_user"] = result = {"users": users} | measure("new_user", args, folder, users)
            print(f"a new user beside {users:,}, milliseconds (of processor time), median of {args.calls}; merge: of 5")
            for name, (wall, cpu) in result["milliseconds"].items():
                print(f"  {name:<32}{wall:>10.2f} ({cpu:.2f})")
            print(f"  peak {result['peak'] / 2**30:.2f} GiB")
        if "train" in parts:
            results["train"] = result = measure("train", args, folder)
            print(
                f"training on {result['users']:,} users, {result['steps']} batches: {result['seconds']:.0f} s, "
                f"{result['cpu_seconds']:.0f} s of processor time, after {result['input_seconds']:.0f} s "
                f"({result['input_cpu_seconds']:.0f} s) for its inputs; peak {result['peak'] / 2**30:.2f} GiB"
            )
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump({"settings": vars(args), "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
