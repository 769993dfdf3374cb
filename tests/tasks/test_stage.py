"""The stage of the tasks."""

from dataclasses import replace

import pytest

from tests.tasks.world import task_args
from ulmrec_hf.files import write_table
from ulmrec_hf.tasks.dataset import write_tasks
from ulmrec_hf.tasks.stage import TaskSources, write_task_stage

INPUTS = {"data": "fingerprint"}


@pytest.fixture
def sources(world, tokenizer, tmp_path) -> TaskSources:
    for name, table in (("candidates", world.candidates), ("preferences", world.preferences)):
        write_table(tmp_path / ("retriever" if name == "candidates" else name) / f"{name}.parquet", table)
    return TaskSources.of_run(tmp_path, world.data, world.users, tokenizer)


def _files(folder):
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != "stage.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_the_stage_holds_the_written_tasks_and_is_made_once(sources, rows, tmp_path):
    folder = write_task_stage(task_args(), tmp_path / "tasks", sources, INPUTS)
    write_tasks(rows, tmp_path / "written")
    assert _files(folder) == _files(tmp_path / "written")

    def read_again():
        raise AssertionError

    assert write_task_stage(task_args(), folder, replace(sources, candidates=read_again), INPUTS) == folder


def test_only_some_configs_are_written(sources, tmp_path):
    folder = write_task_stage(task_args(max_history=0), tmp_path / "tasks", sources, INPUTS, configs=["next_item"])
    names = [f"next_item/{split}-00000-of-00001.parquet" for split in ("test", "train", "validation")]
    assert sorted(_files(folder)) == ["README.md", *names]


def test_other_settings_and_inputs_are_refused_by_name(sources, tmp_path):
    folder = write_task_stage(task_args(), tmp_path / "tasks", sources, INPUTS, configs=["rating"])
    templates = tmp_path / "templates.yaml"
    given = sources.rows(task_args()).templates.templates
    templates.write_text(str({**given, "rating": {"prompt": "{user}\n", "completion": "{rating}"}}))
    for args, inputs, configs, message in (
        (task_args(max_history=3), INPUTS, ["rating"], "max_history was 4, is 3"),
        (task_args(), {"data": "other"}, ["rating"], 'data was "fingerprint", is "other"'),
        (task_args(), INPUTS, None, r'configs was \["rating"\], is null'),
        (task_args(prompt_templates=str(templates)), INPUTS, ["rating"], "prompt_templates was"),
    ):
        with pytest.raises(ValueError, match=message):
            write_task_stage(args, folder, sources, inputs, configs=configs)
    before = _files(folder)
    args = task_args(prompt_templates=str(templates))
    write_task_stage(args, folder, sources, INPUTS, configs=["rating"], overwrite=True)
    assert _files(folder) != before
    with pytest.raises(ValueError, match="config is 'nothing'"):
        write_task_stage(task_args(), tmp_path / "other", sources, INPUTS, configs=["nothing"])
    with pytest.raises(ValueError, match=r"run recipes/train_retriever\.py first"):
        elsewhere = TaskSources.of_run(tmp_path / "elsewhere", sources.data, sources.user_index, sources.tokenizer)
        write_task_stage(task_args(), tmp_path / "other", elsewhere, INPUTS)
    assert not (tmp_path / "other").exists()
