"""The training states that a run keeps in its folder: whole, checked before they are used, the newest few and the best.

What is in a state, `fit` says; what else lies in a run's folder is in `runs.py`.
"""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from smalti.core.files import whole_folder, write_json
from smalti.core.models import CONFIG_NAME, WEIGHTS_NAME

STATES_NAME, STATE_NAME, DIGESTS_NAME = "states", "state.pt", "digests.json"


class States:
    """Folders `states/step_00000250`: `state.pt`, the model of that step (so each loads as a checkpoint), and digests.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.run_folder, self.folder = folder, folder / STATES_NAME

    def path(self, step: int) -> Path:
        """Where the state after `step` steps is, or would be."""
        return self.folder / f"step_{step:08}"

    def steps(self) -> list[int]:
        """The steps of all states, whole or damaged, oldest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(int(match[1]) for path in found if (match := re.fullmatch(r"step_(\d+)", path.name)))

    def damage(self, step: int) -> str | None:
        """What is wrong with a state; None if every byte is as it was saved."""
        try:
            digests = json.loads((self.path(step) / DIGESTS_NAME).read_text())["sha256"]
            for name in (STATE_NAME, WEIGHTS_NAME, CONFIG_NAME):
                if _sha256(self.path(step) / name) != digests[name]:
                    return f"the bytes of {name} are not those that were saved"
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    def newest(self, *, speak: bool) -> int | None:
        """The step of the newest whole state; None if there is none.

        Args:
            speak: whether to say, in one line each on standard error, which newer ones are damaged.
        """
        for step in reversed(self.steps()):
            damage = self.damage(step)
            if damage is None:
                return step
            if speak:
                print(f"{self.path(step)} is damaged ({damage}); going on from the state before it", file=sys.stderr)
        return None

    def load(self, step: int) -> dict[str, Any]:
        """A state, on the CPU."""
        return torch.load(self.path(step) / STATE_NAME, map_location="cpu", weights_only=True)

    def save(self, step: int, state: dict[str, Any], *, keep: int, best: int | None) -> None:
        """Adds a state, with the model that lies in the run's folder; then lets go of the older ones.

        Args:
            step: how many steps are done.
            state: tensors, numbers, strings, and lists and dictionaries of them.
            keep: how many of the newest states stay, this one among them.
            best: the step of one more that stays; None if none does.
        """
        self.forget([step])
        with whole_folder(self.path(step)) as partial:
            with (partial / STATE_NAME).open("wb") as file:  # torch's own opening hides why a disk will not take it
                torch.save(state, file)
            for name in (WEIGHTS_NAME, CONFIG_NAME):
                shutil.copyfile(self.run_folder / name, partial / name)
            digests = {file.name: _sha256(file) for file in sorted(partial.iterdir())}
            write_json(partial / DIGESTS_NAME, {"step": step, "sha256": digests})
        self.forget([old for old in self.steps()[:-keep] if old != best])

    def forget(self, steps: list[int]) -> None:
        """Removes states: renamed first, so that one half removed is not taken for one that is damaged."""
        for step in steps:
            if self.path(step).exists():
                condemned = self.folder / f".{self.path(step).name}.removed"
                shutil.rmtree(condemned, ignore_errors=True)
                self.path(step).rename(condemned)
                shutil.rmtree(condemned)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
