"""The main job: what a run leaves, that it resumes after a kill, and what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.small_run import ROOT, SMALL, environment, launch, load_recipe
from tests.tiny_llama import make_base
from ulmrec_hf import UserRanker
from ulmrec_hf.data.synthetic import synthetic_interactions
from ulmrec_hf.modeling import resolve_base
from ulmrec_hf.systems import ABLATIONS, RANKER
from ulmrec_hf.tasks.records import TASKS

FINETUNE = str(ROOT / "recipes" / "finetune.py")
ONE_SYSTEM = ["--ablations", "index_only", "--save_merged", "false"]


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_leaves_every_stage_and_no_path_of_this_machine(run_folder):
    for name in ("data", "retriever", "preferences", "index", "model", "report"):
        assert (run_folder / name / "stage.json").is_file(), name
    for name in ("adapter", "base", "merged", "user_index.parquet", "items.parquet", "ranker.json"):
        assert (run_folder / "model" / name).exists(), name
    columns = [pq.read_schema(run_folder / name / "user_index.parquet").names for name in ("index", "model")]
    assert columns == [["user_id", "codes", "earlier"], ["user_id", "codes"]]
    assert not list(run_folder.rglob("*.partial")) and not list(run_folder.rglob("checkpoint-*"))
    assert not [path for path in run_folder.rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl")]
    for path in [*run_folder.rglob("*.json"), *run_folder.rglob("*.md")]:
        assert str(run_folder.parent) not in path.read_text(encoding="utf-8"), path


def test_the_report_has_every_system_in_both_scopes(run_folder):
    rows = read_json(run_folder / "report" / "metrics.json")
    systems = {"random", "popularity", "item_knn", "lrurec", "retriever", RANKER.name}
    assert {row["system"] for row in rows} == systems | {system.name for system in ABLATIONS.values()}
    users = pq.read_table(run_folder / "data" / "sequences.parquet").num_rows
    for row in rows:
        assert row["scope"] != "overall" or row["users"] == users
        for name in ("recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr@5", "mrr@10"):
            assert row[f"{name}_low"] - 1e-6 <= row[name] <= row[f"{name}_high"] + 1e-6
    by_key = {(row["system"], row["split"], row["scope"]): row for row in rows}
    for split in ("validation", "test"):  # the retriever is LRURec: its own order is LRURec's
        assert by_key["lrurec", split, "overall"]["ndcg@10"] == by_key["retriever", split, "overall"]["ndcg@10"]
    comparisons = read_json(run_folder / "report" / "comparisons.json")
    pairs = {(row["a"], row["b"]) for row in comparisons}
    assert {("ulmrec", "retriever"), ("ulmrec", "ulmrec_no_index"), ("ulmrec_placebo", "ulmrec_no_index")} <= pairs
    for name in ("metrics.png", "training.png", "code_use.png"):
        assert (run_folder / "report" / name).read_bytes().startswith(b"\x89PNG")
    assert "ulmrec_index_only" in (run_folder / "stdout.txt").read_text(encoding="utf-8")


def test_every_evaluation_row_is_scored(run_folder):
    users = pq.read_table(run_folder / "data" / "sequences.parquet").num_rows
    table = pq.read_table(run_folder / "model" / "predictions.parquet").to_pandas()
    for (_, _), rows in table.groupby(["system", "split"]):
        assert sorted(rows["user"]) == list(range(users))
        assert all(np.isfinite(scores).all() for scores in rows["scores"])
    assert (table["label"] == -1).any()  # misses are scored too


def test_the_run_without_an_index_saw_no_user_token(run_folder):
    tokenizer = AutoTokenizer.from_pretrained(run_folder / "model" / "adapter")
    base = len(AutoTokenizer.from_pretrained(resolve_base("embedded")))
    seen = {}
    for name, path in (("ulmrec", "data/tasks"), ("no_index", "ablations/no_index/tasks")):
        rows = [row for file in (run_folder / path).rglob("*.parquet") for row in pq.read_table(file).to_pylist()]
        texts = [row["prompt"] + row["completion"] for row in rows]
        seen[name] = sum(token >= base for ids in tokenizer(texts)["input_ids"] for token in ids)
    assert len(tokenizer) > base and seen["ulmrec"] > 0
    assert seen["no_index"] == 0


def test_all_systems_are_tuned_for_equal_steps_on_their_own_tasks(run_folder):
    steps = {
        path.parent.parent.name: max(entry["step"] for entry in read_json(path)["history"])
        for path in run_folder.glob("ablations/*/model/training.json")
        if read_json(path)["history"]
    }
    assert steps == dict.fromkeys(("no_index", "history_only", "placebo"), 6)
    tasks = {
        name: Counter(load_dataset(str(run_folder / path), "mixture", split="train")["task"])
        for name, path in (("ulmrec", "data/tasks"), *((n, f"ablations/{n}/tasks") for n in steps))
    }
    names = [*TASKS]
    assert {names[task] for task in tasks["history_only"]} == {"next_item"}
    assert {names[task] for task in tasks["no_index"]} == {"next_item", "rating", "intent_next_item"}
    assert tasks["placebo"] == tasks["ulmrec"] and len(tasks["ulmrec"]) == len(TASKS)
    assert tasks["no_index"].items() <= tasks["ulmrec"].items()


def test_the_base_by_itself_is_scored_untuned(run_folder):
    stage = run_folder / "ablations" / "zero_shot" / "model"
    assert read_json(stage / "training.json")["history"] == [] and not list(stage.rglob("*.safetensors"))
    rows = load_dataset(str(run_folder / "ablations" / "zero_shot" / "tasks"), "next_item", split="test")
    base = resolve_base("embedded")
    ranker = UserRanker(AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base))
    table = pq.read_table(stage / "predictions.parquet").to_pandas().query("split == 'test'").sort_values("user")
    for row, scores in list(zip(rows, table["scores"], strict=True))[:8]:
        expected = ranker.scores([row["prompt"]], len(row["candidates"]))[0]
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)


def test_some_training_rows_leave_the_index_out_and_no_other_does(run_folder):
    prompts = load_dataset(str(run_folder / "data" / "tasks"), "mixture", split="train")
    empty = {name: [] for name in TASKS}
    for row in prompts:
        empty[[*TASKS][row["task"]]].append("### User:\n\n" in row["prompt"])
    assert {name for name, found in empty.items() if any(found)} == {"next_item", "rating"}
    assert 0.1 < np.mean(empty["next_item"]) < 0.3 and 0.1 < np.mean(empty["rating"]) < 0.35
    for split in ("validation", "test"):
        rows = load_dataset(str(run_folder / "data" / "tasks"), "next_item", split=split)
        assert not any("### User:\n\n" in prompt for prompt in rows["prompt"])


def test_the_same_command_runs_nothing_again_and_other_settings_are_refused(run_folder, small_settings):
    before = {path: path.stat().st_mtime_ns for path in (run_folder / "model").rglob("*")}
    finetune = load_recipe("finetune")
    finetune.main(["--config", str(small_settings), "--output_dir", str(run_folder), *SMALL])
    assert {path: path.stat().st_mtime_ns for path in (run_folder / "model").rglob("*")} == before
    with pytest.raises(ValueError, match=r"learning_rate was \S+, is 0.5.*--overwrite"):
        finetune.tune_run(
            finetune.parse(
                ["--config", str(small_settings), "--output_dir", str(run_folder), *SMALL, "--learning_rate", "0.5"]
            )
        )
    with pytest.raises(ValueError, match=r"synthetic_seed was 0, is 1"):
        finetune.prepare_stages(
            finetune.parse(
                ["--config", str(small_settings), "--output_dir", str(run_folder), *SMALL, "--synthetic_seed", "1"]
            )
        )


def test_every_column_of_a_table_is_decoded_once(small_settings, tmp_path, monkeypatch):
    decoded = Counter()

    class Counting(pq.ParquetFile):
        def __init__(self, source, **settings):
            super().__init__(source, **settings)
            self.file_name = os.path.basename(source)

        def read(self, columns=None, **settings):
            decoded.update((self.file_name, name) for name in columns or self.schema_arrow.names)
            return super().read(columns, **settings)

    monkeypatch.setattr(pq, "ParquetFile", Counting)
    finetune = load_recipe("finetune")
    finetune.prepare_stages(finetune.parse(["--config", str(small_settings), "--output_dir", str(tmp_path), *SMALL]))
    # the terminal's Recall@k reads two columns of the candidates again
    assert {name for name, count in decoded.items() if count > 1} <= {("candidates.parquet", "split")}
    assert {"sequences.parquet", "items.parquet", "interactions.parquet"} <= {file for file, _ in decoded}


def test_a_killed_tuning_resumes_and_ends_with_the_same_metrics(prepared, small_settings, tmp_path):
    steps = ["--max_steps", "12", *ONE_SYSTEM]
    unbroken = tmp_path / "unbroken"
    shutil.copytree(prepared, unbroken)
    argv = ["--config", str(small_settings), *SMALL, *steps, "--output_dir"]
    done = launch([FINETUNE, *argv, str(unbroken)])
    assert done.returncode == 0, done.stderr[-4000:]

    process = subprocess.Popen(
        [sys.executable, FINETUNE, *argv, str(prepared)],
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    begun = prepared / "model.partial" / "checkpoints" / "checkpoint-3" / "trainer_state.json"
    deadline = time.monotonic() + 300
    while not begun.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert begun.is_file() and not (prepared / "model").exists()

    done = launch([FINETUNE, *argv, str(prepared)])
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ("metrics.json", "comparisons.json"):
        assert (prepared / "report" / name).read_bytes() == (unbroken / "report" / name).read_bytes()
    weights = "adapter/adapter_model.safetensors"
    assert (prepared / "model" / weights).read_bytes() == (unbroken / "model" / weights).read_bytes()


def test_two_processes_measure_what_one_measures(run_folder, tmp_path):
    script = str(ROOT / "recipes" / "evaluate_ranker.py")
    argv = ["--model", str(run_folder / "model"), "--tasks", str(run_folder / "data" / "tasks"), "--use_cpu", "true"]
    argv += ["--per_device_eval_batch_size", "7"]  # does not divide the users: nobody may count twice
    cpu_2 = str(ROOT / "recipes" / "accelerate" / "cpu_2.yaml")
    done = launch([script, *argv, "--output_dir", str(tmp_path / "one")])
    assert done.returncode == 0, done.stderr[-4000:]
    launcher = ("-m", "accelerate.commands.launch", "--config_file", cpu_2)
    done = launch([script, *argv, "--output_dir", str(tmp_path / "two")], launcher=launcher)
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = (read_json(tmp_path / name / "metrics.json") for name in ("one", "two"))
    users = pq.read_table(run_folder / "data" / "sequences.parquet").num_rows
    assert {row["users"] for row in one if row["scope"] == "overall"} == {users}
    assert one == two
    done = launch([script, *argv[:-4], "--output_dir", str(tmp_path / "lost")], launcher=launcher)
    assert done.returncode != 0 and "--use_cpu" in done.stderr
    done = launch([script, *argv[:2], "--tasks", str(tmp_path / "lost"), "--use_cpu", "true"])
    assert done.returncode != 0 and "lost has no next_item/test-*.parquet; name the data/tasks" in done.stderr


def test_two_processes_run_the_whole_job(run_folder, small_settings, tmp_path):
    launcher = ("-m", "accelerate.commands.launch")
    launcher += ("--config_file", str(ROOT / "recipes" / "accelerate" / "cpu_2.yaml"))
    argv = ["--config", str(small_settings), "--output_dir", str(tmp_path / "run"), "--use_cpu", "true", *SMALL]
    argv += ["--per_device_train_batch_size", "4"]  # of two processes: the same steps as one
    done = launch([str(ROOT / "recipes" / "finetune.py"), *argv], launcher=launcher)
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = (read_json(folder / "report" / "metrics.json") for folder in (run_folder, tmp_path / "run"))
    assert [(row["system"], row["split"], row["scope"], row["users"]) for row in one] == [
        (row["system"], row["split"], row["scope"], row["users"]) for row in two
    ]
    for name in ("model", "ablations/history_only/model"):  # equal rows in every step, so equal up to rounding
        logs = [read_json(folder / name / "training.json")["history"] for folder in (run_folder, tmp_path / "run")]
        losses, others = ([entry["loss"] for entry in log if "loss" in entry] for log in logs)
        assert len(losses) == 6 and losses == pytest.approx(others, rel=1e-4)
    untuned = ("random", "popularity", "item_knn", "lrurec", "retriever")
    assert [row for row in one if row["system"] in untuned] == [row for row in two if row["system"] in untuned]


def write_world(folder, swapped: int):
    """The toy world as Parquet; the newest `swapped` interactions of every user are another user's."""
    interactions, items = synthetic_interactions(120, 0)
    table = interactions.to_pandas()
    place = table.groupby("user_id").cumcount(ascending=False)
    rng = np.random.default_rng(1)
    what = ["item_id", "rating", "summary", "review"]
    for newest in range(swapped):
        rows = np.flatnonzero(place == newest)
        owned = table.groupby("user_id")["item_id"].agg(set)
        while True:  # a permutation after which nobody has an item twice
            given = rng.permutation(rows)
            clash = [table["item_id"][g] in owned[table["user_id"][r]] for r, g in zip(rows, given, strict=True)]
            if np.mean(clash) < 0.05:
                break
        kept = [g if not bad else r for r, g, bad in zip(rows, given, clash, strict=True)]
        table.loc[rows, what] = table.loc[kept, what].to_numpy()
    folder.mkdir()
    table.to_parquet(folder / "interactions.parquet")
    pq.write_table(items, folder / "items.parquet")
    return table


@pytest.mark.slow
@pytest.mark.parametrize("swapped", [1, 2])
def test_held_out_interactions_change_nothing_that_is_trained(swapped, small_settings, tmp_path):
    """1: other test interactions, model selection on. 2: other validation and test ones, fixed steps, no selection."""
    selection = []
    if swapped == 2:
        selection = ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
        stages = yaml.safe_load(small_settings.read_text(encoding="utf-8"))
        retriever = tmp_path / "retriever.yaml"
        retriever.write_text(yaml.safe_dump({"hidden_size": 16, "epochs": 2, "patience": 0}), encoding="utf-8")
        stages["retriever_config"] = str(retriever)
        small_settings = tmp_path / "config.yaml"
        small_settings.write_text(yaml.safe_dump(stages), encoding="utf-8")
    worlds = {}
    for name, count in (("given", 0), ("other", swapped)):
        worlds[name] = write_world(tmp_path / f"{name}_world", count)
        argv = [
            FINETUNE,
            "--config",
            str(small_settings),
            "--output_dir",
            str(tmp_path / name),
            *SMALL[4:],
            *ONE_SYSTEM,
        ]
        argv += ["--data_format", "parquet", "--k_core", "0", *selection]
        argv += ["--interactions", str(tmp_path / f"{name}_world" / "interactions.parquet")]
        argv += ["--items", str(tmp_path / f"{name}_world" / "items.parquet")]
        done = launch(argv)
        assert done.returncode == 0, done.stderr[-4000:]
    assert (worlds["given"]["item_id"] != worlds["other"]["item_id"]).sum() > 60 * swapped
    given, other = tmp_path / "given", tmp_path / "other"
    assert (given / "data" / "items.parquet").read_bytes() == (other / "data" / "items.parquet").read_bytes()
    trained = [
        "retriever/model.safetensors",
        "preferences/preferences.parquet",
        "index/user_index.parquet",
        "index/indexer/model.safetensors",
        "data/tasks/mixture/train-00000-of-00001.parquet",
        "model/base/model.safetensors",
        "model/adapter/adapter_model.safetensors",
    ]
    for name in trained:
        assert (given / name).read_bytes() == (other / name).read_bytes(), name
    test_rows = "data/tasks/next_item/test-00000-of-00001.parquet"
    assert (given / test_rows).read_bytes() != (other / test_rows).read_bytes()
    index = pq.read_table(given / "index" / "user_index.parquet")
    assert index["earlier"].combine_chunks().value_lengths().to_pylist() == [1] * len(index)  # what training rows spell


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "number", "id"])
def test_a_run_with_another_kind_of_user_index(kind, small_settings, tmp_path):
    from ulmrec_hf.ranker import UserRanker
    from ulmrec_hf.user_index import UserIndex

    index_config = tmp_path / "index.yaml"
    given = yaml.safe_load((small_settings.parent / "index_config.yaml").read_text(encoding="utf-8"))
    index_config.write_text(yaml.safe_dump({**given, "index_kind": kind}), encoding="utf-8")
    folder = tmp_path / "run"
    argv = ["--config", str(small_settings), "--output_dir", str(folder), *SMALL, "--index_config", str(index_config)]
    done = launch([FINETUNE, *argv])
    assert done.returncode == 0, done.stderr[-4000:]

    index = UserIndex.from_parquet(folder / "model" / "user_index.parquet")
    assert index.kind == kind
    own = [index.spell(user) for user in index]
    spelled = {}
    for name, path in (("ulmrec", "data"), ("placebo", "ablations/placebo"), ("no_index", "ablations/no_index")):
        rows = pq.read_table(next((folder / path / "tasks" / "next_item").glob("test-*.parquet"))).to_pylist()
        spelled[name] = [re.search("### User:\n(.*)\n### ", row["prompt"])[1] for row in rows]
    assert spelled["ulmrec"] == own
    dealt = spelled["placebo"]
    assert sorted(dealt) == sorted(own) and sum(a == b for a, b in zip(dealt, own, strict=True)) < len(own) / 5
    assert set(spelled["no_index"]) == {""}
    for path in (folder / "ablations" / "no_index" / "tasks").rglob("*.parquet"):
        for row in pq.read_table(path).to_pylist():
            assert "### User:\n\n### " in row["prompt"] or "### User:" not in row["prompt"]
    systems = {row["system"] for row in read_json(folder / "report" / "metrics.json")}
    assert {"ulmrec", "ulmrec_no_index", "ulmrec_placebo", "ulmrec_index_only"} <= systems
    assert f"User index: {kind}, as plain text" in (folder / "report" / "report.md").read_text(encoding="utf-8")

    settings = load_recipe("finetune").parse(argv)
    base = AutoTokenizer.from_pretrained(resolve_base(settings.model.model_name_or_path))
    assert AutoTokenizer.from_pretrained(folder / "model" / "adapter").get_vocab() == base.get_vocab()
    assert not read_json(folder / "model" / "adapter" / "adapter_config.json")["trainable_token_indices"]
    ranker = UserRanker.from_pretrained(folder / "model", device="cpu")
    assert f"### User:\n{own[3]}\n### " in ranker.prompt([*index][3], [], ["ocean stove"])
    load_recipe("finetune").main(argv)  # nothing is done twice


BAD_SETTINGS = [
    (["--num_candidates", "60"], "num_candidates is 60"),
    (["--num_candidates", "30"], "raise it in retriever_config"),
    (["--ablations", "nothing"], "ablations holds nothing"),
    (["--ablations", "history_only", "--mixture", '{"rating": 1}'], "leaves ulmrec_history_only nothing to be tuned"),
    (["--interactions", "x.json"], "data_format is 'synthetic'"),
    (["--data_format", "amazon", "--interactions", "missing.json.gz"], "missing.json.gz"),
    (["--model_name_or_path", "no/such_model"], "no/such_model"),
    (["--retriever_config", "no.yaml"], "no.yaml does not exist"),
    (["--k_core", "99"], "k_core"),
]


@pytest.mark.parametrize(("argv", "text"), BAD_SETTINGS)
def test_bad_settings_are_reported_and_nothing_is_half_written(argv, text, small_settings, tmp_path):
    finetune = load_recipe("finetune")
    with pytest.raises(ValueError, match=re.escape(text)):
        finetune.prepare_stages(
            finetune.parse(["--config", str(small_settings), "--output_dir", str(tmp_path / "run"), *argv])
        )
    left = [path for path in (tmp_path / "run").rglob("*") if path.is_file()] if (tmp_path / "run").exists() else []
    assert {path.name for path in left} <= {"log.txt"}


def test_stages_that_do_not_make_what_the_tasks_show_are_refused(small_settings, tmp_path):
    finetune = load_recipe("finetune")
    settings = finetune.parse(
        ["--config", str(small_settings), "--output_dir", str(tmp_path), "--train_positions", "3"]
    )
    assert settings.index.train_positions == 3
    stages = {"index": "index_config", "retriever": "retriever_config", "preferences": "preference_config"}
    for stage, name in stages.items():
        for made, wanted in ((2, 3), (3, 0)):
            changed = {each: replace(getattr(settings, each), train_positions=0) for each in stages}
            changed[stage] = replace(changed[stage], train_positions=made)
            changed["tasks"] = replace(settings.tasks, train_positions=wanted)
            with pytest.raises(
                ValueError, match=rf"train_positions is {wanted}.*, but that of {name} is {made}: raise"
            ):
                settings._replace(**changed).check()
    few = replace(settings.index, train_positions=2)
    settings._replace(index=replace(few, index_kind="number")).check()  # a number is the same in all rows
    fewer = replace(settings.retriever, train_positions=2)
    settings._replace(retriever=fewer, tasks=replace(settings.tasks, hard_negatives=0.0)).check()
    leaky = replace(settings.index, evidence="all")
    with pytest.raises(ValueError, match="evidence is train in preference_config and all in index_config: set both"):
        settings._replace(index=leaky).check()
    settings._replace(index=leaky, preferences=replace(settings.preferences, evidence="all")).check()


def test_an_unknown_key_is_an_error(small_settings, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(small_settings.read_text(encoding="utf-8") + "\nlerning_rate: 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="lerning_rate"):
        load_recipe("finetune").parse(["--config", str(wrong)])
    stage = tmp_path / "stage.yaml"
    stage.write_text("epoch: 3\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"stage.yaml: unknown settings epoch"):
        load_recipe("finetune").parse(["--config", str(small_settings), "--retriever_config", str(stage)])


def test_an_unknown_kind_of_user_index_is_an_error(small_settings, tmp_path):
    stage = tmp_path / "index.yaml"
    stage.write_text("index_kind: hash\n", encoding="utf-8")
    with pytest.raises(ValueError, match="index_kind is 'hash'; it must be one of codes, text, number, id"):
        load_recipe("finetune").parse(["--config", str(small_settings), "--index_config", str(stage)])


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_read_by_its_script(path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    folder = path.parent.name
    if folder == "configs":
        argv = ["--config", str(path), "--bf16", "false", "--use_cpu", "true"]
        if yaml.safe_load(path.read_text(encoding="utf-8")).get("data_format", "synthetic") != "synthetic":
            argv += ["--interactions", "reviews.json.gz"]
        settings = load_recipe("finetune").parse(argv)
        assert settings.model.model_name_or_path
    elif folder == "quickstart":
        argv = ["--config", str(ROOT / "recipes" / "configs" / "quickstart.yaml"), f"--{path.stem}_config", str(path)]
        argv = [item.replace("preferences_config", "preference_config") for item in argv]
        assert load_recipe("finetune").parse(argv)
    else:
        recipe = {"retrieval": "train_retriever", "indexing": "index_users"}[folder]
        assert load_recipe(recipe).make_parser().parse_args_and_config(args=["--config", str(path)])


def test_help_shows_our_settings_first(capsys):
    with pytest.raises(SystemExit):
        load_recipe("finetune").make_parser().parse_args_and_config(args=["--help"])
    text = capsys.readouterr().out
    assert text.index("--data_format") < text.index("--lora_r") and "toy world" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper_beauty", "paper_games"])
def test_the_paper_s_settings_tune_a_tiny_model_in_4_bits(name, small_settings, tmp_path):
    base = make_base(tmp_path / "llama", tied=False, positions=4096)
    argv = [FINETUNE, "--config", str(ROOT / "recipes" / "configs" / f"{name}.yaml"), *SMALL, *ONE_SYSTEM]
    argv += ["--data_format", "synthetic", "--model_name_or_path", str(base), "--output_dir", str(tmp_path / "run")]
    argv += ["--retriever_config", str(small_settings.parent / "retriever_config.yaml")]
    argv += ["--index_config", str(small_settings.parent / "index_config.yaml")]
    argv += ["--max_steps", "1", "--eval_steps", "1", "--save_steps", "1", "--per_device_train_batch_size", "2"]
    argv += ["--dtype", "float32", "--bf16", "false", "--use_cpu", "true", "--validation_users", "8"]
    done = launch(argv)
    assert done.returncode == 0, done.stderr[-4000:]
    adapter = read_json(tmp_path / "run" / "model" / "adapter" / "adapter_config.json")
    assert (adapter["r"], adapter["lora_alpha"], sorted(adapter["target_modules"])) == (8, 32, ["q_proj", "v_proj"])
    assert sorted(adapter["trainable_token_indices"]) == ["embed_tokens", "lm_head"]
    history = read_json(tmp_path / "run" / "model" / "training.json")["history"]
    assert any("eval_ndcg@10" in entry for entry in history)


@pytest.mark.slow
@pytest.mark.data
def test_raw_amazon_files_become_a_model(shared, small_settings, tmp_path):
    folder = shared / "data" / "amazon_gift_cards_2018"
    argv = [FINETUNE, "--config", str(ROOT / "recipes" / "configs" / "gift_cards.yaml")]
    argv += ["--interactions", str(folder / "Gift_Cards_5.json.gz"), "--items", str(folder / "meta_Gift_Cards.json.gz")]
    argv += [
        "--output_dir",
        str(tmp_path / "run"),
        "--max_steps",
        "2",
        "--eval_strategy",
        "no",
        "--save_strategy",
        "no",
    ]
    argv += ["--load_best_model_at_end", "false", "--disable_tqdm", "true", *ONE_SYSTEM]
    argv += ["--retriever_config", str(small_settings.parent / "retriever_config.yaml"), "--num_candidates", "5"]
    argv += ["--index_config", str(small_settings.parent / "index_config.yaml"), "--train_positions", "1"]
    done = launch(argv)
    assert done.returncode == 0, done.stderr[-4000:]
    summary = read_json(tmp_path / "run" / "data" / "summary.json")
    assert (summary["users"], summary["items"], summary["interactions"]) == (453, 147, 2941)
    rows = read_json(tmp_path / "run" / "report" / "metrics.json")
    assert {row["users"] for row in rows if row["scope"] == "overall"} == {453}
