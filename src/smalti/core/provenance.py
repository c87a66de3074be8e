"""Provenance of artifacts: software versions, the command line, the git commit, the machine, and a run's records."""

import json
import platform
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from smalti.core.devices import best_device, cores, resolve

RUN_NAME, METRICS_NAME = "run.json", "metrics.jsonl"
"""Files that a training leaves beside its model: settings and versions; what was measured at each step."""


def logged_metrics(folder: Path) -> list[dict[str, int | float]]:
    """Returns what the run at `folder` logged, by metric, with its `step`; a training and a held-out line of a step are
    two entries. A last line that a kill truncated is left out."""
    return [json.loads(line) for line in (folder / METRICS_NAME).read_text().splitlines() if line.endswith("}")]


def logged_values(folder: Path, name: str) -> dict[int, float]:
    """Returns the values of one metric that the run at `folder` logged, by step."""
    return {int(line["step"]): line[name] for line in logged_metrics(folder) if name in line}


def last_metrics(folder: Path, *, until: int | None = None) -> dict[str, float]:
    """Returns the newest value of every metric of the run at `folder`, up to a step."""
    newest: dict[str, float] = {}
    for values in logged_metrics(folder):
        if until is None or values["step"] <= until:
            newest |= {name: float(value) for name, value in values.items()}
    return newest


@cache
def versions() -> dict[str, str]:
    """Returns the versions of the software that results depend on, read once in each process."""
    packages = [
        "torch",
        "accelerate",
        "datasets",
        "h5py",
        "numpy",
        "pillow",
        "x-transformers",
        "rotary-embedding-torch",
    ]
    return {"python": platform.python_version(), **{package: version(package) for package in ("smalti", *packages)}}


def command() -> str:
    """Returns the command line without the program's path: `train_prior.py ...` or `smalti train-prior ...`."""
    program = Path(sys.argv[0]).name
    words = program.split() if program.startswith("smalti ") else [program]
    return shlex.join([*words, *sys.argv[1:]])


def git_commit() -> str | None:
    """Returns the git commit of the checkout that smalti runs from, with `+` if modified; None for a wheel."""
    tracked = _git("ls-files", Path(__file__).name)  # a wheel may be installed inside another repository
    return _git("describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*") if tracked else None


def _git(*arguments: str) -> str | None:
    try:
        finished = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).resolve().parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return finished.stdout.strip() or None


def machine() -> str:
    """Describes the machine and software of a measurement: device, cores, default precision, versions and commit."""
    device = f"{torch.cuda.get_device_name()}, " if best_device().type == "cuda" else ""
    software = ", ".join(f"{name} {version}" for name, version in versions().items())
    threads = f"{cores()} cores, {torch.get_num_threads()} threads"
    return f"{device}{cpu()}, {threads}, {resolve('auto')} by default; {software}; commit {git_commit() or 'none'}"


def cpu() -> str:
    """Returns the processor's name as the system reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
