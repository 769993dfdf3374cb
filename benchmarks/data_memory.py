"""Peak memory and time of preparing N interactions with 300-character reviews.

python benchmarks/data_memory.py 10000000
python benchmarks/data_memory.py 1000000 --peer     # also the same work on one pandas table, and the ratio
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REVIEW_CHARACTERS = 300
WORDS = ["this", "card", "came", "in", "a", "nice", "box", "and", "my", "sister", "liked", "it", "very", "much"]


def write_interactions(path: Path, count: int) -> None:
    """Streams `count` seeded JSON lines, ten a user and fifty an item on average, in no order of user or time."""
    rng = random.Random(0)
    text = " ".join(rng.choices(WORDS, k=200_000))
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            start = rng.randrange(len(text) - REVIEW_CHARACTERS)
            row = {
                "reviewerID": f"A{rng.randrange(count // 10 + 1):013d}",
                "asin": f"B{rng.randrange(count // 50 + 1):09d}",
                "overall": rng.randint(1, 5),
                "unixReviewTime": rng.randrange(10**9, 15 * 10**8),
                "summary": text[start : start + 20],
                "reviewText": text[start : start + REVIEW_CHARACTERS],
            }
            file.write(json.dumps(row) + "\n")


def prepare_with_ours(path: Path, output_dir: Path) -> None:
    from ulmrec_hf.data.arguments import DataArguments
    from ulmrec_hf.data.stage import prepare_data

    prepare_data(DataArguments(data_format="amazon", interactions=str(path)), output_dir)


def prepare_with_pandas(path: Path, output_dir: Path) -> None:
    import pandas as pd

    table = pd.read_json(path, lines=True).sort_values("unixReviewTime", kind="stable")
    table = table.drop_duplicates(["reviewerID", "asin"])
    while True:
        sizes = [table.groupby(name)[name].transform("size") for name in ("reviewerID", "asin")]
        enough = (sizes[0] >= 5) & (sizes[1] >= 5)
        if enough.all():
            break
        table = table[enough]
    table.sort_values(["reviewerID", "unixReviewTime"], kind="stable").to_parquet(output_dir / "interactions.parquet")


WAYS = {"ulmrec_hf": prepare_with_ours, "pandas": prepare_with_pandas}


def measure(way: str, path: Path, folder: Path) -> dict[str, float]:
    """Runs one way in a process of its own."""
    output_dir = folder / way
    output_dir.mkdir()
    command = [sys.executable, __file__, "0", "--way", way, "--path", str(path), "--output_dir", str(output_dir)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("interactions", type=int, nargs="?", default=10_000_000)
    parser.add_argument("--peer", action="store_true", help="also measure pandas")
    parser.add_argument("--folder", help="where the temporary files go (default: the system's)")
    for name in ("--way", "--path", "--output_dir"):  # of the measured process
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        start = time.perf_counter()
        WAYS[args.way](Path(args.path), Path(args.output_dir))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"peak": peak, "seconds": time.perf_counter() - start}))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "interactions.jsonl"
        write_interactions(path, args.interactions)
        print(f"{args.interactions:,} interactions, {path.stat().st_size / 2**30:.2f} GiB of JSON lines")
        results = {way: measure(way, path, Path(folder)) for way in (WAYS if args.peer else ["ulmrec_hf"])}
    for way, result in results.items():
        print(
            f"{way:<10} peak {result['peak'] / 2**30:.2f} GiB, {result['seconds']:.0f} s, "
            f"{result['peak'] / args.interactions:.0f} bytes per interaction"
        )
    if args.peer:
        print(f"pandas / ulmrec_hf: peak {results['pandas']['peak'] / results['ulmrec_hf']['peak']:.2f}x")


if __name__ == "__main__":
    main()
