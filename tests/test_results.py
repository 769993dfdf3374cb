"""Reports of a retrieval stage and of a ranker's scores: constant scores are a random order, and who is core."""

import json

import numpy as np
import pytest
import torch

from tests.retrieval.world import NUM_ITEMS, make_lists, write_data_stage
from ulmrec_hf.files import write_json
from ulmrec_hf.metrics import candidate_places, per_user_metrics, random_order_metrics
from ulmrec_hf.protocol import EVALUATED, target_positions
from ulmrec_hf.results import write_ranker_report, write_retriever_report
from ulmrec_hf.retrieval.arguments import RETRIEVERS, RetrieverArguments
from ulmrec_hf.retrieval.base import CountingRetriever, RetrieverConfig
from ulmrec_hf.retrieval.stage import train_retriever
from ulmrec_hf.tables import LeaveOneOut, read_table


class ConstantConfig(RetrieverConfig):
    model_type = "constant"


class Constant(CountingRetriever):
    """Every item is as good as any other."""

    config_class, array_names = ConstantConfig, ()

    @classmethod
    def fit_sequences(cls, sequences, titles, args):
        return cls(cls.make_config(sequences, args), {})

    def score(self, histories):
        return torch.zeros(len(list(histories)), self.config.num_items + 1)


@pytest.fixture(scope="module")
def constant(tmp_path_factory):
    """The folder of a retrieval stage of `Constant`, its data and the rows of its report."""
    folder, before = tmp_path_factory.mktemp("constant"), dict(RETRIEVERS._entries)
    RETRIEVERS.register("constant")(Constant)
    write_data_stage(folder / "data", make_lists())
    record = json.loads((folder / "data" / "stage.json").read_text())
    write_json(folder / "data" / "stage.json", {**record, "settings": {"k_core": 20}})
    data, args = LeaveOneOut.load(folder / "data"), RetrieverArguments(retriever="constant")
    stage = train_retriever(args, data, folder)
    write_retriever_report(stage, folder / "report", args, data)
    RETRIEVERS._entries = before
    return folder, data, json.loads((folder / "report" / "metrics.json").read_text())


@pytest.mark.parametrize("split", EVALUATED)
def test_a_constant_retriever_is_a_random_order_of_the_catalogue(constant, split):
    _, data, rows = constant
    sequences = data.sequences
    lists = [
        sequences[user][: position + 1]
        for user, position in zip(*target_positions(sequences.lengths, split), strict=True)
    ]
    left = np.array([NUM_ITEMS - len(set(items[:-1])) for items in lists])
    reachable = np.array([items[-1] not in items[:-1] for items in lists])
    expected = random_order_metrics(left, np.where(reachable, 0, -1), ks=(5, 10, 20))
    row = next(row for row in rows if (row["system"], row["split"], row["scope"]) == ("constant", split, "overall"))
    for name, values in expected.items():
        assert row[name] == pytest.approx(values.mean(), abs=1e-6), name  # the report has six decimals
    assert row["ndcg@10"] > 0.1


@pytest.mark.parametrize("split", EVALUATED)
def test_a_constant_retriever_orders_its_candidates_at_random(constant, split):
    """The row `retriever` against the row `random` of a run's report."""
    table = read_table(constant[0] / "retriever" / "candidates.parquet").to_pandas()
    table = table[table["split"] == split]
    for k in (3, 20):
        places = candidate_places(table["target_rank"], table["target_first"], table["target_tied"], k)
        lists = [list(items[:k]) for items in table["items"]]
        labels = np.array(
            [
                items.index(target) if target in items else -1
                for items, target in zip(lists, table["target"], strict=True)
            ]
        )
        expected = random_order_metrics([len(items) for items in lists], labels)
        for name, values in per_user_metrics(places).items():
            np.testing.assert_allclose(values, expected[name], atol=1e-12, rtol=0)
        assert 0 < (labels >= 0).mean() < 1


def test_core_targets_are_those_that_train_holds_often_enough(constant):
    folder, data, rows = constant
    sequences = data.sequences
    lists = [sequences[user].tolist() for user in range(len(sequences))]
    train = [item for items in lists for item in items[:-2]]
    targets = np.array([train.count(items[-1]) for items in lists])
    users = {row["scope"]: row["users"] for row in rows if (row["system"], row["split"]) == ("popularity", "test")}
    assert 0 < users["core"] == (targets >= 20).sum() < len(targets)
    assert users["train>15"] == (targets > 15).sum()
    text = (folder / "report" / "report.md").read_text()
    assert "*Core* targets occur in train at least 20 times" in text
    assert f"| Targets | all (120) | core: ≥ 20 ({users['core']}) |" in text


def test_a_ranker_with_constant_scores_equals_random(tmp_path):
    counts, labels = np.array([20, 20, 12, 20]), np.array([3, -1, 0, 19])
    scores = np.where(np.arange(20) < counts[:, None], np.float32(1.5), -np.inf)
    write_ranker_report(tmp_path, "test", scores, labels, counts)
    rows = json.loads((tmp_path / "metrics.json").read_text())
    assert {row["scope"] for row in rows} == {"rank", "overall"}  # nothing is known of train
    plain = [{name: value for name, value in row.items() if name not in ("system", "order")} for row in rows]
    assert plain[:2] == plain[2:] and plain[0]["recall@5"] > 0
    assert "*Core*" not in (tmp_path / "report.md").read_text()
