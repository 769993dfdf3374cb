"""What the recipes' scripts share on the command line."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import yaml

INTERRUPTED = 128 + 2  # what a shell makes of SIGINT
# What a launcher hands to its processes.
LAUNCHER = ("ACCELERATE_", "FSDP_", "DEEPSPEED_", "TORCHELASTIC_", "OMP_NUM_THREADS")
LAUNCHER_NAMES = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
}


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's main; user errors and Ctrl-C print one line, with ULMREC_TRACEBACK=1 the traceback.

    Raises:
        SystemExit: with a message after a user error, with 130 after Ctrl-C.
    """
    try:
        main()
    except (ValueError, OSError, yaml.YAMLError) as error:
        if os.environ.get("ULMREC_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        if os.environ.get("ULMREC_TRACEBACK"):
            raise
        print("interrupted: the same command resumes", file=sys.stderr)
        sys.exit(INTERRUPTED)


def run_alone(script: str, argv: Sequence[str]) -> None:
    """Runs a script in one plain process, without the launcher that started this one: small models train unwrapped.

    Raises:
        SystemExit: it failed or was interrupted, and has printed why.
    """
    plain = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(LAUNCHER) and name not in LAUNCHER_NAMES
    }
    # with several accelerators in sight Trainer would split every small batch among them
    plain["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    with subprocess.Popen([sys.executable, script, *argv], env=plain) as child:
        try:
            code = child.wait()
        except KeyboardInterrupt:
            # Ctrl-C reaches every process of the terminal: the child cleans up, says one line, and exits by itself
            try:
                code = child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                child.terminate()
                raise
            if code != INTERRUPTED:
                raise
    if code:
        raise SystemExit(code)
