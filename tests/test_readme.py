"""The README's own code blocks run, against a small run in place of the quickstart's."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest

from tests.small_run import ROOT, environment

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_blocks_run(run_folder, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```$", README, flags=re.M | re.S)
    assert len(blocks) >= 3
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "quickstart").symlink_to(run_folder)
    script = tmp_path / "readme.py"
    script.write_text(
        "\n".join(blocks).replace('os.chdir("../../..")', f"os.chdir({str(tmp_path)!r})"), encoding="utf-8"
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ocean stove" in done.stdout and "### Candidates:" in done.stdout


def test_every_console_block_is_a_command_that_exists():
    spec = importlib.util.spec_from_file_location("readme", ROOT / ".ci" / "readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    blocks = readme.console_blocks(README)
    commands = [command for _, commands in blocks for command in commands]
    assert any("quickstart.yaml" in command for command in commands)
    for command in commands:
        for path in re.findall(r"recipes/\S+", command):
            assert (ROOT / path).exists(), path


def test_the_quickstart_shows_what_the_readme_says():
    """Against the report that the README's own command left in this checkout, whichever machine it ran on."""
    report = ROOT / "output" / "quickstart" / "report"
    if not (report / "metrics.json").is_file():
        pytest.skip("the quickstart was not run here")
    rows = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
    measured = {(row["system"], row["scope"]): row for row in rows if row["split"] == "test"}
    table = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| [\d.]+-[\d.]+ \| ([\d.]+) \| ([\d.]+) \|$", README, flags=re.M)
    assert {system for system, *_ in table} == {system for system, _ in measured}
    for system, rank_ndcg, ndcg, recall in table:
        # another processor rounds otherwise, and a tuning ends elsewhere
        assert float(rank_ndcg) == pytest.approx(measured[system, "rank"]["ndcg@10"], abs=0.04), system
        assert float(ndcg) == pytest.approx(measured[system, "overall"]["ndcg@10"], abs=0.04), system
        assert float(recall) == pytest.approx(measured[system, "overall"]["recall@10"], abs=0.04), system
    differences = {
        (row["a"], row["b"]): row
        for row in json.loads((report / "comparisons.json").read_text(encoding="utf-8"))
        if (row["split"], row["scope"], row["metric"]) == ("test", "rank", "ndcg@10")
    }
    assert differences["ulmrec", "retriever"]["low"] > 0
    assert differences["ulmrec", "ulmrec_no_index"]["low"] > 0
    assert differences["ulmrec", "ulmrec_placebo"]["low"] > 0
    assert differences["ulmrec_placebo", "ulmrec_no_index"]["low"] <= 0
    assert measured["ulmrec_index_only", "rank"]["ndcg@10"] >= 1.3 * measured["random", "rank"]["ndcg@10"]
