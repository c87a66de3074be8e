"""The folder of a training run: its settings and provenance, its metrics, and the snapshot to resume from.

The model's two files are written by `core/models.py`, the snapshots by `snapshots.py`.
"""

import json
import math
import re
import weakref
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias

from smalti.core import locks
from smalti.core.checkpoint_checks import MODEL_NAMES, read_config
from smalti.core.config import FormerSwitch, read_json, without_switches
from smalti.core.errors import UserError
from smalti.core.files import whole_file, write_json
from smalti.core.provenance import METRICS_NAME, RUN_NAME, command, git_commit, logged_metrics, versions
from smalti.training.snapshots import Snapshots

Resume: TypeAlias = Literal["auto", "never"] | int
"""`auto`: resume from the newest intact snapshot, if there is one. `never`: delete the run in the folder. A number:
resume from the snapshot of that step and delete what came after."""

# Settings that may change when a run resumes. Most do not change the result beyond rounding. With more steps, the
# learning rate follows the schedule of the longer run from then on; `patience` and `report_steps` decide where early
# stopping ends. `log_steps` and `save_steps` decide when the NaN guard takes back weights, and to which snapshot.
# `accumulation` changes what dropout draws. Each layer of a run by layers has `steps` of its own.
FREE_SETTINGS = frozenset(
    {
        *("steps", "report_steps", "save_steps", "log_steps", "keep_states", "stall_seconds", "trackers", "patience"),
        *("accumulation", "gradient_checkpointing", "compile", "workers", "out", "resume", "sheet_samples"),
        *("device", "on_bad_image", "layer_steps"),
    }
)
_NOT_FLAGS = {
    "image_fingerprint": "images with the fingerprint",
    "below": "lower layers with the digest",
    "init_digest": "initial weights with the digest",
}
_FIRST = ("prior", "level", "latents", "tokenizer")
"""Settings on which others depend, such as the size of the grid. So a change is reported as one of these."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


def forget(folder: Path) -> None:
    """Deletes the snapshots, the model and the metrics of the run in a folder, which then can only begin again.

    Raises:
        UserError: if another process trains there, or the model or the metrics are not of a training.
    """
    with locks.writing(folder, folder=True):
        _require_own_model(folder)
        _require_own_metrics(folder)
        states = Snapshots(folder)
        states.delete(states.steps())  # first, so that a kill leaves nothing to resume from
        for name in (*MODEL_NAMES, METRICS_NAME):  # `run.json` is replaced when the next run begins
            (folder / name).unlink(missing_ok=True)


def _settings_of(folder: Path) -> dict[str, Any] | None:
    """Returns the settings of the run in a folder; None if it has no `run.json`.

    Raises:
        UserError: if that file was not written by a training.
    """
    path = folder / RUN_NAME
    try:
        return dict(read_json(path)["settings"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise _of_another_program(path) from error


def _require_own_model(folder: Path) -> None:
    """Refuses a folder with a model that no training run made, such as a converted one, which would be replaced."""
    foreign = [name for name in MODEL_NAMES if (folder / name).exists()]
    if foreign and not (folder / RUN_NAME).exists():
        raise UserError(
            f"{folder} has a model that was not trained there, such as a converted one; give another --out "
            f"(--init {folder} starts from its weights), or remove {folder / foreign[-1]} first"
        )


def _require_no_model(folder: Path) -> None:
    """Refuses a folder with the model of a run whose snapshots are missing or damaged, which would be replaced.

    If the first snapshot could not be written, as on a full disk, there is a model too; that run begins again. Its
    model is not that of the last step, nor of a later one than that of the first snapshot, and it logged no later step.
    """
    if not all((folder / name).exists() for name in MODEL_NAMES):
        return
    settings, saved = _settings_of(folder) or {}, read_config(folder)["provenance"].get("steps", math.inf)
    first_only = saved < settings.get("steps", math.inf) and saved <= settings.get("save_steps", math.inf)
    logged = logged_metrics(folder) if (folder / METRICS_NAME).exists() else []
    if not first_only or max((line["step"] for line in logged), default=0) > saved:
        raise UserError(
            f"{folder} has a trained model, but no intact snapshot to resume from; give another --out (--init {folder} "
            "starts from its weights), copy its states/ here too, or give --resume never to delete the model"
        )


def _require_own_metrics(folder: Path) -> None:
    """Refuses the metrics of another program, which would be replaced. A training writes `run.json` before its own."""
    if _settings_of(folder) is None and (folder / METRICS_NAME).exists():
        raise _of_another_program(folder / METRICS_NAME)


def _of_another_program(path: Path) -> UserError:
    return UserError(f"{path} was not written by a training, or is damaged; give another --out, or move it away")


class OtherSettingsError(UserError):
    """The folder holds a run with other settings."""


class Run:
    """A folder that a training run writes to and resumes from. The main process locks it while the object exists.

    Before `begin` nothing is written; only `resume="never"` deletes files earlier.

    Args:
        folder: created if missing.
        settings: the settings that determine the result, as flat JSON values; paths are written as given.
        main: whether this process writes.
        off: the values of settings with which a run behaves as one from before there was the setting; see
            `smalti.core.config.added`.
        resume: see `Resume`. With `never`, other processes must wait until the main process has deleted the old run.
        switches: settings of older versions that others replace; see `smalti.core.config.replacing`.

    Attributes:
        step: number of steps done in the snapshot to resume from; 0 if there is none.
        states: the snapshots.
        rolls_back: whether `resume` is the step of a snapshot.

    Raises:
        UserError: if another process trains in the folder, or it has a model, metrics or a `run.json` that no training
            run made, or a trained model without an intact snapshot; if it has a run with other settings, naming the
            first that differs; or if the snapshot of the requested step is missing or damaged.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        *,
        main: bool = True,
        resume: Resume = "auto",
        off: dict[str, Any] | None = None,
        switches: Mapping[str, FormerSwitch] | None = None,
    ) -> None:
        self.folder, self.main, self.states = folder, main, Snapshots(folder)
        # as JSON reads them: tuples become lists
        self.settings, self.off = (json.loads(json.dumps(each, default=str)) for each in (settings, off or {}))
        if main:
            held = locks.hold(folder, folder=True)
            weakref.finalize(self, held.close)  # also when the process ends
            _require_own_model(folder)
            _require_own_metrics(folder)
        if resume == "never" and main:
            forget(folder)
        self.rolls_back = not isinstance(resume, str)
        self.step = (self.states.newest(warn=main) or 0) if isinstance(resume, str) else self._intact(resume)
        if self.step:
            before = _settings_of(folder)
            if before is None:
                raise UserError(
                    f"{folder} has snapshots, but no {RUN_NAME}, which records their settings; copy it too, or give "
                    "--resume never to delete them"
                )
            self._compare(without_switches(before, switches or {}))
        elif resume == "auto":
            _require_no_model(folder)

    def _intact(self, step: int) -> int:
        if step not in self.states.steps():
            kept = ", ".join(map(str, self.states.steps())) or "none at all"
            raise UserError(f"{self.folder} keeps no state of step {step}; --resume one of these: {kept}")
        if damage := self.states.damage(step):
            raise UserError(f"{self.states.path(step)} is damaged ({damage}); --resume auto resumes from an intact one")
        return step

    def _compare(self, before: dict[str, Any]) -> None:
        def differs(name: str) -> bool:
            # a setting that one of the two versions does not have counts as off
            now, then = (each.get(name, self.off.get(name)) for each in (self.settings, before))
            known = name in self.off or (name in self.settings and name in before)
            return now != then if known else bool(now or then)

        names = sorted((before.keys() | self.settings.keys()) - FREE_SETTINGS - {*_FIRST})
        changed = list(filter(differs, (*_FIRST, *names)))
        if changed:
            first = changed[0]
            then, now = (each.get(first, self.off.get(first)) for each in (before, self.settings))
            raise OtherSettingsError(
                f"{self.folder} holds a run with {_as_typed(first, then)}, not {_as_typed(first, now)}; give the same "
                "settings to resume it, another --out, or --resume never to delete that run"
            )

    def state(self) -> dict[str, Any] | None:
        """Returns the snapshot to resume from; None if there is none."""
        return self.states.load(self.step) if self.step else None

    def end(self, steps: int, patience: int) -> str | None:
        """Ends a run whose last snapshot is that of its last step; returns what happened, None if steps remain.

        With early stopping, the model of the run becomes that of the best snapshot, also if a kill prevented it before,
        and stays as it is if that snapshot is damaged.

        Args:
            steps: number of steps to train for.
            patience: see `FitConfig`.
        """
        best, stopped = self._early_stopping(patience)
        if self.step < steps and not stopped:
            return None
        if self.main and self.rolls_back:
            self._delete_after(self.step)
            self.states.publish(self.step)
        if best is None:
            return f"{self.step} steps"
        ended = (
            f"{'early stopping after ' if stopped else ''}{self.step} steps, with the lowest held-out loss after {best}"
        )
        if damage := self.states.damage(best):
            return f"{ended}; its snapshot {self.states.path(best)} is damaged ({damage}), so the model stays as it is"
        if self.main:
            self.states.publish(best)
        return f"{ended}, whose weights are kept"

    def _early_stopping(self, patience: int) -> tuple[int | None, bool]:
        """Returns the step of the best snapshot, None without early stopping, and whether it has ended the run."""
        best = self.states.best(self.step) if self.step and patience else None
        return best, best is not None and self.step - best >= patience

    def advice(self, steps: int, patience: int, more_steps: str) -> str:
        """Returns the flags that make an ended run train on: after early stopping, more steps alone do not.

        Args:
            steps: number of steps to train for.
            patience: see `FitConfig`.
            more_steps: the flag of the number of steps.
        """
        _, stopped = self._early_stopping(patience)
        patient = ["a larger --patience (0 turns early stopping off)"] if stopped else []
        return " and ".join([*([more_steps] if self.step >= steps else []), *patient])

    def begin(self) -> None:
        """Writes `run.json`, and deletes incomplete snapshots, and metrics and snapshots after the one to resume from.

        The log of a resumed run therefore equals an uninterrupted one's. Call it after every process has read the
        snapshot.
        """
        if self.main:
            made_by = {"command": command(), "settings": self.settings, "versions": versions()}
            started = {"git_commit": git_commit(), "started": datetime.now(UTC).isoformat(timespec="seconds")}
            write_json(self.folder / RUN_NAME, {**made_by, **started})
            self.states.delete_leftovers()
            self._delete_after(self.step)

    def _delete_after(self, step: int) -> None:
        self.states.delete([later for later in self.states.steps() if later > step])
        metrics = self.folder / METRICS_NAME
        if metrics.exists():
            lines = [json.dumps(line) for line in logged_metrics(self.folder) if line["step"] <= step]
            with whole_file(metrics) as partial:
                partial.write_text("".join(f"{line}\n" for line in lines))

    def log(self, step: int, measured: dict[str, float]) -> None:
        """Appends one line to `metrics.jsonl`, without values that are not finite, which JSON cannot represent."""
        if self.main:
            rounded = {name: float(f"{value:.6g}") for name, value in measured.items() if math.isfinite(value)}
            with (self.folder / METRICS_NAME).open("a") as metrics:
                metrics.write(json.dumps({"step": step, **rounded}) + "\n")


def _as_typed(setting: str, value: Any) -> str:
    """Returns a setting as the flag that sets it, or in words if no flag does."""
    if setting in _NOT_FLAGS:
        return f"{_NOT_FLAGS[setting]} {str(value)[:12]}"
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return f"{setting} with the digest {value[:12]}"
    flag = setting.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    if value is None:
        return f"no --{flag}"
    return f"--{flag} {' '.join(map(str, value)) if isinstance(value, list | tuple) else value}"
