"""The tasks as datasets: files, their card, and the same in memory."""

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from tests.tasks.world import USERS, make_world, task_args
from ulmrec_hf.tasks.dataset import AlignmentTasks, ULMRecTasks, features, write_tasks
from ulmrec_hf.tasks.records import MIXTURE, TASKS

CONFIGS = [*TASKS, MIXTURE]

SHARES = {"next_item": 2.0, "rating": 0.5, "index_to_preference": 1.0}


@pytest.fixture(scope="module")
def written(world, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return folder, write_tasks(world.rows(tokenizer, mixture=SHARES), folder)


def _bytes(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_written_files_are_the_promised_ones(written):
    folder, counts = written
    expected = {"README.md"}
    for name in CONFIGS:
        evaluated = name in ("next_item", "intent_next_item", "rating", "mixture")
        for split in ("train", "validation", "test") if evaluated else ("train",):
            expected.add(f"{name}/{split}-00000-of-00001.parquet")
    assert set(_bytes(folder)) == expected
    assert counts["next_item"] == {"train": 2 * USERS, "validation": USERS, "test": USERS}
    assert counts["index_to_preference"] == {"train": USERS}
    assert counts["mixture"] == {"train": 4 * USERS + USERS + USERS, "validation": USERS, "test": USERS}


def test_load_dataset_gives_the_rendered_rows(written, rows, tmp_path):
    folder, _ = written
    for name in TASKS:
        loaded = load_dataset(str(folder), name, cache_dir=str(tmp_path))
        for split, dataset in loaded.items():
            assert dataset.features == features(TASKS)
            plain = [{**row, "task": CONFIGS[row["task"]]} for row in dataset]
            assert plain == list(rows.rows(name, split))


def test_load_dataset_needs_no_package_of_ours(written, tmp_path):
    folder, _ = written
    code = (
        "import sys; sys.modules['ulmrec_hf'] = None\n"
        "import json, datasets\n"
        f"data = datasets.load_dataset({str(folder)!r}, 'next_item', cache_dir={str(tmp_path)!r})\n"
        f"names = sorted(datasets.get_dataset_config_names({str(folder)!r}))\n"
        "print(json.dumps([{k: len(v) for k, v in data.items()}, names]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    counts, names = json.loads(done.stdout.splitlines()[-1])
    assert counts == {"train": 2 * USERS, "validation": USERS, "test": USERS}
    assert names == sorted(CONFIGS)


def test_the_mixture_holds_each_task_at_its_proportion(written):
    folder, _ = written
    mixture = pq.read_table(folder / "mixture" / "train-00000-of-00001.parquet").to_pylist()
    by_task = {task: [row for row in mixture if row["task"] == CONFIGS.index(task)] for task in TASKS}
    assert {task: len(rows) for task, rows in by_task.items() if rows} == {
        "next_item": 4 * USERS,
        "rating": USERS,
        "index_to_preference": USERS,
    }
    prompts = [row["prompt"] for row in by_task["next_item"]]
    assert sorted(prompts) == sorted(2 * list(dict.fromkeys(prompts)))
    assert len({row["prompt"] for row in by_task["rating"]}) == USERS  # half of the rows, each once
    assert [row["task"] for row in mixture] != sorted(row["task"] for row in mixture)
    assert (
        _bytes(folder)["mixture/test-00000-of-00001.parquet"] == _bytes(folder)["next_item/test-00000-of-00001.parquet"]
    )


def test_the_card_says_what_is_in_the_data(written):
    card = (written[0] / "README.md").read_text(encoding="utf-8")
    assert "| next_item | 12 | 6 | 6 | 2 |" in card
    assert "| preference_to_index | 6 | - | - | 0 |" in card
    assert "of which 2 (share 0.5) from the retriever" in card
    assert str(written[0]) not in card


def test_equal_input_gives_equal_bytes_and_the_seed_matters(written, world, tokenizer, tmp_path):
    write_tasks(world.rows(tokenizer, mixture=SHARES), tmp_path / "a")
    write_tasks(world.rows(tokenizer, mixture=SHARES, task_seed=2), tmp_path / "b")
    assert _bytes(tmp_path / "a") == _bytes(written[0])
    assert (
        _bytes(tmp_path / "b")["next_item/train-00000-of-00001.parquet"]
        != (_bytes(written[0])["next_item/train-00000-of-00001.parquet"])
    )


def test_more_users_change_no_row(rows, tokenizer):
    more = make_world(users=USERS + 3).rows(tokenizer)
    for task in TASKS:
        for split in ("train", "validation", "test"):
            few = list(rows.rows(task, split))
            assert [row for row in more.rows(task, split) if row["user"] < USERS] == few


def test_other_test_items_change_no_train_or_validation_byte(tokenizer, tmp_path):
    write_tasks(make_world().rows(tokenizer), tmp_path / "a")
    write_tasks(make_world(held_out=(0, 1)).rows(tokenizer), tmp_path / "b")
    first, second = _bytes(tmp_path / "a"), _bytes(tmp_path / "b")
    for name in first:
        if "/test-" not in name and name != "README.md":  # the card holds a hash of all rows
            assert first[name] == second[name], name
    assert first["next_item/test-00000-of-00001.parquet"] != second["next_item/test-00000-of-00001.parquet"]


def test_other_validation_items_change_no_train_byte(tokenizer, tmp_path):
    write_tasks(make_world().rows(tokenizer), tmp_path / "a")
    write_tasks(make_world(held_out=(2, 1)).rows(tokenizer), tmp_path / "b")
    first, second = _bytes(tmp_path / "a"), _bytes(tmp_path / "b")
    for name in first:
        if "/train-" in name:
            assert first[name] == second[name], name
    assert first["next_item/validation-00000-of-00001.parquet"] != second["next_item/validation-00000-of-00001.parquet"]


def test_the_builder_alone(rows, tmp_path):
    builder = ULMRecTasks(config_name="rating", rows=rows, config_id="rating-test", cache_dir=str(tmp_path))
    builder.download_and_prepare()
    assert len(builder.as_dataset("train")) == 2 * USERS
    with pytest.raises(ValueError, match=r"config is 'nothing'; it must be one of next_item, .*, mixture"):
        ULMRecTasks(config_name="nothing", rows=rows, config_id="x", cache_dir=str(tmp_path))


def test_two_folders_of_one_name_are_not_taken_for_each_other(world, tokenizer, tmp_path):
    """The cache of datasets knows a folder by its name and the YAML of its card."""
    for run, seed in (("one", 1), ("two", 2)):
        write_tasks(world.rows(tokenizer, task_seed=seed), tmp_path / run / "tasks")
    one, two = (
        load_dataset(str(tmp_path / run / "tasks"), "next_item", split="train", cache_dir=str(tmp_path / "cache"))
        for run in ("one", "two")
    )
    assert one["prompt"][:] != two["prompt"][:]


# ---------------------------------------------------------------- in memory


class _Retriever:
    """Gives the world's candidates, and remembers what it was asked."""

    def __init__(self, world):
        self.world, self.asked = world, []

    def candidates(self, data, k, train_positions):
        self.asked.append((data, k, train_positions))
        return self.world.candidates


def test_in_memory_the_rows_are_those_of_the_files(written, world, tokenizer, tmp_path):
    args = task_args(mixture=SHARES)
    tasks = AlignmentTasks(world.data, world.candidates, world.preferences, world.users, tokenizer, args)
    assert list(tasks) == CONFIGS and len(tasks) == 7 and "mixture" in tasks and "nothing" not in tasks
    for name in tasks:
        loaded = load_dataset(str(written[0]), name, cache_dir=str(tmp_path))
        assert {split: list(rows) for split, rows in tasks[name].items()} == {
            split: list(rows) for split, rows in loaded.items()
        }
        assert all(rows.features == loaded[split].features for split, rows in tasks[name].items())
    assert tasks["mixture"] is tasks["mixture"]
    with pytest.raises(KeyError, match="There is no config 'nothing', only next_item"):
        tasks["nothing"]


def test_a_retriever_is_asked_for_what_the_rows_show(world, tokenizer):
    retriever = _Retriever(world)
    settings = {"num_candidates": 4, "train_positions": 1, "prompt_templates": None}
    tasks = AlignmentTasks(
        world.data, retriever, world.preferences, None, tokenizer, task_args(max_history=1), **settings
    )
    assert retriever.asked == [(world.data, 4, 1)]
    assert (tasks.args.num_candidates, tasks.args.max_history) == (4, 1)
    assert (tasks.data, tasks.users, tasks.tokenizer) == (world.data, None, tokenizer)
    assert len(tasks["next_item"]["train"]) == USERS and len(tasks["next_item"]["test"][0]["candidates"]) == 4
    assert tasks.templates.render("rating", user="", preference="", history="", rating="5")[1] == "5"


def test_a_source_without_ratings_has_empty_rating_splits(tokenizer, tmp_path):
    rows = make_world(ratings=[[None] * (7 + user % 3) for user in range(USERS)]).rows(tokenizer)
    counts = write_tasks(rows, tmp_path, ["rating", "next_item"])
    assert counts["rating"] == {"train": 0, "validation": 0, "test": 0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "next_item", "rating"]
    assert "config_name: mixture" not in (tmp_path / "README.md").read_text(encoding="utf-8")
