import json
import math
import re

import numpy as np
import pytest

from ulmrec_hf.metrics import METRICS, Metric, random_order_metrics, ranking_metrics
from ulmrec_hf.report import Report, TrainCounts, plot_code_use, plot_metrics, plot_training

USERS = 300
NAMES = ["recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr@5", "mrr@10"]


@pytest.fixture
def mask():
    return np.random.default_rng(0).random(USERS) < 0.6


def ranks(mask, shift, seed):
    generator = np.random.default_rng(seed)
    places = np.maximum(generator.integers(1, 21, USERS) - generator.integers(0, shift + 1, USERS), 1)
    return np.where(mask, places, math.inf)


@pytest.fixture
def report(mask):
    report = Report({"validation": mask, "test": mask}, 20, notes=["Evidence: the train part."], samples=500)
    labels = np.where(mask, 0, -1)
    for split in ("validation", "test"):
        report.add("random", split, random_order_metrics(20, labels), order="random")
        report.add("retriever", split, ranks(mask, 3, 1), order="retriever")
        report.add("ulmrec", split, ranks(mask, 15, 2), order="retriever")
    return report


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_rows_are_flat_and_hold_both_scopes(report, mask):
    rows = report.rows()
    assert len(rows) == 3 * 2 * 2
    expected = ["system", "split", "scope", "order", "users", *NAMES]
    assert list(rows[0]) == expected + [f"{name}_{end}" for name in NAMES for end in ("low", "high")]
    by_key = {(row["system"], row["split"], row["scope"]): row for row in rows}
    ranked, overall = by_key["ulmrec", "test", "rank"], by_key["ulmrec", "test", "overall"]
    assert (ranked["users"], overall["users"]) == (mask.sum(), USERS)
    values = ranks(mask, 15, 2)
    for name, value in ranking_metrics(values[mask]).items():
        assert ranked[name] == pytest.approx(value, abs=1e-6)
        assert overall[name] == pytest.approx(value * mask.mean(), abs=1e-6)
        assert ranked[f"{name}_low"] < ranked[name] < ranked[f"{name}_high"]


def test_groups_by_train_count_split_all_users(mask, tmp_path):
    counts = np.random.default_rng(5).integers(0, 12, USERS)  # nobody above 15
    report = Report({"test": mask}, 20, samples=50, train_counts=TrainCounts({"test": counts}, k_core=5))
    values = ranks(mask, 3, 1)
    report.add("retriever", "test", values, order="retriever")
    report.add("ulmrec", "test", ranks(mask, 15, 2), order="retriever")
    rows = report.write(tmp_path, [("ulmrec", "retriever")])
    assert [row["scope"] for row in rows] == ["rank", "overall", "core", "train<5", "train5-15"] * 2
    for scope, users in (("core", counts >= 5), ("train<5", counts < 5), ("train5-15", counts >= 5)):
        row = next(row for row in rows if row["scope"] == scope)
        assert row["users"] == users.sum() and row["system"] == "retriever"
        assert row["ndcg@10"] == pytest.approx(ranking_metrics(values[users])["ndcg@10"], abs=1e-6)
    text, core = (tmp_path / "report.md").read_text(), (counts >= 5).sum()
    assert text.count("### By the target's count in train\n\nNDCG@10 over all users") == 1
    assert f"| Targets | all (300) | core: ≥ 5 ({core}) | < 5 ({USERS - core}) | 5–15 ({core}) |" in text
    assert "as the data's 5-core promises" in text
    assert report.summary(rows).count("ulmrec") == 1


def test_random_order_is_exact_in_the_rank_scope(report):
    row = next(row for row in report.rows() if row["system"] == "random" and row["scope"] == "rank")
    assert row["ndcg@10"] == row["ndcg@10_low"] == row["ndcg@10_high"] == pytest.approx(0.2272, abs=5e-5)


def test_a_catalogue_rank_counts_in_the_scope_of_the_candidates(mask):
    """A system that ranks the whole catalogue is measured on the same users as the rankers."""
    report = Report({"test": mask}, 20)
    report.add("popularity", "test", np.ones(USERS), order="popularity")
    assert [row["users"] for row in report.rows()] == [mask.sum(), USERS]
    assert [row["ndcg@10"] for row in report.rows()] == [1, 1]


def test_comparisons_are_paired(report):
    rows = report.comparisons([("ulmrec", "retriever")])
    assert len(rows) == 2 * 2 * len(NAMES)
    assert list(rows[0]) == ["a", "b", "split", "scope", "metric", "difference", "low", "high"]
    values = {(row["system"], row["split"], row["scope"]): row for row in report.rows()}
    for row in rows:
        key = row["split"], row["scope"]
        difference = values["ulmrec", *key][row["metric"]] - values["retriever", *key][row["metric"]]
        assert row["difference"] == pytest.approx(difference, abs=3e-6)
        assert 0 < row["low"] < row["difference"] < row["high"]


def test_a_system_compared_with_itself_has_no_difference(report):
    for row in report.comparisons([("ulmrec", "ulmrec")]):
        assert (row["difference"], row["low"], row["high"]) == (0, 0, 0)


def test_written_files_are_whole_and_equal_for_equal_results(report, tmp_path):
    pairs = [("ulmrec", "retriever"), ("ulmrec", "random")]
    rows = report.write(tmp_path / "a", pairs)
    report.write(tmp_path / "b", pairs)
    names = {"metrics.json", "comparisons.json", "report.md", "metrics.png"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / "metrics.json").read_text()) == rows
    assert json.loads((tmp_path / "a" / "comparisons.json").read_text()) == report.comparisons(pairs)
    assert is_png(tmp_path / "a" / "metrics.png")


def test_markdown_shows_the_ceiling_the_best_and_the_protocol(report, mask):
    text = report.markdown(report.rows(), report.comparisons([("ulmrec", "retriever")]))
    assert f"{100 * mask.mean():.1f} % of the users: this Recall@20 of the retriever is the ceiling" in text
    assert text.index("## Test") < text.index("## Validation")
    assert "- Evidence: the train part." in text
    lines = [line for line in text.splitlines() if line.startswith("| `ulmrec` |")]
    assert len(lines) == 4
    assert all(line.count("**") == 2 * len(NAMES) for line in lines)
    assert not any("**" in line for line in text.splitlines() if line.startswith(("| `random`", "| `retriever`")))
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert columns == {9}
    assert "| `ulmrec` − `retriever` | hits only | **+" in text
    assert text.count("*Hits only* counts") == 1
    assert f"### Hits only: {mask.sum()}\n\n| System | Order | Recall@5 (hits only) |" in text
    assert f"### All users: {USERS}\n\n| System | Order | Recall@5 (all users) |" in text
    assert "overall" not in text.lower()


def test_summary_has_a_row_for_each_system_the_best_first_and_fits_a_terminal(report, mask):
    rows = report.rows()
    lines = report.summary(rows).splitlines()
    assert re.split(" {2,}", lines[0]) == [
        "System",
        "NDCG@10 (hits only)",
        "NDCG@10 (all users)",
        "Recall@10 (all users)",
    ]
    assert [line.split()[0] for line in lines[2:5]] == ["ulmrec", "retriever", "random"]
    values = {row["scope"]: row for row in rows if (row["system"], row["split"]) == ("ulmrec", "test")}
    for scope, name in (("rank", "ndcg@10"), ("overall", "ndcg@10"), ("overall", "recall@10")):
        assert f"{values[scope][name]:.4f} ({values[scope][f'{name}_low']:.4f}-" in lines[2]
    assert f"the {mask.sum()} test users" in lines[-2]
    assert max(map(len, lines)) <= 100


def test_a_registered_metric_is_in_every_table(mask, tmp_path, monkeypatch):
    monkeypatch.setattr(METRICS, "_entries", dict(METRICS._entries))  # forgets what is registered here
    METRICS.register("first")(Metric("first", "First", lambda ranks, k: (ranks == 1).astype(float)))
    report = Report({"test": mask}, 20, samples=50)
    report.add("random", "test", random_order_metrics(20, np.where(mask, 0, -1)), order="random")
    report.add("ulmrec", "test", np.where(mask, 1, math.inf), order="retriever")
    report.write(tmp_path, [("ulmrec", "random")])
    ranked = {
        row["system"]: row for row in json.loads((tmp_path / "metrics.json").read_text()) if row["scope"] == "rank"
    }
    assert (ranked["ulmrec"]["first@10"], ranked["random"]["first@10"]) == (1, 0.05)
    assert "first@5" in {row["metric"] for row in json.loads((tmp_path / "comparisons.json").read_text())}
    assert "First@10 (hits only)" in (tmp_path / "report.md").read_text()


def test_no_user_in_a_scope_gives_null(tmp_path):
    report = Report({"test": np.zeros(3, dtype=bool)}, 20)
    report.add("ulmrec", "test", np.full(3, math.inf), order="retriever")
    ranked, overall = report.write(tmp_path, [("ulmrec", "ulmrec")])
    assert (ranked["users"], ranked["ndcg@10"], ranked["ndcg@10_low"]) == (0, None, None)
    assert (overall["users"], overall["ndcg@10"]) == (3, 0)
    assert "n/a" in (tmp_path / "report.md").read_text()


def test_bad_input_is_named(report, mask):
    with pytest.raises(ValueError, match=r"split 'dev' is not in the report's splits \['test', 'validation'\]"):
        report.add("ulmrec", "dev", ranks(mask, 1, 1), order="retriever")
    with pytest.raises(ValueError, match="'ulmrec' was already added"):
        report.add("ulmrec", "test", ranks(mask, 1, 1), order="retriever")
    with pytest.raises(ValueError, match=r"system 'new' has the shape \(2,\); the split 'test' has 300 users"):
        report.add("new", "test", [1, 2], order="retriever")
    with pytest.raises(ValueError, match="cannot compare 'ulmrec' with 'nobody'"):
        report.comparisons([("ulmrec", "nobody")])


def test_training_plot(tmp_path):
    log = [{"step": step, "loss": 1 / step} for step in range(1, 20)]
    log += [{"step": step, "eval_validation_ndcg@10": 0.1 * step, "eval_loss": 1.0} for step in (5, 10)]
    log += [{"step": 20, "train_loss": 0.3, "train_runtime": 3.0}]
    plot_training(tmp_path / "training.png", {"ulmrec": log, "ulmrec_no_index": log[:25]})
    assert is_png(tmp_path / "training.png")
    plot_training(tmp_path / "empty.png", {})
    assert is_png(tmp_path / "empty.png")


def test_code_use_plot(tmp_path):
    codes = np.random.default_rng(0).integers(0, 32, (200, 4)).astype(np.uint16)
    plot_code_use(tmp_path / "code_use.png", codes, 32)
    assert is_png(tmp_path / "code_use.png")
    with pytest.raises(ValueError, match="in 0 to 15"):
        plot_code_use(tmp_path / "bad.png", codes, 16)
    assert [path.name for path in tmp_path.iterdir()] == ["code_use.png"]


def test_metric_plot_without_ranked_users(tmp_path):
    report = Report({"test": np.zeros(3, dtype=bool)}, 20)
    report.add("ulmrec", "test", np.full(3, math.inf), order="retriever")
    plot_metrics(tmp_path / "metrics.png", report.rows())
    assert is_png(tmp_path / "metrics.png")
