"""What all tests share: no network, few threads, the real data where it lies."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data, from ULMREC_SHARED or beside the checkout."""
    folder = Path(os.environ.get("ULMREC_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"real data not found: {folder}/data (set ULMREC_SHARED)")
    return folder
