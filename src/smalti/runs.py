"""What a training run leaves beside its model: what made it (`run.json`), what it measured (`metrics.jsonl`), where it was (`training_state.pt`)."""

import dataclasses
import json
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from smalti.errors import UserError
from smalti.files import whole_file, write_json

RUN_NAME, METRICS_NAME, STATE_NAME = "run.json", "metrics.jsonl", "training_state.pt"

# Settings that may change between a run and its continuation. All but `steps` leave the result as it would have been; a run continued with
# more steps follows the learning rate of the longer run from there on.
FREE_SETTINGS = frozenset({"steps", "report_steps", "save_steps", "log_steps", "workers", "out", "restart"})


def versions() -> dict[str, str]:
    """Software that decides what numbers come out."""
    found = {"python": platform.python_version()}
    for package in ("smalti", "torch", "accelerate", "datasets", "h5py", "numpy", "pillow", "x-transformers", "rotary-embedding-torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def command() -> str:
    """The command line as typed, without the folders of this machine."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def git_commit() -> str | None:
    """The commit of the checkout that smalti runs from, with `+` if it was changed since; None for an installed wheel."""
    here = Path(__file__).resolve().parent
    try:
        shown = subprocess.run(["git", "describe", "--always", "--dirty=+", "--abbrev=12"], cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return shown.stdout.strip() or None


class Run:
    """A folder that a training run writes to and goes on from.

    Args:
        folder: made if it is not there.
        settings: what decides the result, as flat JSON values.
        main: whether this process writes.
        restart: throw away what an earlier run left here.

    Raises:
        UserError: if the folder holds a run with other settings, naming the first that differs.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, main: bool = True, restart: bool = False) -> None:
        self.folder, self.main = folder, main
        if restart and main:
            for name in (STATE_NAME, METRICS_NAME, RUN_NAME):
                (folder / name).unlink(missing_ok=True)
        self.settings = json.loads(json.dumps(settings))  # as it will be read back: tuples become lists
        if (folder / RUN_NAME).exists():
            self._compare(json.loads((folder / RUN_NAME).read_text())["settings"])
        if main:
            described = {"command": command(), "settings": self.settings, "versions": versions(), "git_commit": git_commit()}
            write_json(folder / RUN_NAME, {**described, "started": datetime.now(UTC).isoformat(timespec="seconds")})

    def _compare(self, before: dict[str, Any]) -> None:
        changed = sorted(name for name in before.keys() | self.settings.keys() if name not in FREE_SETTINGS and before.get(name) != self.settings.get(name))
        if changed and not self.is_new:
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
        state = self.load_state()
        return state is not None and state["step"] >= steps

    def load_state(self) -> dict[str, Any] | None:
        """The newest saved state, or None. Also forgets what was measured after it, so that a resumed log equals an uninterrupted one."""
        if self.is_new:
            return None
        state = torch.load(self.folder / STATE_NAME, map_location="cpu", weights_only=True)
        metrics = self.folder / METRICS_NAME
        if self.main and metrics.exists():
            kept = [line for line in metrics.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= state["step"]]
            with whole_file(metrics) as partial:
                partial.write_text("".join(f"{line}\n" for line in kept))
        return state

    def save_state(self, state: dict[str, Any]) -> None:
        """Replaces the saved state, whole or not at all."""
        with whole_file(self.folder / STATE_NAME) as partial:
            torch.save(state, partial)

    def log(self, step: int, measured: dict[str, float]) -> None:
        """Adds one line to `metrics.jsonl`."""
        if self.main:
            with (self.folder / METRICS_NAME).open("a") as metrics:
                metrics.write(json.dumps({"step": step, **{name: float(f"{value:.6g}") for name, value in measured.items()}}) + "\n")

    def last(self) -> dict[str, float]:
        """The newest measured value of every name."""
        found: dict[str, float] = {}
        if (self.folder / METRICS_NAME).exists():
            for line in (self.folder / METRICS_NAME).read_text().splitlines():
                found.update(json.loads(line))
        return found


def flatten(config: Any) -> dict[str, Any]:
    """A nested config dataclass as one flat dictionary of settings: the names of its flags."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flat.update(flatten(value) if dataclasses.is_dataclass(value) else {field.name: value})
    return flat
