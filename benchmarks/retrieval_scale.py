"""Top-20 retrieval for up to a million users from 100,000 items: time and memory by the number of users.

    python benchmarks/retrieval_scale.py
    python benchmarks/retrieval_scale.py --sample 20000     # times that many evenly spread users of each

Seeded synthetic sequences; LRURec with untrained weights, and a hybrid of LRURec, item-kNN, popularity and the text of
made-up titles. The test candidates of every user are streamed to Parquet. Each figure comes from a process of its own,
which loads a retriever that another one has fitted and saved; the peak is all that this process ever held.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ulmrec_hf.tables import Sequences

if TYPE_CHECKING:
    from ulmrec_hf.retrieval.base import Retriever

EXPONENT = 0.8  # of the popularity by rank; that of the items of Amazon Beauty is 0.76
CATALOGUE = "synthetic"
COMPONENTS = ["lrurec", "item_knn", "popularity", "text"]  # of the hybrid
K = 20


def synthetic_sequences(users: int, items: int, *, shortest: int = 5, mean: float = 7.0) -> Sequences:
    """Seeded Zipf items in sequences of geometric length."""
    rng = np.random.default_rng(0)
    offsets = np.zeros(users + 1, np.int64)
    np.cumsum(shortest - 1 + rng.geometric(1 / (mean - shortest + 1), users), out=offsets[1:])
    ids = rng.permutation(items).astype(np.int32) + np.int32(1)  # popularity does not go by id
    flat = np.empty(offsets[-1], np.int32)
    for start in range(0, len(flat), 1 << 20):  # in blocks, so that making them is not the peak
        part = flat[start : start + (1 << 20)]
        part[:] = ids[zipf(rng, items, len(part))]
    return Sequences(flat, offsets, items, CATALOGUE)


def zipf(rng: np.random.Generator, kinds: int, count: int) -> np.ndarray:
    """int64 [count] in 0..kinds - 1, the lowest the most frequent."""
    shares = np.cumsum(np.arange(1, kinds + 1) ** -EXPONENT)
    return np.searchsorted(shares, rng.random(count) * shares[-1])


def made_up_titles(items: int) -> list[str]:
    """Seeded titles of ten words, of which two share about as often one as two titles of Amazon Beauty do."""
    words = zipf(np.random.default_rng(1), 20_000, 10 * items).reshape(items, 10)
    return [" ".join(f"word{word}" for word in row) for row in words]


def fit(system: str, users: int, items: int, folder: Path) -> None:
    """Saves the retriever to `folder`, which already has one of title text if a hybrid was saved there before."""
    from ulmrec_hf.retrieval.arguments import RETRIEVERS, RetrieverArguments
    from ulmrec_hf.retrieval.base import load_retriever
    from ulmrec_hf.retrieval.hybrid import Hybrid
    from ulmrec_hf.retrieval.lrurec import LRURec, LRURecConfig

    sequences = synthetic_sequences(users, items)

    def fitted(name: str) -> "Retriever":
        if name == "lrurec":
            return LRURec(LRURecConfig(num_items=items, catalogue=CATALOGUE))
        if name == "text" and (folder / name).is_dir():  # minutes to fit, and users do not change its speed
            return load_retriever(folder / name)
        titles = made_up_titles(items) if name == "text" else []
        return RETRIEVERS[name].fit_sequences(sequences, titles, RetrieverArguments())

    parts = [fitted(name) for name in (COMPONENTS if system == "hybrid" else [system])]
    retriever = Hybrid.combine(parts, sequences, max_users=4000) if system == "hybrid" else parts[0]
    retriever.save_pretrained(folder)


def retrieve_all(system: str, users: int, items: int, folder: Path, sample: int) -> dict[str, float]:
    """Streams the test candidates of all users, or `sample` of them, to Parquet."""
    import pyarrow.parquet as pq

    from ulmrec_hf.protocol import target_positions
    from ulmrec_hf.retrieval.base import load_retriever
    from ulmrec_hf.retrieval.candidates import retrieve
    from ulmrec_hf.tables import CANDIDATES

    sequences = synthetic_sequences(users, items)
    retriever = load_retriever(folder, catalogue=CATALOGUE)
    rows = np.stack(target_positions(sequences.lengths, "test"))
    if sample and sample < users:
        rows = rows[:, np.linspace(0, users - 1, sample).astype(np.int64)]
    for part in (rows[:, :500], rows):  # the first call bears the costs that occur once
        start = time.perf_counter(), time.process_time()
        with pq.ParquetWriter(folder / "candidates.parquet", CANDIDATES, compression="zstd") as writer:
            for table in retrieve(retriever, sequences, "test", *part, K):
                writer.write_table(table)
    return {
        "timed": rows.shape[1],
        "seconds": time.perf_counter() - start[0],
        "cpu_seconds": time.process_time() - start[1],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def measure(job: str, system: str, users: int, args: argparse.Namespace, folder: Path) -> dict[str, float] | None:
    """Runs one job in a process of its own."""
    command = [sys.executable, __file__, "--job", job, "--systems", system, "--users", str(users)]
    command += ["--items", str(args.items), "--sample", str(args.sample), "--folder", str(folder)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--systems", nargs="+", default=["lrurec", "hybrid"], choices=["hybrid", *COMPONENTS])
    parser.add_argument("--sample", type=int, default=0, help="users that are timed; 0 = all")
    parser.add_argument("--folder", help="where the temporary files go (default: the system's)")
    parser.add_argument("--output", help="JSON file for the figures")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # of the measured process
    args = parser.parse_args()
    if args.job:
        of = args.systems[0], args.users[0], args.items, Path(args.folder)
        print(json.dumps(fit(*of) if args.job == "fit" else retrieve_all(*of, args.sample)))
        return
    results = []
    head = ["users", "timed", "users/s", "seconds", "us/user", "CPU us/user", "peak GiB"]
    print(f"top {K} of {args.items:,} items\n{'':<10}" + "".join(f"{name:>12}" for name in head))
    for system in args.systems:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            for users in sorted(args.users):
                measure("fit", system, users, args, Path(folder))
                result = {"system": system, "users": users} | measure("retrieve", system, users, args, Path(folder))
                results.append(result)
                timed, seconds = result["timed"], result["seconds"]
                row = f"{users:>12,}{timed:>12,}{timed / seconds:>12.0f}{seconds:>12.1f}{1e6 * seconds / timed:>12.0f}"
                row += f"{1e6 * result['cpu_seconds'] / timed:>12.0f}{result['peak'] / 2**30:>12.2f}"
                print(f"{system:<10}{row}", flush=True)
        first, last = results[-len(args.users)], result
        growth = {
            name: last[name] / last["timed"] * first["timed"] / first[name] for name in ("seconds", "cpu_seconds")
        }
        result["growth"] = growth
        print(
            f"{system}: time per user {growth['seconds']:.2f}x, processor time {growth['cpu_seconds']:.2f}x from "
            f"{first['users']:,} to {last['users']:,} users" + (", by a sample of them" * bool(args.sample))
        )
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump({"settings": vars(args), "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
