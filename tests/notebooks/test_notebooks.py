"""Every notebook runs from top to bottom."""

import os

import nbformat
import pytest
from nbclient import NotebookClient

from tests.small_run import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(path, monkeypatch, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not committed"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    # the run's folder goes to a copy of what the notebook needs, never into the checkout
    for name in ("recipes", "ulmrec_hf"):
        (tmp_path / name).symlink_to(ROOT / name)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 2
    assert os.path.isdir(tmp_path / "output" / "notebook" / "model" / "adapter")
