"""Runs the `smalti` commands of a page in order, for a given time, and never again once they are finished."""

import hashlib
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

SMALTI = (sys.executable, "-m", "smalti")
DIGEST_LETTERS = 10


def commands(page: str) -> list[str]:
    """Returns the `smalti` commands in the indented blocks of a page of Markdown, in order."""
    lines = re.sub(r"\\\n\s*", "", page).splitlines()  # continued lines are joined
    return [line.strip() for line in lines if line.startswith("    smalti ")]


def log_name(line: str) -> str:
    """Returns the name of a command's log, without its suffix."""
    return f"{shlex.split(line)[1]}-{hashlib.sha256(line.encode()).hexdigest()[:DIGEST_LETTERS]}"


def run_all(
    lines: Sequence[str],
    logs: Path,
    *,
    minutes: float | None = None,
    processes: int = 1,
    program: Sequence[str] = SMALTI,
) -> bool:
    """Runs each command whose log is not finished, until the minutes are over; returns whether all are finished.

    A log is called `COMMAND-DIGEST.txt`, by the digest of the whole line, so that it is found wherever the line stands
    among the others; and `.partial` until its command succeeds. A failure does not stop the rest.
    Commands that still run at the end get SIGTERM, at which trainings save a snapshot, and so do they on Ctrl-C.

    Args:
        lines: the commands, each beginning with the word `smalti`.
        logs: the folder of the logs.
        minutes: the time; None for no limit.
        processes: commands that run at once.
        program: what is run instead of `smalti`.
    """
    logs.mkdir(parents=True, exist_ok=True)
    queue = _Queue(logs, time.monotonic() + 60 * minutes if minutes else None, program)
    with ThreadPoolExecutor(processes) as pool:
        try:
            finished = [pool.submit(queue.run, line) for line in dict.fromkeys(lines)]
            return all([future.result() for future in finished])
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            queue.stop()
            raise


class _Queue:
    def __init__(self, logs: Path, end: float | None, program: Sequence[str]) -> None:
        self._logs, self._end, self._program = logs, end, program
        self._lock, self._stopping = threading.Lock(), False
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(self, line: str) -> bool:
        """Runs a command with its output in its log, unless it is finished; returns whether it is."""
        words = shlex.split(line)[1:]
        log = self._logs / f"{log_name(line)}.txt"
        if log.exists():
            return True
        partial, start = log.with_suffix(".partial"), time.monotonic()
        left = self._end - start if self._end else None
        if left is not None and left <= 0:
            return False
        with partial.open("w") as output:
            print(f"$ {line}", file=output, flush=True)
            process = self._start([*self._program, *words], output)
            if process is None:
                return False
            print(f"$ {line}", flush=True)
            ended = False
            try:
                process.wait(left)
            except subprocess.TimeoutExpired:
                ended = True
                process.terminate()
                process.wait()
            with self._lock:
                self._running.discard(process)
            print(f"{time.monotonic() - start:.0f} s", file=output)
        if process.returncode:
            why = "the time is over" if ended else f"it stopped with status {process.returncode}"
            print(f"  {why}: {line}\n  its output is in {partial}", flush=True)
            return False
        partial.replace(log)
        return True

    def stop(self) -> None:
        """Ends the running commands and starts no more."""
        with self._lock:
            self._stopping = True
            for process in self._running:
                process.terminate()

    def _start(self, command: Sequence[str], output: IO[str]) -> subprocess.Popen[bytes] | None:
        with self._lock:
            if self._stopping:
                return None
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            self._running.add(process)
            return process
