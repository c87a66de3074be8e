"""Runs the commands of `docs/gpu.md`, the measurements that wait for a GPU, in order (`make gpu`).

A command whose output is kept in `runs/gpu/` is finished and is not run again.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PAGE, LOGS = Path("docs/gpu.md"), Path("runs/gpu")
SMALTI = (sys.executable, "-m", "smalti")


def commands(page: str) -> list[str]:
    """Returns the `smalti` commands in the indented blocks of a page of Markdown, in order."""
    lines = re.sub(r"\\\n\s*", "", page).splitlines()  # continued lines are joined
    return [line.strip() for line in lines if line.startswith("    smalti ")]


def run_all(lines: Sequence[str], logs: Path, *, minutes: float | None = None, program: Sequence[str] = SMALTI) -> bool:
    """Runs each command whose log is not finished, until the minutes are over; returns whether all are finished.

    A log is called `NUMBER-COMMAND.txt`, and `.partial` until its command succeeds. A failure does not stop the rest.
    """
    logs.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes if minutes else None
    finished = True
    for number, line in enumerate(lines):
        words = shlex.split(line)[1:]
        log = logs / f"{number:02}-{words[0]}.txt"
        if log.exists() and log.read_text().startswith(f"$ {line}\n"):
            continue
        left = end - time.monotonic() if end else None
        if left is not None and left <= 0:
            return False
        print(f"$ {line}", flush=True)
        finished &= _run([*program, *words], f"$ {line}\n", log, left)
    return finished


def _run(command: Sequence[str], heading: str, log: Path, seconds: float | None) -> bool:
    """Runs a command with its output in `log`, at most that long; returns whether it succeeded."""
    partial, start = log.with_suffix(".partial"), time.monotonic()
    with partial.open("w") as output:
        print(heading, end="", file=output, flush=True)
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait(seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stopped:
            process.terminate()  # trainings save a snapshot
            process.wait()
            if isinstance(stopped, KeyboardInterrupt):
                raise
            code = process.returncode
        print(f"{time.monotonic() - start:.0f} s", file=output)
    if code:
        print(f"  stopped with status {code}; its output is in {partial}", flush=True)
        return False
    partial.replace(log)
    return True


def main() -> None:
    """Runs the commands of the page, for at most MINUTES if the environment has it."""
    sys.exit(not run_all(commands(PAGE.read_text()), LOGS, minutes=float(os.environ.get("MINUTES") or 0) or None))


if __name__ == "__main__":
    main()
