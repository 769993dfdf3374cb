"""Tasks as records, and a task from outside of the package."""

import pytest
from datasets import load_dataset

from tests.tasks.world import USERS, task_args
from ulmrec_hf.tasks.arguments import TaskArguments
from ulmrec_hf.tasks.dataset import AlignmentTasks, write_tasks
from ulmrec_hf.tasks.records import MIXTURE_SEED, TASKS, Task
from ulmrec_hf.tasks.templates import PromptTemplates


def test_a_seventh_task_is_one_record_with_its_template(monkeypatch, world, rows, tokenizer, tmp_path):
    monkeypatch.setattr(TASKS, "_entries", dict(TASKS))
    mixture = {"next_item": 1.0, "rating": 0.5}
    before = world.rows(tokenizer, mixture=mixture)
    six = {name: list(before.rows(name, "train")) for name in (*TASKS, "mixture")}

    TASKS.register("next_title")(
        Task("next_title", ("user", "title"), evaluated=True, prompt="{user} buys:\n", completion="{title}")
    )
    data = (world.data, world.candidates, world.preferences, world.users, tokenizer)
    tasks = AlignmentTasks(*data, task_args(mixture={**mixture, "next_title": 2.0}))
    row = tasks["next_title"]["test"][3]
    assert (row["prompt"], row["completion"]) == ("<a_0><b_3><c_3><d_7> buys:\n", f"thing {world.items(3)[-1]}")
    number = tasks["mixture"]["train"].features["task"].str2int("next_title")
    assert tasks["mixture"]["train"]["task"][:].count(number) == 2 * len(tasks["next_title"]["train"]) == 4 * USERS

    after = world.rows(tokenizer, mixture=mixture)
    write_tasks(after, tmp_path)
    assert len(load_dataset(str(tmp_path), "next_title", cache_dir=str(tmp_path / "cache"))["validation"]) == USERS
    assert "| next_title | 12 | 6 | 6 | 0 |" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert {name: list(after.rows(name, "train")) for name in six} == six
    assert TaskArguments().mixture == dict.fromkeys(TASKS, 1.0)
    given = {name: template for name, template in PromptTemplates.from_yaml().templates.items() if name in six}
    assert PromptTemplates(given).render("next_title", user="u", title="t") == ("u buys:\n", "t")


def test_the_six_keep_their_seeds_and_others_have_their_own():
    assert [task.seed for task in TASKS.values()] == [0, 1, 2, 3, 4, 5]
    one, other = Task("one", ("user",)), Task("other", ("user",))
    assert one.seed == 2053932785 + MIXTURE_SEED + 1 != other.seed > MIXTURE_SEED


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "mixture"}, "The task name 'mixture' cannot be used"),
        ({"name": "a/b"}, "The task name 'a/b' cannot be used"),
        ({"fields": ("colour",), "evaluated": True}, "Task t has the fields .*colour.* evaluated, it may have"),
        ({"fields": ("letter",)}, "as it is not evaluated, it may have .*history"),
        ({"requires": "rating"}, "Task t requires 'rating'"),
        ({"prompt": "{user}"}, "needs both prompt and completion"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Task(**{"name": "t", "fields": ("user",), **settings})
