"""The index that a training row spells says as much of the row's target as that of a test row, and no more."""

import pytest
import yaml

from tests.small_run import ROOT, load_script
from ulmrec_hf import Interactions
from ulmrec_hf.indexing.arguments import IndexArguments
from ulmrec_hf.indexing.base import INDEXERS
from ulmrec_hf.protocol import SPLITS
from ulmrec_hf.user_index import UserIndex

SHARE = 0.03


def shares(data, args):
    """By split how often a row's own index finds its target, and how often a training row's whole index does."""
    target_first = load_script(ROOT / "benchmarks" / "index_quality.py").target_first
    indexer = INDEXERS[args.indexer].fit(data, args)
    index = indexer.index(data)
    found = {split: target_first(indexer, index, data, split) for split in SPLITS}
    leaky = UserIndex(index.user_ids, index.codes, index.codebook_size)
    return found, target_first(indexer, leaky, data, "train")


def test_in_the_toy_world():
    args = IndexArguments(indexer="residual_kmeans", inputs=["titles"], codebook_size=32)
    found, leaky = shares(Interactions.toy_world(1000).leave_one_out(), args)
    assert abs(found["train"] - found["test"]) < SHARE and abs(found["train"] - found["validation"]) < SHARE
    assert found["test"] > 0.1 and leaky > found["test"] + 0.2  # of 20; so the measure sees a leak


@pytest.mark.data
@pytest.mark.slow
def test_on_beauty(shared):
    folder = shared / "data" / "amazon_beauty_2014"
    read = Interactions.read(folder / "sequences.jsonl.gz", "sequences", items=folder / "items.jsonl.gz")
    settings = yaml.safe_load((ROOT / "recipes" / "configs" / "indexing" / "titles.yaml").read_text(encoding="utf-8"))
    found, leaky = shares(read.leave_one_out(), IndexArguments(**settings | {"indexer": "residual_kmeans"}))
    # an item's share falls with time: that of test rows is 0.03 below that of validation rows
    assert abs(found["train"] - (found["validation"] + found["test"]) / 2) < SHARE
    assert leaky > found["test"] + 0.2
