"""Prompt templates."""

import pytest
import yaml

from ulmrec_hf.tasks.records import FIELDS, TASKS
from ulmrec_hf.tasks.templates import PromptTemplates


def test_the_package_s_templates_render_every_task():
    templates = PromptTemplates.from_yaml()
    fields = {name: f"[{name}]" for name in FIELDS}
    for task in TASKS:
        prompt, completion = templates.render(task, **{name: fields[name] for name in TASKS[task].fields})
        assert prompt.startswith("### Task:\n") and prompt.endswith("### Answer:\n")
        assert completion in ("[letter]", "[preference]", "[user]", "[rating]")


def test_a_field_s_own_braces_are_not_read_as_a_template():
    prompt, completion = PromptTemplates.from_yaml().render(
        "index_to_preference", user="{preference}", preference="{x}"
    )
    assert "{preference}" in prompt
    assert completion == "{x}"


def _write(path, templates):
    path.write_text(yaml.safe_dump(templates), encoding="utf-8")
    return path


def _templates():
    return {task: {"prompt": "p\n", "completion": "c"} for task in TASKS}


def test_wrong_templates_are_refused_with_the_reason(tmp_path):
    path = tmp_path / "templates.yaml"
    with pytest.raises(ValueError, match=r"templates\.yaml do not exist"):
        PromptTemplates.from_yaml(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="not YAML in UTF-8"):
        PromptTemplates.from_yaml(path)
    path.write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="tasks None were given"):
        PromptTemplates.from_yaml(path)
    with pytest.raises(ValueError, match=r"tasks \['rating'\] were given"):
        PromptTemplates.from_yaml(_write(path, {"rating": {}}))
    with pytest.raises(ValueError, match="task rating needs exactly the keys prompt and completion"):
        PromptTemplates.from_yaml(_write(path, {**_templates(), "rating": {"prompt": "p"}}))
    with pytest.raises(ValueError, match="completion of task rating is 5; it must be text"):
        PromptTemplates.from_yaml(_write(path, {**_templates(), "rating": {"prompt": "p", "completion": 5}}))


def test_an_unknown_field_is_refused_by_its_name(tmp_path):
    broken = {**_templates(), "rating": {"prompt": "{colour}\n", "completion": "c"}}
    templates = PromptTemplates.from_yaml(_write(tmp_path / "t.yaml", broken))
    with pytest.raises(ValueError, match=r"task rating names the field \{colour\}.*it has user"):
        templates.render("rating", user="u")
