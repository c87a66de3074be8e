"""Runs the commands of `docs/gpu.md`, the measurements that wait for a GPU, in order (`make gpu`).

A command whose output is kept in `runs/gpu/` is finished and is not run again.
"""

import os
import sys
from pathlib import Path

from smalti.benchmarks.command_queue import commands, run_all

PAGE, LOGS = Path("docs/gpu.md"), Path("runs/gpu")


def main() -> None:
    """Runs the commands of the page, for at most MINUTES if the environment has it."""
    sys.exit(not run_all(commands(PAGE.read_text()), LOGS, minutes=float(os.environ.get("MINUTES") or 0) or None))


if __name__ == "__main__":
    main()
