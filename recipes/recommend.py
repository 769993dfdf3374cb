"""Writes the best items of every user, or of a file of requests, as Parquet with raw ids.

    python recipes/recommend.py --model output/quickstart/model --output_file output/quickstart/recommendations.parquet
    python recipes/recommend.py --model output/quickstart/model --requests requests.jsonl --k 5

A request is a JSON line (or a Parquet row) with any of user_id, history (item ids or titles, oldest first) and reviews
(what somebody new wrote). Each row of the result holds user_id, item_ids, titles and scores, best first.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from trl import TrlParser

from ulmrec_hf.cli import run_script
from ulmrec_hf.console import quiet_imports
from ulmrec_hf.files import atomic_path

with quiet_imports():
    from ulmrec_hf.recommender import Recommender, Request

RECOMMENDATIONS = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_ids", pa.list_(pa.string())),
        ("titles", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
    ]
)
BLOCK = 1024  # rows written together


@dataclass
class RecommendArguments:
    """Which model recommends what to whom."""

    model: str = field(metadata={"help": "The folder model/ of a run, or what Recommender.save_pretrained wrote."})
    output_file: str = field(default="recommendations.parquet", metadata={"help": "The Parquet file to write."})
    requests: str | None = field(
        default=None, metadata={"help": "JSON lines or Parquet of requests; default: every user of the model."}
    )
    k: int = field(default=10, metadata={"help": "Items a user, at most as many as the model ranks candidates."})
    batch_size: int = field(default=32, metadata={"help": "Prompts a forward pass."})
    base: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the base, instead of the one that the adapter names."}
    )


def make_parser() -> TrlParser:
    """The parser of this script's settings."""
    return TrlParser([RecommendArguments], description=__doc__)


def read_requests(path: str) -> Iterator[Request]:
    """The requests of a file; empty lines are skipped.

    Raises:
        ValueError: the file is missing, or a line is no request; the message names file and line.
    """
    if not Path(path).is_file():
        raise ValueError(f"requests: {path} does not exist. Set requests to a file.")
    if path.endswith(".parquet"):
        with pq.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from (_request(row, f"{path}, row {number}") for number, row in enumerate(rows, 1))
        return
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                request = json.loads(line) if line.strip() else None
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error}).") from None
            if request is not None:
                yield _request(request, f"{path}:{number}")


def _request(fields: Any, place: str) -> Request:
    if not isinstance(fields, dict):
        raise ValueError(f"{place}: a request is a JSON object; got {str(fields)[:80]!r}.")
    try:
        return Request.parse(fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from None


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the recommendations, and prints where."""
    (args,) = make_parser().parse_args_and_config(args=argv)
    recommender = Recommender.from_pretrained(args.model, args.base)
    if args.requests is None and not len(recommender.data):
        raise ValueError(f"{args.model} holds no users (save_user_map was off): name a file of requests.")
    asked, named = itertools.tee(read_requests(args.requests) if args.requests else recommender.data.user_ids)
    results = zip(named, recommender.recommend_many(asked, args.k, batch_size=args.batch_size), strict=True)
    rows = 0
    with atomic_path(args.output_file) as partial, pq.ParquetWriter(partial, RECOMMENDATIONS) as writer:
        while block := list(itertools.islice(results, BLOCK)):
            columns = {
                "user_id": [asker if isinstance(asker, str) else asker.user_id for asker, _ in block],
                "item_ids": [[item["item_id"] for item in items] for _, items in block],
                "titles": [[item["title"] for item in items] for _, items in block],
                "scores": [[item["score"] for item in items] for _, items in block],
            }
            writer.write_table(pa.table(columns, RECOMMENDATIONS))
            rows += len(block)
    print(f"Recommendations for {rows:,} users: {args.output_file}")


if __name__ == "__main__":
    run_script(main)
