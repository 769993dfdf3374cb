"""The terminal of a long job: a headline for each stage and one progress bar at a time; all else goes to a log file."""

import contextlib
import ctypes
import io
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)
_CLEAR = "\r\x1b[K"  # back to the line's start, and erase it
_UP = "\x1b[A"  # by which tqdm returns from a nested bar's line
_imported: list[str] = []  # what `quiet_imports` caught, until a console has a log for it


class Stage:
    """What a stage's block says about itself."""

    finding = ""

    def found(self, finding: str) -> None:
        """Sets what the headline says, such as "LRURec: Recall@20 0.742"."""
        self.finding = finding


class Console:
    """Prints one headline a stage, such as `[3/6] retriever  LRURec: Recall@20 0.742, 1 min 12 s`.

    While a stage runs, all that is written to stdout and stderr, also by C code and child processes, goes to the log.
    On a terminal, Python's progress bars share one line that disappears with the stage; elsewhere there are none.
    Warnings of this package are printed below the headline, each text once.

    Args:
        stages: the names of all stages of the job in their order, also where several processes each run some of them.
        log_path: the log; it is appended to.
        is_main: whether this process prints headlines; of several that run a stage together, one.
    """

    def __init__(self, stages: Sequence[str], log_path: str | os.PathLike, *, is_main: bool = True):
        self.stages, self.log_path, self.is_main = list(stages), Path(log_path), is_main
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        # Never closed: log handlers that libraries make during a stage keep writing to it.
        self._log = open(self.log_path, "a", buffering=1, encoding="utf-8", errors="replace")  # noqa: SIM115
        self._log.writelines(_imported)
        _imported.clear()
        self._stderr, self._warnings = _Stderr(self._log), _Warnings()

    @contextlib.contextmanager
    def stage(self, name: str, folder: str | os.PathLike | None = None) -> Iterator[Stage]:
        """Runs its block as the stage `name` of `stages`; prints the headline afterwards, also of a failure.

        Args:
            name: one of `stages`.
            folder: where the stage publishes its result; if it is the same afterwards, the headline says "up to date".
        """
        head = f"[{self.stages.index(name) + 1}/{len(self.stages)}] {name:<{max(map(len, self.stages))}}  "
        stage, failure, published, start = Stage(), None, _inode(folder), time.monotonic()
        warned = len(self._warnings.texts)
        self._log.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {head}\n")
        try:
            with self._quiet(head):
                yield stage
        except BaseException as error:
            failure = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            traceback.print_exc(file=self._log)
            raise
        finally:
            words = duration(time.monotonic() - start)
            if failure:
                words = f"{failure} after {words}; see {self.log_path}"
            elif published is not None and _inode(folder) == published:
                words = "up to date"
            lines = [head + ", ".join(filter(None, (stage.finding, words)))]
            lines += [f"      warning: {text}" for text in list(self._warnings.texts)[warned:]]
            self._log.write(lines[0] + "\n")
            if self.is_main:
                print(*lines, sep="\n", flush=True)

    def results(self, table: str, places: Mapping[str, str | os.PathLike]) -> None:
        """Prints a table of results, and where things are: `places` by their titles, and the log."""
        if self.is_main:
            places = {**places, "Log": self.log_path}
            width = max(map(len, places)) + 2
            print(f"\n{table}\n", *(f"{title + ':':<{width}}{path}" for title, path in places.items()), sep="\n")

    @contextlib.contextmanager
    def _quiet(self, head: str) -> Iterator[None]:
        to_log, terminal = logging.StreamHandler(self._log), None
        to_log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root, ours = logging.getLogger(), logging.getLogger(__package__)
        with contextlib.ExitStack() as stack:
            if self.is_main and sys.stdout.isatty():
                terminal = stack.enter_context(os.fdopen(os.dup(sys.stdout.fileno()), "w", errors="replace"))
                stack.callback(terminal.write, _CLEAR)
            for each, handler in ((root, to_log), (ours, self._warnings)):
                each.addHandler(handler)
                stack.callback(each.removeHandler, handler)
            stack.callback(ours.setLevel, ours.level)
            ours.setLevel(logging.INFO)
            stack.enter_context(_descriptors_to(self._log.fileno()))
            stack.enter_context(contextlib.redirect_stdout(self._log))
            stack.enter_context(contextlib.redirect_stderr(self._stderr))
            stack.callback(self._stderr.show, None, "")
            self._stderr.show(terminal, head)
            yield


class _Stderr(io.TextIOBase):
    """Python's stderr while a stage runs: progress bars share one line of the terminal, all else goes to the log.

    A bar is text that begins with a carriage return and has no line end, as tqdm writes it.
    """

    encoding = "utf-8"

    def __init__(self, log: TextIO):
        self._log, self._terminal, self._head, self._in_bar = log, None, "", False

    def show(self, terminal: TextIO | None, head: str) -> None:
        """Begins to show bars on `terminal` behind the stage's `head`, or stops with None."""
        self._terminal, self._head = terminal, head
        self._draw("...")

    def write(self, text: str) -> int:
        self._in_bar = (text[:1] == "\r" and "\n" not in text) or _UP in text or (self._in_bar and not text.strip())
        if not self._in_bar:
            self._log.write(text)
        elif text.strip(_UP):  # more than cursor moves
            self._draw(text.strip() or "...")
        return len(text)

    def fileno(self) -> int:
        return self._log.fileno()

    def isatty(self) -> bool:
        return self._terminal is not None

    def _draw(self, text: str) -> None:
        if self._terminal is not None:
            width = os.get_terminal_size(self._terminal.fileno()).columns or 80
            self._terminal.write(_CLEAR + (self._head + text)[: width - 1])
            self._terminal.flush()


class _Warnings(logging.Handler):
    """Collects the texts of warnings, each once."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.texts[record.getMessage()] = None


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Keeps what libraries print while they are imported for the log of the next `Console`."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        with _descriptors_to(file.fileno()):
            yield
        file.seek(0)
        _imported.append(file.read())


def quiet_trainer(trainer: "Trainer", title: str = "training") -> None:
    """Gives a Trainer one bar with loss, metric and time left, unless `disable_tqdm`; logs what it printed."""
    from tqdm.auto import tqdm
    from transformers import EarlyStoppingCallback, ProgressCallback

    most = "at most " * any(isinstance(each, EarlyStoppingCallback) for each in trainer.callback_handler.callbacks)
    # the bar itself comes last: a narrow terminal cuts it off first
    form = "{desc} {n_fmt}/{total_fmt} steps, " + most + "{remaining} left{postfix} |{bar:20}|"

    class TrainingBar(ProgressCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            # from the checkpoint's step on, or the time left would count steps that took no time
            self.current_step, self.values = state.global_step, {}
            if state.is_world_process_zero:
                self.training_bar = tqdm(desc=title, total=state.max_steps, initial=state.global_step, bar_format=form)

        def on_prediction_step(self, args, state, control, **kwargs):
            super().on_prediction_step(args, state, control, **kwargs)
            if self.prediction_bar is not None:
                self.prediction_bar.set_description("scoring", refresh=False)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if state.is_world_process_zero:
                logger.info("step %d: %s", state.global_step, logs)
            if self.training_bar is not None:
                metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
                titles = {"loss": "loss", f"eval_{metric}": "validation loss" if metric == "loss" else metric}
                self.values |= {title: f"{logs[key]:.4g}" for key, title in titles.items() if key in logs}
                self.training_bar.set_postfix(self.values)

    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(TrainingBar)


@contextlib.contextmanager
def _descriptors_to(file: int) -> Iterator[None]:
    """Lets the descriptors of stdout and stderr be those of `file`, for C code and child processes too."""
    _flush()
    saved = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    for descriptor in saved:
        os.dup2(file, descriptor)
    try:
        yield
    finally:
        _flush()
        for descriptor, original in saved.items():
            os.dup2(original, descriptor)
            os.close(original)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # where a process has no C library of that name
        ctypes.CDLL(None).fflush(None)


def _inode(folder: str | os.PathLike | None) -> int | None:
    """What changes when a stage is built again: it is published by renaming a new folder."""
    return Path(folder).stat().st_ino if folder is not None and Path(folder).exists() else None


def duration(seconds: float) -> str:
    """A duration in words, by its two largest units: "0.4 s", "12 s", "1 min 12 s", "2 h 5 min", "1 d 3 h"."""
    whole, parts = round(seconds), []
    if whole < 10:
        return f"{seconds:.1f} s"
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        if whole >= size:
            parts.append(f"{whole // size} {unit}")
        whole %= size
    return " ".join(parts[:2])
