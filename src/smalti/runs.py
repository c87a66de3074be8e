"""What a training run leaves beside its model: what made it, what it measured, and the state it goes on from.

The model's own two files are in `checkpoint.py`.
"""

import dataclasses
import json
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from smalti.errors import UserError
from smalti.files import whole_file, write_json

RUN_NAME, METRICS_NAME, STATE_NAME = "run.json", "metrics.jsonl", "training_state.pt"

# Settings that may change between a run and its continuation. All but `steps` leave the result as it would have been; a
# run continued with more steps follows the learning rate of the longer run from there on.
FREE_SETTINGS = frozenset({"steps", "report_steps", "save_steps", "log_steps", "workers", "out", "restart"})


def versions() -> dict[str, str]:
    """Software that decides what numbers come out."""
    deciding = [
        "torch",
        "accelerate",
        "datasets",
        "h5py",
        "numpy",
        "pillow",
        "x-transformers",
        "rotary-embedding-torch",
    ]
    return {"python": platform.python_version(), **{package: version(package) for package in ("smalti", *deciding)}}


def command() -> str:
    """The command line as typed, without the folders of this machine."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def git_commit() -> str | None:
    """The commit of the checkout that smalti runs from, with `+` if changed since; None for an installed wheel."""
    tracked = _git("ls-files", Path(__file__).name)  # a wheel may lie in an environment within another repository
    return _git("describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*") if tracked else None


def _git(*arguments: str) -> str | None:
    try:
        shown = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).resolve().parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return shown.stdout.strip() or None


class Run:
    """A folder that a training run writes to and goes on from.

    Args:
        folder: made if it is not there.
        settings: what decides the result, as flat JSON values; paths are written as they are.
        main: whether this process writes.
        restart: throw away what an earlier run left here. Other processes may look only when the main one has done so.

    Raises:
        UserError: if the folder holds a run with other settings, naming the first that differs.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, main: bool = True, restart: bool = False) -> None:
        self.folder, self.main = folder, main
        self.settings = json.loads(json.dumps(settings, default=str))  # as it will be read back: tuples become lists
        if restart and main:
            for name in (STATE_NAME, METRICS_NAME, RUN_NAME):  # the state first: nothing goes on from half a folder
                (folder / name).unlink(missing_ok=True)
        if not self.is_new:
            self._compare(json.loads((folder / RUN_NAME).read_text())["settings"])

    def _compare(self, before: dict[str, Any]) -> None:
        names = (before.keys() | self.settings.keys()) - FREE_SETTINGS
        changed = sorted(name for name in names if before.get(name) != self.settings.get(name))
        if changed:
            first = changed[0]
            raise UserError(
                f"{self.folder} holds a run with {first}={before.get(first)!r}, not {self.settings.get(first)!r}; "
                "give the same settings to go on, another --out, or --restart to throw that run away"
            )

    @property
    def is_new(self) -> bool:
        """Whether nothing was saved yet."""
        return not (self.folder / STATE_NAME).exists()

    def finished(self, steps: int) -> bool:
        """Whether the saved state is that after `steps` steps, or more."""
        return not self.is_new and self._load(mmap=True)["step"] >= steps

    def begin(self) -> dict[str, Any] | None:
        """The newest saved state, or None if there is none.

        Writes down what makes this run, and forgets what was measured after that state, so that the log of a resumed
        run equals an uninterrupted one's.
        """
        state = None if self.is_new else self._load()
        if self.main:
            made_by = {"command": command(), "settings": self.settings, "versions": versions()}
            started = {"git_commit": git_commit(), "started": datetime.now(UTC).isoformat(timespec="seconds")}
            write_json(self.folder / RUN_NAME, {**made_by, **started})
            self._forget_after(state["step"] if state else 0)
        return state

    def _forget_after(self, step: int) -> None:
        metrics = self.folder / METRICS_NAME
        if metrics.exists():
            lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")]  # a kill may cut the last
            with whole_file(metrics) as partial:
                partial.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))

    def _load(self, *, mmap: bool = False) -> dict[str, Any]:
        return torch.load(self.folder / STATE_NAME, map_location="cpu", weights_only=True, mmap=mmap)

    def save_state(self, state: dict[str, Any]) -> None:
        """Replaces the saved state, whole or not at all."""
        with whole_file(self.folder / STATE_NAME) as partial:
            torch.save(state, partial)

    def log(self, step: int, measured: dict[str, float]) -> None:
        """Adds one line to `metrics.jsonl`."""
        if self.main:
            rounded = {name: float(f"{value:.6g}") for name, value in measured.items()}
            with (self.folder / METRICS_NAME).open("a") as metrics:
                metrics.write(json.dumps({"step": step, **rounded}) + "\n")


def last_metrics(folder: Path) -> dict[str, float]:
    """The newest measured value of every name in the run at `folder`."""
    found: dict[str, float] = {}
    for line in (folder / METRICS_NAME).read_text().splitlines():
        found |= {name: float(value) for name, value in json.loads(line).items()}
    return found


def flatten(config: Any) -> dict[str, Any]:
    """A nested config dataclass as one flat dictionary of settings: the names of its flags."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flat.update(flatten(value) if dataclasses.is_dataclass(value) else {field.name: value})
    return flat
