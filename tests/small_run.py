"""A small run of the main job for the tests of the recipes: its settings, and how it is launched."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from ulmrec_hf.systems import ABLATIONS

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = str(ROOT / "recipes" / "configs" / "quickstart.yaml")
# a world of 120 users, few steps: everything runs, nothing is learned well
SMALL = [
    "--synthetic_users", "120", "--k_core", "2", "--max_steps", "6", "--eval_steps", "3", "--save_steps", "3",
    "--logging_steps", "1", "--per_device_train_batch_size", "8", "--disable_tqdm", "true",
]  # fmt: skip


def small_config(folder: Path) -> Path:
    """A copy of the quickstart's settings with quicker earlier stages."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    stages = {
        "retriever_config": {"retriever": "lrurec", "hidden_size": 16, "epochs": 2, "patience": 1},
        "index_config": {"codebook_size": 16, "autoencoder_steps": 10, "steps": 20},
        "preference_config": {"num_phrases": 4},
    }
    config = yaml.safe_load(Path(QUICKSTART).read_text(encoding="utf-8"))
    for name, values in stages.items():
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        config[name] = str(path)
    config |= {"ablations": [*ABLATIONS], "anonymous_share": 0.2}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def load_recipe(name: str) -> ModuleType:
    """A script of `recipes/` as a module."""
    return load_script(ROOT / "recipes" / f"{name}.py")


def load_script(path: Path) -> ModuleType:
    """A Python file as a module, wherever it is."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment() -> dict[str, str]:
    """For child processes: this checkout, no network, one thread."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def launch(argv: list[str], *, launcher: tuple[str, ...] = (), timeout: float = 600) -> subprocess.CompletedProcess:
    """Runs a recipe in a process of its own."""
    command = [sys.executable, *launcher, *argv]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout)
