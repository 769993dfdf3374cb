"""Every notebook runs from top to bottom, where it lies and elsewhere, and shows what its text announces."""

import re

import nbformat
import pytest
from nbclient import NotebookClient

from tests.small_run import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.fixture(scope="module")
def run_notebook(tmp_path_factory):
    """Runs a notebook, once, in an empty folder; returns the outputs under each of its headings."""
    done = {}

    def run(path):
        if path not in done:
            notebook = nbformat.read(path, as_version=4)
            assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not committed"
            folder = tmp_path_factory.mktemp("notebook")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PYTHONPATH", str(ROOT))
                patch.setenv("PYTHONWARNINGS", "ignore")
                NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
            assert not list(folder.iterdir()), "a notebook leaves nothing behind"
            done[path] = sections(notebook)
        return done[path]

    return run


def sections(notebook) -> dict[str, list]:
    found, heading = {}, ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = next(iter(re.findall(r"^#+ (.*)$", cell.source, flags=re.M)), heading)
        found.setdefault(heading, []).extend(cell.get("outputs", []))
    return found


def text(outputs: list) -> str:
    """What the outputs of a section print, logs left out."""
    printed = [output.get("text", "") for output in outputs if output.get("name") == "stdout"]
    return "\n".join([*printed, *(output.get("data", {}).get("text/plain", "") for output in outputs)])


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, run_notebook):
    assert any(run_notebook(path).values())


@pytest.mark.slow
def test_the_quickstart_notebook_shows_every_step(run_notebook):
    shown = run_notebook(ROOT / "examples" / "quickstart.ipynb")
    index = r"<a_\d+><b_\d+><c_\d+><d_\d+>"
    assert "users=399" in text(shown["What goes in"]) and "wrote" in text(shown["What goes in"])
    assert re.search(index, text(shown["The index of a user"]))
    prompt = text(shown["One prompt"])
    assert re.search(index, prompt) and "### Candidates:\nA. " in prompt and "\nT. " in prompt
    assert any("image/png" in output.get("data", {}) for output in shown["Tuning"])
    results = dict(re.findall(r"(random|retriever|ulmrec) +\d+ +([\d.]+)", text(shown["Results"])))
    assert float(results["random"]) == pytest.approx(0.227, abs=0.001)
    assert float(results["ulmrec"]) > float(results["random"])
    pair = text(shown["Recommendations for two users with the same history"])
    rows = [re.split(r" {2,}", line)[-2:] for line in pair.splitlines() if re.match(r"\d ", line)]
    assert len(rows) == 5 and [first for first, _ in rows] != [second for _, second in rows]
    new = text(shown["Somebody new"])
    assert re.search(index, new) and "ocean" in new
