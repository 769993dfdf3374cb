"""Prompt templates, and what keeps strangers' text from becoming part of the prompt's machinery."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml

from .verbalizer import LETTERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .user_index import UserIndex

TASKS = (
    "next_item",
    "index_to_preference",
    "preference_to_index",
    "history_to_index",
    "rating",
    "intent_next_item",
)
RANKING_TASKS = ("next_item", "intent_next_item")
NONE = "(none)"
USER_TOKENS = re.compile(r"(?:<[a-z]_\d+>)+")

# Every character that a tokenizer's normalizer (NFKC) may fold back into markup, and two that spell user tokens.
_LOOKALIKES = str.maketrans("＜＞﹤﹥｜＃﹟［］﹇﹈＿／", "<><>|##[][]_/")
# Control, zero-width and direction characters, some of which a normalizer drops, so that markup closes up again.
_INVISIBLE = re.compile(
    "[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]+"
)
_MARKUP = re.compile(r"<(?=[^\s<>]+>)|\[(?=/?[A-Z_]+\])|#(?=#)")
_FIELD = re.compile(r"\{([a-z_]+)\}")


def neutralise(text: str, reserved: Iterable[str] = ()) -> str:
    """Makes text from users or items harmless as prompt text: one line, no control token, no section header.

    A space is put into whatever a tokenizer could read as a control token (`<a_3>`, `</s>`, `<|im_start|>`, `[INST]`)
    or a reader as a section header (`### Response:`); the words stay readable.

    Args:
        text: a title, a review or a preference.
        reserved: further strings to break up, such as all added tokens of the tokenizer in use.
    """
    text = " ".join(_INVISIBLE.sub(" ", text.translate(_LOOKALIKES)).split())
    text = _MARKUP.sub(lambda match: match.group() + " ", text)
    for token in reserved:
        cut = len(token) - len(token.lstrip()) + 1  # behind its first visible character
        # again and again, for a token such as "aa" occurs anew in what a first pass makes of "aaa"
        while len(token.strip()) > 1 and token in text:
            text = text.replace(token, token[:cut] + " " + token[cut:])
    return text


def reserved_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The tokenizer's added and special tokens that `neutralise` would not break up by its general rules alone."""
    added = {*(str(token) for token in tokenizer.added_tokens_decoder.values()), *tokenizer.all_special_tokens}
    return sorted(token for token in added if token in neutralise(token))


def clean_titles(
    titles: Sequence[str | None],
    tokenizer: "PreTrainedTokenizerBase",
    max_tokens: int,
    reserved: Iterable[str] | None = None,
) -> list[str]:
    """Titles as a prompt shows them: neutralised, cut to `max_tokens` tokens, `(none)` where nothing is left.

    Args:
        reserved: what `reserved_tokens(tokenizer)` returned, where many titles are cleaned in parts.
    """
    if not titles:
        return []
    reserved = reserved_tokens(tokenizer) if reserved is None else reserved
    texts = [neutralise(title or "", reserved) or NONE for title in titles]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        # where the first dropped token begins: a character that is several tokens goes as a whole
        text[: offsets[max_tokens][0]].rstrip() or NONE if len(offsets) > max_tokens else text
        for text, offsets in zip(texts, encoded["offset_mapping"], strict=True)
    ]


def spell_user(user_index: "UserIndex", user_id: str, reserved: Iterable[str] = ()) -> str:
    """A user's index as prompts and completions show it: user tokens, or neutralised text, for an id may be anything.

    Raises:
        KeyError: the map does not hold the user.
    """
    text = user_index.spell(user_id)
    return text if user_index.kind == "codes" else neutralise(text, reserved) or NONE


def check_spellings(user_index: "UserIndex", tokenizer: "PreTrainedTokenizerBase", reserved: Sequence[str]) -> None:
    """Raises ValueError, naming both, where two users are the same to a model; codes and numbers never are.

    Args:
        user_index: of the kind `id`; any other passes.
        tokenizer: tokens are compared, since its normalizer may fold what differs as text.
        reserved: what `reserved_tokens(tokenizer)` returned.
    """
    seen: dict[bytes, str] = {}
    user_ids = user_index.user_ids if user_index.kind == "id" else []
    for begin in range(0, len(user_ids), 1000):
        part = user_ids[begin : begin + 1000]
        texts = [neutralise(user_id, reserved) or NONE for user_id in part]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for user_id, text, ids in zip(part, texts, encoded, strict=True):
            first = seen.setdefault(np.array(ids, np.int32).tobytes(), user_id)
            if first != user_id:
                raise ValueError(
                    f"index_kind is id, but the users {first!r} and {user_id!r} are both spelled {text!r} in a prompt: "
                    "rename one of them, or choose another index_kind."
                )


def render_history(titles: Sequence[str], ratings: Sequence[str] | None = None) -> str:
    """One line an item, oldest first: `- title`, or `- title: rating` where ratings are given; `(none)` if empty."""
    if not titles:
        return NONE
    if ratings is None:
        return "\n".join(f"- {title}" for title in titles)
    return "\n".join(f"- {title}: {rating}" for title, rating in zip(titles, ratings, strict=True))


def render_candidates(titles: Sequence[str]) -> str:
    """One line a candidate: `A. title`, `B. title`, ...

    Raises:
        ValueError: there are more candidates than letters (52).
    """
    if len(titles) > len(LETTERS):
        raise ValueError(f"{len(titles)} candidates, but only {len(LETTERS)} letters (A-Z, a-z): lower num_candidates.")
    return "\n".join(f"{letter}. {title}" for letter, title in zip(LETTERS, titles, strict=False))


class PromptTemplates:
    """The prompt and completion of each of the six tasks, read from a YAML file.

    Raises:
        ValueError: a task is missing or unknown, or a template names no field that it should, with the task's name.
    """

    def __init__(self, templates: Mapping[str, Mapping[str, str]], source: str = "templates"):
        if not isinstance(templates, Mapping) or set(templates) != set(TASKS):
            given = sorted(map(str, templates)) if isinstance(templates, Mapping) else templates
            raise ValueError(
                f"{source}: tasks {given} were given, {sorted(TASKS)} are needed, each with prompt and completion."
            )
        for task, template in templates.items():
            if not isinstance(template, Mapping) or set(template) != {"prompt", "completion"}:
                raise ValueError(f"{source}: task {task} needs exactly the keys prompt and completion.")
            for part, text in template.items():
                if not isinstance(text, str):
                    raise ValueError(
                        f"{source}: {part} of task {task} is {text!r}; it must be text, so put it in quotes."
                    )
        self._templates = {task: (template["prompt"], template["completion"]) for task, template in templates.items()}

    @classmethod
    def from_yaml(cls, path: str | os.PathLike | None = None) -> "PromptTemplates":
        """Reads templates from a file; the package's own without a path."""
        source = resources.files("ulmrec_hf.tasks") / "templates" / "default.yaml" if path is None else Path(path)
        if not source.is_file():
            raise ValueError(f"Prompt templates {source} do not exist; check the setting prompt_templates.")
        try:
            templates = yaml.safe_load(source.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"Prompt templates {source} are not YAML in UTF-8: {error}") from None
        return cls(templates, str(source))

    def render(self, task: str, **fields: str) -> tuple[str, str]:
        """Fills one task's template and returns (prompt, completion).

        Fields are put in as they are: titles and preferences must have passed `neutralise` before. A field's own text
        is never read as a template.

        Raises:
            ValueError: the template names a field that was not given.
        """
        prompt, completion = self._templates[task]
        return self._fill(task, prompt, fields), self._fill(task, completion, fields)

    @staticmethod
    def _fill(task: str, template: str, fields: Mapping[str, str]) -> str:
        def value(match: re.Match) -> str:
            if match.group(1) not in fields:
                raise ValueError(
                    f"The template of task {task} names the field {match.group()}, which that task does not have; "
                    f"it has {', '.join(sorted(fields))}."
                )
            return fields[match.group(1)]

        return _FIELD.sub(value, template)
