"""Item-kNN: time and memory of counting neighbours in N interactions, against a plain co-occurrence product.

    python benchmarks/item_knn_scale.py                       # 1 and 10 million interactions
    python benchmarks/item_knn_scale.py 100000 1000000 --peer

Seeded synthetic sequences of Zipf items, each method and size in its own process. The peer is the plain item-kNN on
SciPy: X.T @ X of the binary user-item matrix, which ignores order and distance.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

from retrieval_scale import synthetic_sequences

MEAN_LENGTH = 7.0


def fit_ours(sequences) -> int:
    from ulmrec_hf.retrieval.item_knn import ItemKNN, ItemKNNConfig

    config = ItemKNNConfig(num_items=sequences.num_items, catalogue=sequences.catalogue)
    return ItemKNN.count(sequences, config).weights.nnz


def fit_scipy(sequences) -> int:
    import numpy as np
    from scipy import sparse

    ones = np.ones(len(sequences.items), np.float32)
    shape = (len(sequences), sequences.num_items + 1)
    matrix = sparse.csr_array((ones, sequences.items, sequences.offsets), shape=shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1
    weights = (matrix.T @ matrix).tocsr()
    weights.setdiag(0)
    weights.eliminate_zeros()
    return weights.nnz


WAYS = {"ulmrec_hf": fit_ours, "scipy": fit_scipy}


def measure(way: str, interactions: int, items: int) -> dict[str, float]:
    """Runs one way in a process of its own."""
    command = [sys.executable, __file__, str(interactions), "--items", str(items), "--way", way]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("interactions", type=int, nargs="*", default=[1_000_000, 10_000_000])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--peer", action="store_true", help="also measure the plain co-occurrence product")
    parser.add_argument("--output", help="JSON file for the figures")
    parser.add_argument("--way", help=argparse.SUPPRESS)  # of the measured process
    args = parser.parse_args()
    if args.way:
        sequences = synthetic_sequences(round(args.interactions[0] / MEAN_LENGTH), args.items, mean=MEAN_LENGTH)
        WAYS[args.way](synthetic_sequences(100, 100))  # what only the first call costs
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        start = time.perf_counter(), time.process_time()
        neighbours = WAYS[args.way](sequences)
        result = {"interactions": len(sequences.items), "neighbours": neighbours}
        result |= {"seconds": time.perf_counter() - start[0], "cpu_seconds": time.process_time() - start[1]}
        result |= {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "before": before}
        print(json.dumps(result))
        return
    results = {}
    head = ["interactions", "seconds", "CPU s", "per second", "neighbours", "peak GiB"]
    print(f"{args.items:,} items\n{'':<10}" + "".join(f"{name:>14}" for name in head))
    for way in WAYS if args.peer else ["ulmrec_hf"]:
        for interactions in sorted(args.interactions):
            result = measure(way, interactions, args.items)
            results.setdefault(way, []).append(result)
            row = f"{result['interactions']:>14,}{result['seconds']:>14.1f}{result['cpu_seconds']:>14.1f}"
            row += f"{result['interactions'] / result['seconds']:>14,.0f}{result['neighbours']:>14,}"
            print(f"{way:<10}{row}{result['peak'] / 2**30:>14.2f}", flush=True)
        first, last = results[way][0], results[way][-1]
        growth = {
            name: last[name] / last["interactions"] * first["interactions"] / first[name]
            for name in ("seconds", "cpu_seconds")
        }
        last["growth"] = growth
        print(
            f"{way}: time per interaction {growth['seconds']:.2f}x, processor time {growth['cpu_seconds']:.2f}x from "
            f"{first['interactions']:,} to {last['interactions']:,}"
        )
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump({"settings": vars(args), "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
