"""The README's own code blocks run, against a small run in place of the quickstart's."""

import importlib.util
import re
import subprocess
import sys

from tests.small_run import ROOT, environment


def test_the_python_blocks_run(run_folder, tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)
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
    blocks = readme.console_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    commands = [command for _, commands in blocks for command in commands]
    assert any("quickstart.yaml" in command for command in commands)
    for command in commands:
        for path in re.findall(r"recipes/\S+", command):
            assert (ROOT / path).exists(), path
