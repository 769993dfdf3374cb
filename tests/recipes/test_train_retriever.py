import json
from pathlib import Path

import pytest

from tests.small_run import load_recipe
from ulmrec_hf.retrieval.arguments import RETRIEVERS

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
CONFIGS = sorted((RECIPES / "configs" / "retrieval").glob("*.yaml"))


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("train_retriever")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses(recipe, config):
    _, args, _ = recipe.make_parser().parse_args_and_config(["--config", str(config)])
    assert args.retriever == config.stem.removesuffix("_ids")
    assert not {"interactions:", "items:", "output_dir:"} & set(config.read_text().split())


def test_there_is_a_config_for_each_retriever():
    assert {path.stem for path in CONFIGS} >= set(RETRIEVERS)


def test_runs_end_to_end(recipe, tmp_path, capsys):
    argv = [
        *("--config", str(RECIPES / "configs/retrieval/item_knn.yaml")),
        *("--data_format", "synthetic", "--synthetic_users", "60", "--k_core", "0"),
        *("--output_dir", str(tmp_path)),
    ]
    recipe.main(argv)
    printed = capsys.readouterr().out
    table = printed[printed.index("System") : printed.index("Hits only:")].splitlines()[2:-1]
    assert {line.split()[0] for line in table} == {"popularity", "item_knn"}
    assert (tmp_path / "retriever" / "candidates.parquet").is_file()
    rows = json.loads((tmp_path / "report" / "metrics.json").read_text())
    users = {(row["system"], row["split"], row["scope"]): row["users"] for row in rows}
    groups = {key: count for key, count in users.items() if key[2].startswith("train")}
    for system, split in {key[:2] for key in users}:
        assert sum(groups[key] for key in groups if key[:2] == (system, split)) == users[system, split, "overall"]
    assert users.keys() - groups.keys() == {  # no core targets without a k-core
        (system, split, scope)
        for system in ("popularity", "item_knn")
        for split in ("validation", "test")
        for scope in ("rank", "overall")
    }
    assert all(row["recall@10"] <= row["recall@20"] for row in rows)
    comparisons = json.loads((tmp_path / "report" / "comparisons.json").read_text())
    assert {(row["a"], row["b"]) for row in comparisons} == {("item_knn", "popularity")}


def test_fewer_candidates_than_ten_report_what_they_hold(recipe, tmp_path, capsys):
    argv = ["--config", str(RECIPES / "configs/retrieval/text.yaml"), "--num_candidates", "5", "--k_core", "0"]
    recipe.main([*argv, "--data_format", "synthetic", "--synthetic_users", "60", "--output_dir", str(tmp_path)])
    assert "NDCG@5" in capsys.readouterr().out
    rows = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert all("recall@5" in row and "recall@10" not in row for row in rows)
    assert (tmp_path / "report" / "stage.json").is_file()  # so that the main job does not take it for its own


def test_unknown_setting_is_refused(recipe, tmp_path):
    config = tmp_path / "bad.yaml"
    config.write_text("retreiver: lrurec\n")
    with pytest.raises(ValueError, match="retreiver"):
        recipe.main(["--config", str(config), "--output_dir", str(tmp_path)])


def test_bad_value_is_refused_before_anything_is_written(recipe, tmp_path):
    with pytest.raises(ValueError, match="num_candidates must be at least 1"):
        recipe.main(["--num_candidates", "0", "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
