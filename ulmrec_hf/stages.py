"""A stage: a folder that remembers the settings and inputs it was made from, so that it is made only once."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, get_args

from .files import hash_value, publish_folder, write_json

logger = logging.getLogger(__name__)
RECORD = "stage.json"


@dataclass(frozen=True)
class Processes:
    """The processes that build a stage together; by default one alone.

    Args:
        is_main: whether this process writes; of several processes, one.
        wait: returns when all processes have called it.
    """

    is_main: bool = True
    wait: Callable[[], None] = lambda: None


ALONE = Processes()


def stage_fingerprint(folder: str | os.PathLike) -> str:
    """The fingerprint of a finished stage: a hash of its settings and inputs, for the `inputs` of later stages.

    Raises:
        ValueError: the folder is not a finished stage.
    """
    record = Path(folder) / RECORD
    if not record.is_file():
        raise ValueError(f"{folder} is not a finished stage: {RECORD} is missing there. Run the earlier stage first.")
    return _read_record(record)["fingerprint"]


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field as `transformers.HfArgumentParser` reads it; `metadata` may hold `choices`."""
    return field(default=default, metadata={"help": help, **metadata})


def with_settings(settings: Any, changes: Mapping[str, Any]) -> Any:
    """The dataclass `settings` with some fields changed.

    Raises:
        ValueError: there is no such field; the message names similar ones. Or a value cannot be used.
    """
    known = [each.name for each in fields(settings)]
    for name in changes:
        if name not in known:
            similar = get_close_matches(name, known)
            hint = f"did you mean {', '.join(similar)}?" if similar else f"there are {', '.join(known)}."
            raise ValueError(f"there is no setting {name!r}: {hint}")
    return replace(settings, **changes)


def check_types(settings: Any) -> None:
    """Checks a dataclass's fields of type int, float, bool or str, or one of these or None, against what YAML gave.

    Raises:
        ValueError: a value of another type; the message names the setting.
    """
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    for each in fields(settings):
        value = getattr(settings, each.name)
        if value is None and each.default is None:  # a parser may have taken `str | None` for str
            continue
        kinds = get_args(each.type) if isinstance(each.type, UnionType) else [each.type]
        kind = next((kind for kind in kinds if kind in words), None)
        if kind and type(value) not in ((int, float) if kind is float else (kind,)):
            raise ValueError(f"{each.name} is {value!r}; it must be {words[kind]}.")


def stage_is_current(
    folder: str | os.PathLike, settings: Mapping[str, Any], inputs: Mapping[str, str], *, overwrite: bool = False
) -> bool:
    """Whether `folder` already holds this very stage.

    Raises:
        ValueError: it holds the stage of another run, and `overwrite` is off; the message names what differs.
    """
    record = Path(folder) / RECORD
    if not record.is_file():
        return False
    old, new = _read_record(record), _record(settings, inputs)
    if old["fingerprint"] == new["fingerprint"]:
        return True
    if overwrite:
        return False
    changes = [change for part in ("settings", "inputs") for change in differences(old[part], new[part])]
    raise ValueError(
        f"{folder} was made with other settings: {'; '.join(changes)}. "
        "Choose another output_dir, or pass --overwrite to run again what changed."
    )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed from one JSON-able record to another, for messages."""
    return [
        f"{name} was {json.dumps(old.get(name))}, is {json.dumps(new.get(name))}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def run_stage(
    folder: str | os.PathLike,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    build: Callable[[Path], None],
    *,
    overwrite: bool = False,
    resume: bool = False,
    processes: Processes = ALONE,
) -> Path:
    """Runs `build(partial_folder)` unless `folder` already holds this very stage; returns `folder`.

    Args:
        folder: of the finished stage.
        settings: JSON-able settings that decide the stage's content.
        inputs: fingerprints or file hashes of what it reads.
        build: fills the folder it is given; where it raises, the old folder is untouched.
        overwrite: rebuild a stage that has other settings or inputs instead of refusing.
        resume: keep what a killed attempt with the same settings left in the partial folder.
        processes: those that call this together, each with the same arguments.

    Raises:
        ValueError: the folder holds the stage of another run (see `stage_is_current`).
    """
    folder = Path(folder)
    if stage_is_current(folder, settings, inputs, overwrite=overwrite):
        logger.info("%s is up to date", folder)
        return folder
    processes.wait()  # no process may write before all have looked
    if processes.is_main:
        begin_stage(folder, settings, inputs, resume=resume)
    processes.wait()
    partial = partial_folder(folder)
    try:
        build(partial)
    except BaseException:
        if processes.is_main and not resume:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    processes.wait()
    if processes.is_main:
        publish_folder(partial, folder)
    processes.wait()
    return folder


def begin_stage(
    folder: str | os.PathLike, settings: Mapping[str, Any], inputs: Mapping[str, str], *, resume: bool = False
) -> None:
    """Makes the `partial_folder` that `run_stage` fills; see there for the arguments."""
    partial = partial_folder(Path(folder))
    record = _record(settings, inputs)
    try:
        begun = _read_record(partial / RECORD) if (partial / RECORD).is_file() else None
    except ValueError as error:
        logger.warning("%s is begun anew: %s", partial, error)
        begun = None
    if not resume or begun != record:
        shutil.rmtree(partial, ignore_errors=True)  # its content belongs to other settings
        partial.mkdir(parents=True)
        write_json(partial / RECORD, record)


def partial_folder(folder: Path) -> Path:
    """Where a stage is made before it stands in `folder`."""
    return folder.with_name(folder.name + ".partial")


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if {"fingerprint", "settings", "inputs"} <= set(record):
            return record
    except (ValueError, TypeError):
        pass
    raise ValueError(f"{path} is damaged: remove the folder {path.parent} and run again.")


def _record(settings: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    # through JSON once, so that tuples and lists, or paths and strings, compare equal
    plain = json.loads(json.dumps({"settings": dict(settings), "inputs": dict(inputs)}, default=str))
    return {**plain, "fingerprint": hash_value(plain)}
