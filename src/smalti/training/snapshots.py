"""Snapshots of a training run: written atomically, verified before use; the newest few and the best are kept.

`checkpoints_and_logs.py` defines what a snapshot contains; `run_folder.py` handles the rest of a run's folder.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from smalti.core.errors import unreadable
from smalti.core.files import file_digest, whole_file, whole_folder, write_json
from smalti.core.models import CONFIG_NAME, WEIGHTS_NAME
from smalti.core.progress import print_note

STATES_NAME, STATE_NAME, DIGESTS_NAME = "states", "state.pt", "digests.json"


class Snapshots:
    """The snapshots of one run, folders such as `states/step_00000250`.

    Each has `state.pt`, the model of that step (so that it loads as a checkpoint), and digests of these files.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        self.run_folder, self.folder = folder, folder / STATES_NAME

    def path(self, step: int) -> Path:
        """Returns the path of the snapshot after `step` steps, whether it exists or not."""
        return self.folder / f"step_{step:08}"

    def steps(self) -> list[int]:
        """Returns the steps of all snapshots, intact or damaged, oldest first."""
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(int(match[1]) for path in paths if (match := re.fullmatch(r"step_(\d+)", path.name)))

    def damage(self, step: int) -> str | None:
        """Returns what is wrong with a snapshot; None if it is intact, byte for byte.

        Raises:
            UserError: if the system does not let the user read it, which is no damage.
        """
        try:
            digests = json.loads((self.path(step) / DIGESTS_NAME).read_text())["sha256"]
            for name in (STATE_NAME, WEIGHTS_NAME, CONFIG_NAME):
                if file_digest(self.path(step) / name) != digests[name]:
                    return f"the bytes of {name} are not those that were saved"
        except PermissionError as error:
            raise unreadable(error.filename or self.path(step), error) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    def newest(self, *, warn: bool) -> int | None:
        """Returns the step of the newest intact snapshot; None if there is none.

        Args:
            warn: whether to print one line on standard error for each newer one that is damaged.
        """
        for step in reversed(self.steps()):
            damage = self.damage(step)
            if damage is None:
                return step
            if warn:
                print_note(f"{self.path(step)} is damaged ({damage}); resuming from the one before it")
        return None

    def best(self, step: int) -> int | None:
        """Returns the step of the best snapshot so far, as an intact one recorded it; None if it is not kept."""
        best = json.loads((self.path(step) / DIGESTS_NAME).read_text()).get("best")
        return best if best in self.steps() else None

    def publish(self, step: int) -> None:
        """Makes the model of a snapshot the model of the run."""
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            with whole_file(self.run_folder / name) as partial:
                shutil.copyfile(self.path(step) / name, partial)

    def load(self, step: int) -> dict[str, Any]:
        """Loads a snapshot's state onto the CPU."""
        return torch.load(self.path(step) / STATE_NAME, map_location="cpu", weights_only=True)

    def save(self, step: int, state: dict[str, Any], *, keep: int, best: int | None) -> None:
        """Adds a snapshot with the model that is in the run's folder, then deletes older ones.

        Args:
            step: number of steps done.
            state: tensors, numbers, strings, and lists and dictionaries of them.
            keep: number of newest snapshots to keep, this one included.
            best: the step of one more to keep, or None.
        """
        self.delete([step])
        with whole_folder(self.path(step)) as partial:
            with (partial / STATE_NAME).open("wb") as file:  # if torch opens the file, its error hides the reason
                torch.save(state, file)
            for name in (WEIGHTS_NAME, CONFIG_NAME):
                shutil.copyfile(self.run_folder / name, partial / name)
            digests = {file.name: file_digest(file) for file in sorted(partial.iterdir())}
            write_json(partial / DIGESTS_NAME, {"step": step, "best": best, "sha256": digests})
        self.delete([old for old in self.steps()[:-keep] if old != best])

    def delete_leftovers(self) -> None:
        """Deletes what kills left of snapshots that were being written or deleted; call it while the run is locked."""
        for path in self.folder.glob(".step_*"):
            shutil.rmtree(path, ignore_errors=True)

    def delete(self, steps: list[int]) -> None:
        """Deletes snapshots. They are renamed first, so that a half-deleted one is not reported as damaged."""
        for step in steps:
            if self.path(step).exists():
                renamed = self.folder / f".{self.path(step).name}.removed"
                shutil.rmtree(renamed, ignore_errors=True)
                self.path(step).rename(renamed)
                shutil.rmtree(renamed)
