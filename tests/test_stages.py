import json
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from ulmrec_hf.files import publish_folder
from ulmrec_hf.stages import Processes, begin_stage, check_types, partial_folder, run_stage, stage_fingerprint

ROOT = Path(__file__).resolve().parents[1]
SETTINGS, INPUTS = {"rate": 0.1, "sizes": (1, 2)}, {"data": "abc"}


def writes(text):
    """A build that writes one file and counts its calls."""

    def build(folder):
        build.calls += 1
        (folder / "content.txt").write_text(text)

    build.calls = 0
    return build


def never(folder):
    raise AssertionError("built again")


@dataclass
class Settings:
    steps: int = 1
    rate: float = 0.5
    name: str | None = None
    quick: bool = False


def test_a_stage_is_built_once_and_is_up_to_date_afterwards(tmp_path, caplog):
    folder, build = tmp_path / "stage", writes("one")
    assert run_stage(folder, SETTINGS, INPUTS, build) == folder
    assert (folder / "content.txt").read_text() == "one" and not partial_folder(folder).exists()
    fingerprint = stage_fingerprint(folder)
    with caplog.at_level("INFO", logger="ulmrec_hf"):
        run_stage(folder, {"sizes": [1, 2], "rate": 0.1}, dict(INPUTS), never)  # as JSON they are equal
    assert f"{folder} is up to date" in caplog.text
    assert build.calls == 1 and stage_fingerprint(folder) == fingerprint


def test_other_settings_or_inputs_are_refused_by_name_and_leave_the_folder(tmp_path):
    folder = run_stage(tmp_path / "stage", SETTINGS, INPUTS, writes("one"))
    with pytest.raises(ValueError, match=r"rate was 0\.1, is 0\.2; data was \"abc\", is \"xyz\"\. .*--overwrite"):
        run_stage(folder, {**SETTINGS, "rate": 0.2}, {"data": "xyz"}, never)
    with pytest.raises(ValueError, match=r"new was null, is 1"):
        run_stage(folder, {**SETTINGS, "new": 1}, INPUTS, never)
    assert (folder / "content.txt").read_text() == "one"


def test_overwrite_rebuilds_what_changed_only(tmp_path):
    folder = run_stage(tmp_path / "stage", SETTINGS, INPUTS, writes("one"))
    run_stage(folder, SETTINGS, INPUTS, never, overwrite=True)
    old = stage_fingerprint(folder)
    run_stage(folder, {**SETTINGS, "rate": 0.2}, INPUTS, writes("two"), overwrite=True)
    assert (folder / "content.txt").read_text() == "two" and stage_fingerprint(folder) != old
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]


def test_a_failed_build_leaves_the_old_stage_and_no_partial(tmp_path):
    folder = run_stage(tmp_path / "stage", SETTINGS, INPUTS, writes("one"))
    old = stage_fingerprint(folder)

    def fails(partial):
        (partial / "content.txt").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run_stage(folder, {"rate": 2}, {}, fails, overwrite=True)
    assert (folder / "content.txt").read_text() == "one" and stage_fingerprint(folder) == old
    assert not partial_folder(folder).exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_kill_leaves_the_old_stage_and_only_resume_keeps_the_partial(tmp_path, resume):
    folder = run_stage(tmp_path / "stage", {"rate": 1}, {}, writes("old"))
    code = (
        "import os, signal, sys\n"
        "from ulmrec_hf.stages import run_stage\n"
        "def build(partial):\n"
        "    (partial / 'half.txt').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"run_stage(sys.argv[1], {{'rate': 2}}, {{}}, build, overwrite=True, resume={resume})\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert (folder / "content.txt").read_text() == "old"
    assert (partial_folder(folder) / "half.txt").is_file()

    run_stage(folder, {"rate": 2}, {}, writes("new"), overwrite=True, resume=resume)
    assert (folder / "content.txt").read_text() == "new"
    assert (folder / "half.txt").is_file() == resume
    assert not partial_folder(folder).exists()


def test_resume_keeps_the_partial_of_equal_settings_only(tmp_path):
    folder = tmp_path / "stage"

    def stops(partial):
        (partial / "checkpoint").write_text("3")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(folder, SETTINGS, INPUTS, stops, resume=True)
    begin_stage(folder, SETTINGS, INPUTS, resume=True)
    assert (partial_folder(folder) / "checkpoint").is_file()
    begin_stage(folder, {**SETTINGS, "rate": 0.2}, INPUTS, resume=True)
    assert not (partial_folder(folder) / "checkpoint").exists()


def test_a_damaged_record_is_named_or_in_a_partial_begun_anew(tmp_path, caplog):
    folder = tmp_path / "stage"
    begin_stage(folder, SETTINGS, INPUTS)
    (partial_folder(folder) / "stage.json").write_text("{")
    run_stage(folder, SETTINGS, INPUTS, writes("one"), resume=True)
    assert "stage.partial is begun anew" in caplog.text
    (folder / "stage.json").write_text('{"settings": {}}')
    with pytest.raises(ValueError, match="is damaged: remove the folder"):
        run_stage(folder, SETTINGS, INPUTS, never)


def test_a_folder_without_a_record_is_no_finished_stage(tmp_path):
    with pytest.raises(ValueError, match=r"is not a finished stage: stage\.json is missing.*earlier stage first"):
        stage_fingerprint(tmp_path)


def test_of_several_processes_one_writes_and_none_begins_before_all_have_looked(tmp_path):
    folder, barrier, seen = tmp_path / "stage", threading.Barrier(3), []

    def build(partial):
        seen.append(json.loads((partial / "stage.json").read_text())["settings"])
        (partial / f"{threading.current_thread().name}.txt").touch()

    def process(is_main):
        run_stage(folder, {"rate": 1}, {}, build, processes=Processes(is_main, barrier.wait))

    threads = [threading.Thread(target=process, args=[rank == 0], name=str(rank)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen == [{"rate": 1}] * 3
    assert {path.name for path in folder.iterdir()} == {"stage.json", "0.txt", "1.txt", "2.txt"}


def test_publish_folder_replaces_the_old_one(tmp_path):
    folder, partial = tmp_path / "stage", tmp_path / "stage.partial"
    for text in ("one", "two"):
        (tmp_path / "stage.old").mkdir(exist_ok=True)  # as a kill may leave it
        partial.mkdir()
        (partial / "content.txt").write_text(text)
        publish_folder(partial, folder)
        assert [path.name for path in tmp_path.iterdir()] == ["stage"]
        assert (folder / "content.txt").read_text() == text


def test_settings_of_another_type_are_named():
    check_types(Settings(steps=3, rate=1, name="x", quick=True))
    for given, message in (
        ({"steps": 1.5}, "steps is 1.5; it must be a whole number"),
        ({"steps": True}, "steps is True; it must be a whole number"),
        ({"rate": "1e-3"}, "rate is '1e-3'; it must be a number"),
        ({"name": 3}, "name is 3; it must be text"),
        ({"quick": "no"}, "quick is 'no'; it must be true or false"),
        ({"steps": None}, "steps is None; it must be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            check_types(Settings(**given))
