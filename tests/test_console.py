"""The console in processes of its own: on a pipe and on a pseudo-terminal."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.small_run import environment
from ulmrec_hf.console import Console, duration

JOB = """
import ctypes, logging, os, subprocess, sys, time, warnings
from ulmrec_hf.console import Console, quiet_imports
with quiet_imports():
    os.write(2, b"import noise\\n")
from tqdm.auto import tqdm

console = Console(["data", "retriever", "report"], sys.argv[1])
print("before")
with console.stage("retriever") as stage:
    print("printed")
    print("printed to stderr", file=sys.stderr)
    os.write(1, b"written\\n")
    ctypes.CDLL(None).printf(b"from C\\n")
    subprocess.run([sys.executable, "-c", "import sys; print('child'); print('child error', file=sys.stderr)"])
    warnings.warn("a library's warning")
    logging.getLogger("library").warning("logged by a library")
    logging.getLogger("library").info("not logged")
    logging.getLogger("ulmrec_hf.data").info("logged by us")
    for _ in range(2):
        logging.getLogger("ulmrec_hf.data").warning("%d rows are left out", 3)
    for _ in tqdm(range(3), desc="outer", mininterval=0):
        for _ in tqdm(range(2), desc="inner", mininterval=0, leave=False):
            time.sleep(0.01)
    tqdm.write("beside a bar")
    stage.found("LRURec: Recall@20 0.742")
with console.stage("report"):
    logging.getLogger("ulmrec_hf.data").warning("%d rows are left out", 3)
console.results("a table", {"Model": "out/model"})
"""
NOISE = [
    "import noise", "printed", "printed to stderr", "written", "from C", "child", "child error", "a library's warning",
    "logged by a library", "logged by us", "3 rows are left out", "beside a bar",
]  # fmt: skip


def on_pipe(code, *argv):
    return subprocess.run([sys.executable, "-c", code, *argv], env=environment(), capture_output=True, text=True)


def on_terminal(code, *argv, columns=100):
    """What a process wrote to a pseudo-terminal, and its exit status."""
    ours, its = pty.openpty()
    command = ["/bin/sh", "-c", f'stty cols {columns}; exec "$@"', "sh", sys.executable, "-c", code, *map(str, argv)]
    with subprocess.Popen(command, env=environment(), stdin=its, stdout=its, stderr=its) as process:
        os.close(its)
        written = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux says so when the last process has closed the terminal
                break
            if not part:
                break
            written += part
    os.close(ours)
    return written.decode(), process.returncode


def visible(written):
    """The lines that stay on the screen."""
    return [re.split("\r|\x1b\\[K", line)[-1] for line in written.replace("\r\n", "\n").split("\n")]


def test_a_pipe_gets_headlines_and_the_log_all_else(tmp_path):
    log = tmp_path / "run" / "log.txt"
    done = on_pipe(JOB, str(log))
    assert (done.returncode, done.stderr) == (0, "")
    assert re.sub(r"\d\.\d s", "TIME", done.stdout).splitlines() == [
        "before",
        "[2/3] retriever  LRURec: Recall@20 0.742, TIME",
        "      warning: 3 rows are left out",
        "[3/3] report     TIME",
        "",
        "a table",
        "",
        "Model: out/model",
        f"Log:   {log}",
    ]
    text = log.read_text()
    for noise in NOISE:
        assert noise in text, noise
    assert "not logged" not in text and "inner" not in text and "\r" not in text
    assert "INFO ulmrec_hf.data: logged by us" in text


def test_a_terminal_keeps_the_headlines_and_shows_one_bar_at_a_time(tmp_path):
    written, code = on_terminal(JOB, tmp_path / "log.txt")
    assert code == 0
    lines = visible(written)
    assert re.fullmatch(r"\[2/3\] retriever  LRURec: Recall@20 0\.742, \d\.\d s", lines[1])
    assert lines[2] == "      warning: 3 rows are left out"
    assert lines[3].startswith("[3/3] report ")
    assert not any("|" in line or "..." in line for line in lines)  # no bar stays
    drawn = [text for text in re.split("\r\x1b\\[K", written.split("\n")[1]) if text]
    assert drawn[0] == "[2/3] retriever  ..."
    for bar in ("outer:  33%", "inner:  50%", "outer: 100%"):
        assert any(text.startswith(f"[2/3] retriever  {bar}") for text in drawn), bar
    text = (tmp_path / "log.txt").read_text()
    assert all(noise in text for noise in NOISE) and "outer" not in text


def test_a_bar_never_wraps(tmp_path):
    written, _ = on_terminal(JOB, tmp_path / "log.txt", columns=30)
    drawn = [text for text in re.split("\r\x1b\\[K", written.split("\n")[1]) if text and "\n" not in text]
    assert max(len(text) for text in drawn if "outer" in text) == 29


def test_two_processes_count_on(tmp_path):
    """The early stages run in a child, as in the main job."""
    code = (
        "import sys\n"
        "from ulmrec_hf.cli import run_alone\n"
        "from ulmrec_hf.console import Console\n"
        "stages = ['data', 'index', 'model']\n"
        "if len(sys.argv) == 2:\n"
        "    run_alone(__file__, [sys.argv[1], 'child'])\n"
        "console = Console(stages, sys.argv[1])\n"
        "for name in ['model'] if len(sys.argv) == 2 else ['data', 'index']:\n"
        "    with console.stage(name): print('noise of', name)\n"
    )
    script = tmp_path / "job.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script, tmp_path / "log.txt"], env=environment(), capture_output=True, text=True
    )
    assert [line[:11] for line in done.stdout.splitlines()] == ["[1/3] data ", "[2/3] index", "[3/3] model"]
    assert (tmp_path / "log.txt").read_text().count("noise of") == 3


@pytest.mark.parametrize("run", [on_pipe, on_terminal])
def test_a_failure_names_stage_and_log_and_its_error_is_on_stderr(tmp_path, run):
    code = (
        "import sys\n"
        "from ulmrec_hf.cli import run_script\n"
        "from ulmrec_hf.console import Console\n"
        "def main():\n"
        "    with Console(['data', 'index'], sys.argv[1]).stage('index'):\n"
        "        print('noise')\n"
        "        raise ValueError('levels is 0')\n"
        "run_script(main)\n"
    )
    log = tmp_path / "log.txt"
    done = run(code, str(log))
    if run is on_pipe:
        lines, status = (done.stdout + done.stderr).splitlines(), done.returncode
    else:
        lines, status = visible(done[0])[:-1], done[1]
    assert re.fullmatch(rf"\[2/2\] index  failed after \d\.\d s; see {log}", lines[0])
    assert (lines[1:], status) == (["error: levels is 0"], 1)
    assert "noise\nTraceback" in log.read_text() and "ValueError: levels is 0" in log.read_text()


def test_ctrl_c_prints_one_line_and_exits_with_130(tmp_path):
    child = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from ulmrec_hf.cli import run_script\n"
        "from ulmrec_hf.console import Console\n"
        "def main():\n"
        "    with Console(['data'], sys.argv[1]).stage('data'):\n"
        "        Path(sys.argv[1] + '.begun').touch()\n"
        "        time.sleep(60)\n"
        "run_script(main)\n"
    )
    (tmp_path / "child.py").write_text(child)
    parent = (
        "import sys\n"
        "from ulmrec_hf.cli import run_alone, run_script\n"
        "run_script(lambda: run_alone(sys.argv[1], [sys.argv[2]]))\n"
    )
    command = [sys.executable, "-c", parent, str(tmp_path / "child.py"), str(tmp_path / "log.txt")]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not Path(f"{tmp_path}/log.txt.begun").is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    stdout, stderr = process.communicate(timeout=30)
    assert re.fullmatch(r"\[1/1\] data  interrupted after \d\.\d s; see .*log\.txt\n", stdout)
    assert (stderr, process.returncode) == ("interrupted: the same command resumes\n", 130)


def test_a_stage_whose_folder_is_not_made_again_is_up_to_date(tmp_path, capsys):
    from ulmrec_hf.stages import run_stage

    console = Console(["data"], tmp_path / "log.txt")
    for settings in ({"seed": 0}, {"seed": 0}, {"seed": 1}):
        with console.stage("data", tmp_path / "data") as stage:
            run_stage(tmp_path / "data", settings, {}, lambda partial: print("building"), overwrite=True)
            stage.found("9 users")
    ends = [line.rpartition(", ")[2] for line in capsys.readouterr().out.splitlines()]
    assert ends[1] == "up to date" and [ends[0][-2:], ends[2][-2:]] == [" s", " s"]
    assert (tmp_path / "log.txt").read_text().count("building") == 2


def test_another_process_than_the_main_one_prints_nothing(tmp_path, capfd):
    console = Console(["model"], tmp_path / "log.txt", is_main=False)
    with console.stage("model"):
        print("noise of rank 1")
    console.results("a table", {})
    assert capfd.readouterr() == ("", "")
    assert "noise of rank 1" in (tmp_path / "log.txt").read_text()


TRAINING = """
import sys
from ulmrec_hf.console import Console, quiet_imports, quiet_trainer
with quiet_imports():
    import torch
    from transformers import Trainer, TrainingArguments

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
    def forward(self, x, labels):
        return {"loss": ((x * self.weight).sum(1) - labels).square().mean(), "logits": x}

rows = [{"x": torch.randn(2), "labels": torch.tensor(1.0)} for _ in range(64)]
console = Console(["model", "resumed"], sys.argv[1] + "/log.txt")
for name, steps in (("model", 4), ("resumed", 8)):
    args = TrainingArguments(
        sys.argv[1] + "/out", max_steps=steps, per_device_train_batch_size=4, logging_steps=2, eval_strategy="steps",
        eval_steps=2, save_steps=4, metric_for_best_model="ndcg@10", report_to="none", use_cpu=True,
    )
    metrics = lambda _: {"ndcg@10": 0.25}
    trainer = Trainer(Model(), args, train_dataset=rows, eval_dataset=rows[:8], compute_metrics=metrics)
    quiet_trainer(trainer, "tuning")
    with console.stage(name):
        trainer.train(resume_from_checkpoint=name == "resumed")
        trainer.predict(rows)
"""


def test_a_trainer_shows_one_bar_with_loss_metric_and_time_left(tmp_path):
    written, code = on_terminal(TRAINING, tmp_path, columns=140)
    assert code == 0, written
    lines = visible(written)
    assert len(lines) == 3 and all(re.fullmatch(r"\[\d/2\] \w+ +\d+(\.\d)? s", line) for line in lines[:2])
    for line, begin, steps in zip(written.split("\n"), (0, 4), (4, 8), strict=False):
        drawn = re.split("\r\x1b\\[K", line)
        tuning = [text for text in drawn if "tuning" in text]
        assert f" {begin}/{steps} steps, ? left" in tuning[0]
        last = rf"tuning {steps}/{steps} steps, 00:00 left, loss=[\d.]+, ndcg@10=0\.25 \|█+\|"
        assert any(re.fullmatch(r"\[\d/2\] \w+ +" + last, text) for text in tuning), tuning[-1]
        assert any("scoring: 100%" in text for text in drawn)
    log = (tmp_path / "log.txt").read_text()
    assert re.search(r"INFO ulmrec_hf\.console: step 8: \{'eval_loss'", log) and "tuning" not in log


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.4, "9.4 s"), (59.7, "1 min"), (72, "1 min 12 s"), (7500, "2 h 5 min"), (97_300, "1 d 3 h")],
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


def test_importing_the_console_is_light():
    code = "import sys, ulmrec_hf.console; assert not {'torch', 'transformers', 'datasets', 'tqdm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())
