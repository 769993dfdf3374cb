"""Prompt templates: a prompt and a completion for each task."""

import os
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import yaml

from ..files import write_text
from .records import TASKS

_FIELD = re.compile(r"\{([a-z_]+)\}")


class PromptTemplates:
    """The prompt and completion of every task.

    Args:
        templates: prompt and completion by task. The built-in tasks must be there; any other registered task may be
            left out and then has its record's own template.
        source: named in errors.

    Raises:
        ValueError: a task is missing or unknown, or its template is not a prompt and a completion; the task is named.
    """

    def __init__(self, templates: Mapping[str, Mapping[str, str]], source: str = "templates"):
        own = {
            name: {"prompt": task.prompt, "completion": task.completion}
            for name, task in TASKS.items()
            if task.prompt is not None
        }
        needed = set(TASKS) - set(own)
        if not isinstance(templates, Mapping) or not needed <= set(templates) <= set(TASKS):
            given = sorted(map(str, templates)) if isinstance(templates, Mapping) else templates
            optional = f" and {sorted(own)} possible" if own else ""
            raise ValueError(
                f"{source}: tasks {given} were given, {sorted(needed)} are needed{optional}, each with prompt and "
                "completion."
            )
        for task, template in templates.items():
            if not isinstance(template, Mapping) or set(template) != {"prompt", "completion"}:
                raise ValueError(f"{source}: task {task} needs exactly the keys prompt and completion.")
            for part, text in template.items():
                if not isinstance(text, str):
                    raise ValueError(
                        f"{source}: {part} of task {task} is {text!r}; it must be text, so put it in quotes."
                    )
        self.templates = own | {task: dict(template) for task, template in templates.items()}

    @classmethod
    def from_yaml(cls, path: str | os.PathLike | None = None) -> "PromptTemplates":
        """Reads templates from a file; the package's own without a path.

        Raises:
            ValueError: there is no such file, it is no YAML, or it holds no templates.
        """
        source = resources.files("ulmrec_hf.tasks") / "default_templates.yaml" if path is None else Path(path)
        if not source.is_file():
            raise ValueError(f"Prompt templates {source} do not exist; check the setting prompt_templates.")
        try:
            templates = yaml.safe_load(source.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"Prompt templates {source} are not YAML in UTF-8: {error}") from None
        return cls(templates, str(source))

    def to_yaml(self, path: str | os.PathLike) -> None:
        """Writes what `from_yaml` reads."""
        write_text(path, yaml.safe_dump(self.templates, sort_keys=False, allow_unicode=True))

    def render(self, task: str, **fields: str) -> tuple[str, str]:
        """Fills one task's template and returns (prompt, completion); a field's own text is never read as a template.

        Fields are inserted as they are: titles and preferences must have passed `neutralise` before.

        Raises:
            ValueError: the template names a field that was not given.
        """

        def value(match: re.Match) -> str:
            if match.group(1) not in fields:
                raise ValueError(
                    f"The template of task {task} names the field {match.group()}, which that task does not have; "
                    f"it has {', '.join(sorted(fields))}."
                )
            return fields[match.group(1)]

        template = self.templates[task]
        return _FIELD.sub(value, template["prompt"]), _FIELD.sub(value, template["completion"])
