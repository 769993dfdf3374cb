"""What the recipes' scripts share on the command line."""

import os
import sys
from collections.abc import Callable

import yaml


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's main; what the user can mend is told in one line, with ULMREC_TRACEBACK=1 in full."""
    try:
        main()
    except (ValueError, OSError, yaml.YAMLError) as error:
        if os.environ.get("ULMREC_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
