"""What all tests share: no network, few threads, the real data where it lies."""

import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from tests.small_run import ROOT, SMALL, launch, small_config


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data, from ULMREC_SHARED or beside the checkout."""
    folder = Path(os.environ.get("ULMREC_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"real data not found: {folder}/data (set ULMREC_SHARED)")
    return folder


@pytest.fixture(scope="session")
def small_settings(tmp_path_factory) -> Path:
    """The YAML of a small run."""
    return small_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="session")
def run_folder(small_settings, tmp_path_factory) -> Path:
    """DIR after `finetune.py` with all ablations."""
    folder = tmp_path_factory.mktemp("run") / "quickstart"
    script = str(ROOT / "recipes" / "finetune.py")
    done = launch([script, "--config", str(small_settings), "--output_dir", str(folder), *SMALL])
    assert done.returncode == 0, done.stderr[-4000:]
    (folder / "stdout.txt").write_text(done.stdout, encoding="utf-8")
    return folder


@pytest.fixture
def prepared(run_folder, tmp_path) -> Path:
    """A folder in which only the tuning and the report are still to do."""
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder, ignore=shutil.ignore_patterns("model", "ablations", "report", "stdout.txt"))
    return folder
