"""What a training run leaves beside its model: what made it, what it measured, and which state it goes on from.

The model's own two files are in `checkpoint.py`, the keeping of states in `states.py`.
"""

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias

from smalti.core.errors import UserError
from smalti.core.files import whole_file, write_json
from smalti.core.provenance import command, git_commit, versions
from smalti.training.snapshots import States

RUN_NAME, METRICS_NAME = "run.json", "metrics.jsonl"

Resume: TypeAlias = Literal["auto", "never"] | int
"""`auto`: go on from the newest whole state, if there is one. `never`: throw away the run that is there. A number: go
back to the state of that step, forgetting what came after."""

# Settings that may change between a run and its continuation. All but `steps` leave the result as it would have been,
# but for rounding; a run continued with more steps follows the learning rate of the longer run from there on.
FREE_SETTINGS = frozenset(
    {
        *("steps", "report_steps", "save_steps", "log_steps", "keep_states", "stall_seconds", "trackers"),
        *("accumulation", "gradient_checkpointing", "compile", "workers", "out", "resume", "sheet_samples"),
    }
)


class Run:
    """A folder that a training run writes to and goes on from.

    Nothing is written before `begin`, but what `resume="never"` removes.

    Args:
        folder: made if it is not there.
        settings: what decides the result, as flat JSON values; paths are written as they are.
        main: whether this process writes.
        resume: see `Resume`. With `never`, other processes may look only when the main one has removed the old run.

    Attributes:
        step: the steps that are done in the state to go on from; 0 where there is none.
        states: all that are kept.

    Raises:
        UserError: if the folder holds a run with other settings, naming the first that differs; or no whole state of
            the step to go back to.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, main: bool = True, resume: Resume = "auto") -> None:
        self.folder, self.main, self.states = folder, main, States(folder)
        self.settings = json.loads(json.dumps(settings, default=str))  # as it will be read back: tuples become lists
        if resume == "never" and main:
            self.states.forget(self.states.steps())  # first: nothing goes on from half a folder
            for name in (METRICS_NAME, RUN_NAME):
                (folder / name).unlink(missing_ok=True)
        self.step = (self.states.newest(speak=main) or 0) if isinstance(resume, str) else self._whole(resume)
        if self.step:
            self._compare(json.loads((folder / RUN_NAME).read_text())["settings"])

    def _whole(self, step: int) -> int:
        if step not in self.states.steps():
            kept = ", ".join(map(str, self.states.steps())) or "none at all"
            raise UserError(f"{self.folder} keeps no state of step {step}; --resume one of these: {kept}")
        if damage := self.states.damage(step):
            raise UserError(f"{self.states.path(step)} is damaged ({damage}); --resume auto goes on from a whole one")
        return step

    def _compare(self, before: dict[str, Any]) -> None:
        def differs(name: str) -> bool:
            ours, theirs = self.settings.get(name), before.get(name)
            # a setting that one of them does not have is off there
            return ours != theirs if name in self.settings and name in before else bool(ours or theirs)

        changed = sorted(filter(differs, (before.keys() | self.settings.keys()) - FREE_SETTINGS))
        if changed:
            first = changed[0]
            raise UserError(
                f"{self.folder} holds a run with {first}={before.get(first)!r}, not {self.settings.get(first)!r}; "
                "give the same settings to go on, another --out, or --resume never to throw that run away"
            )

    def state(self) -> dict[str, Any] | None:
        """The state to go on from; None if there is none."""
        return self.states.load(self.step) if self.step else None

    def begin(self) -> None:
        """Writes down what makes this run, and forgets what was measured and saved after the state it goes on from.

        So the log of a resumed run equals an uninterrupted one's. Only when every process has read that state.
        """
        if self.main:
            made_by = {"command": command(), "settings": self.settings, "versions": versions()}
            started = {"git_commit": git_commit(), "started": datetime.now(UTC).isoformat(timespec="seconds")}
            write_json(self.folder / RUN_NAME, {**made_by, **started})
            self._forget_after(self.step)
            self.states.forget([step for step in self.states.steps() if step > self.step])

    def _forget_after(self, step: int) -> None:
        metrics = self.folder / METRICS_NAME
        if metrics.exists():
            lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")]  # a kill may cut the last
            with whole_file(metrics) as partial:
                partial.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))

    def log(self, step: int, measured: dict[str, float]) -> None:
        """Adds one line to `metrics.jsonl`; what is not finite is left out, as JSON has no word for it."""
        if self.main:
            rounded = {name: float(f"{value:.6g}") for name, value in measured.items() if math.isfinite(value)}
            with (self.folder / METRICS_NAME).open("a") as metrics:
                metrics.write(json.dumps({"step": step, **rounded}) + "\n")


def last_metrics(folder: Path) -> dict[str, float]:
    """The newest measured value of every name in the run at `folder`."""
    found: dict[str, float] = {}
    for line in (folder / METRICS_NAME).read_text().splitlines():
        found |= {name: float(value) for name, value in json.loads(line).items()}
    return found
