"""What the recipes' scripts share on the command line."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import yaml

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
    """Runs a script's main; what the user can mend is told in one line, with ULMREC_TRACEBACK=1 in full."""
    try:
        main()
    except (ValueError, OSError, yaml.YAMLError) as error:
        if os.environ.get("ULMREC_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")


def run_alone(script: str, argv: Sequence[str]) -> None:
    """Runs a script in one plain process, whatever launcher started this one: small models train there unwrapped.

    Raises:
        SystemExit: it failed, and has said why.
    """
    plain = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(LAUNCHER) and name not in LAUNCHER_NAMES
    }
    # with several accelerators in sight Trainer would split every small batch among them
    plain["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    done = subprocess.run([sys.executable, script, *argv], env=plain)
    if done.returncode:
        raise SystemExit(done.returncode)
