"""How much a report varies: runs the main job for several seeds, toy worlds and processors, and prints the spread.

python benchmarks/seeds.py --config recipes/configs/quickstart.yaml --seeds 42 1 2 --output_dir output/seeds

Runs of one world and processor share the stages before the tuning. A finished run is not repeated.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
EARLY = ("data", "retriever", "preferences", "index")


def main() -> None:
    """Prints a Markdown table: mean, standard deviation and range of NDCG@10 (hits only) by system."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "recipes" / "configs" / "quickstart.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2], help="Seeds of the tuning.")
    parser.add_argument("--worlds", type=int, nargs="+", default=[0], help="Values of synthetic_seed.")
    parser.add_argument(
        "--processors", nargs="+", default=["native"], help="Values of ATEN_CPU_CAPABILITY, or native: default, avx2."
    )
    parser.add_argument("--output_dir", type=Path, default=Path("output/seeds"))
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    args, others = parser.parse_known_args()
    runs = [
        run(args.config, args.output_dir, *each, others) for each in product(args.worlds, args.processors, args.seeds)
    ]
    print(table(runs, args.split))


def run(config: str, output_dir: Path, world: int, processor: str, seed: int, others: list[str]) -> Path:
    """Makes one run, with the early stages of the first one of its world and processor; returns its folder."""
    group = output_dir / f"world-{world}-{processor}"
    folder = group / f"seed-{seed}"
    done = next((path for path in sorted(group.glob("seed-*")) if (path / "report" / "metrics.json").is_file()), None)
    if done is not None and not folder.is_dir():
        for name in EARLY:
            shutil.copytree(done / name, folder / name)
    argv = ["--config", config, "--synthetic_seed", str(world), "--seed", str(seed), "--output_dir", str(folder)]
    environment = dict(os.environ) | ({} if processor == "native" else {"ATEN_CPU_CAPABILITY": processor})
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(ROOT / "recipes" / "accelerate" / "cpu.yaml")]
    subprocess.run([*launcher, str(ROOT / "recipes" / "finetune.py"), *argv, *others], env=environment, check=True)
    return folder


def table(runs: list[Path], split: str) -> str:
    """The Markdown table of these runs' reports."""
    values: dict[str, list[float]] = {}
    for folder in runs:
        for row in json.loads((folder / "report" / "metrics.json").read_text(encoding="utf-8")):
            if (row["split"], row["scope"]) == (split, "rank"):
                values.setdefault(row["system"], []).append(row["ndcg@10"])
    lines = [f"| system ({split}, {len(runs)} runs) | NDCG@10, mean | deviation | range |", "|---|---|---|---|"]
    for system, found in values.items():
        deviation = np.std(found, ddof=1) if len(found) > 1 else 0.0
        lines.append(f"| `{system}` | {np.mean(found):.3f} | {deviation:.3f} | {min(found):.3f}-{max(found):.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
