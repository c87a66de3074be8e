"""What the training loop does between steps: logging, held-out losses, reports, saving, and going back.

Here alone it waits for the device. What a step is, `fit.py` says.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from smalti.core.devices import peak_memory_bytes
from smalti.core.errors import UserError
from smalti.core.models import Checkpointed
from smalti.core.randomness import row_seeds
from smalti.training.batches import RowData
from smalti.training.config import FitConfig, Phase
from smalti.training.ema import EMA
from smalti.training.fsdp import gathered, is_split, split_like
from smalti.training.nan_and_stalls import ROLL_BACK_AFTER, Health
from smalti.training.optimizers import restore
from smalti.training.run_folder import Run

HELD_OUT_ROWS = 1_024  # at most: enough for a loss to about one per cent

OnReport: TypeAlias = Callable[[int, Any], Mapping[str, float] | None]
"""Called with the steps done and the model; what it returns is logged."""


@dataclass
class Upkeep:
    """The work between steps, and what a saved state is made of: phases, average, counts of skipped steps, the best.

    Attributes:
        shown: the model as it is saved and reported: itself, or a whole copy on the CPU beside one that is split.
        timed_from, clock: the step and the time from which rows per second are counted.
        best: held-out loss and step of the best state so far.
        went_back: how often the run went back since a step last counted.
    """

    accelerator: Accelerator
    phases: Sequence[Phase]
    config: FitConfig
    model: Checkpointed
    shown: Checkpointed
    run: Run
    ema: EMA
    health: Health
    held_out: RowData | None
    on_report: OnReport | None
    progress: Any
    timed_from: int = 0
    clock: float = 0.0
    best: tuple[float, int | None] = (math.inf, None)
    went_back: int = 0

    def begin(self) -> int:
        """Puts the state that the run goes on from back, on every process; the step to go on from.

        Raises:
            UserError: if the processes do not see the same state.
        """
        for phase in self.phases:
            for group in phase.optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
        step = self.run.step
        mine = torch.tensor([step], device=self.accelerator.device)
        seen = cast(Tensor, self.accelerator.gather(mine)).tolist()
        if len(set(seen)) > 1:
            raise UserError(
                f"the processes see other states in {self.run.folder}, of steps {seen}; put it on a disk they all share"
            )
        if state := self.run.state():
            self._put_back(state)
            self.health.counts.copy_(torch.tensor(state["health"]))
            self.best, self.went_back = (state["best"][0], state["best"][1]), state["went_back"]
        self.accelerator.wait_for_everyone()  # until all have read what the main process may now remove
        self.run.begin()
        self.timed_from, self.clock = step, time.perf_counter()
        return step

    def _put_back(self, state: dict[str, Any]) -> None:
        for phase, saved in zip(self.phases, state["phases"], strict=True):
            there = phase.objective.state_dict()
            weights = {name: split_like(tensor, there.get(name, tensor)) for name, tensor in saved["objective"].items()}
            phase.objective.load_state_dict(weights)
            restore(phase.optimizer, saved["optimizer"])
        self.ema.load_state_dict(state["ema"])

    def after(self, done: int, measured: dict[str, Tensor]) -> None:
        """Does what is due after `done` steps."""
        last, config = done == self.config.steps, self.config
        log, report, save = (
            last or done % every == 0 for every in (config.log_steps, config.report_steps, config.save_steps)
        )
        if not (log or report or save):
            return
        skipped, in_a_row = self.health.read()
        if log:
            self._log(done, measured, skipped)
        if in_a_row >= ROLL_BACK_AFTER:
            self._go_back(done, in_a_row)
        elif not in_a_row:
            self.went_back = 0
        loss = self._report(done) if report else math.inf
        if loss < self.best[0] and not in_a_row:
            self.best, save = (loss, done), True
        if save and (last or not in_a_row):  # amid bad steps nothing has changed, and a good state would have to go
            self.save(done)
        self.timed_from, self.clock = done, time.perf_counter()

    def save(self, done: int) -> None:
        """Saves the model, then the state: where that says that n steps are done, the model of step n is there."""
        main = self.accelerator.is_main_process
        with self._averaged() as model:
            if main:
                model.provenance = {**model.provenance, "steps": done}
                model.save(self.run.folder)
        phases = [
            {"objective": phase.objective.state_dict(), "optimizer": phase.optimizer.state_dict()}
            for phase in self.phases
        ]
        learned = gathered({"phases": phases, "ema": self.ema.state_dict()}, keep=main)
        if main:
            counts = {"health": list(self.health.read()), "best": list(self.best), "went_back": self.went_back}
            state = {"step": done, **learned, **counts}
            self.run.states.save(done, state, keep=self.config.keep_states, best=self.best[1])
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _averaged(self) -> Iterator[Checkpointed]:
        """The model with the averaged weights; on the main process all of it."""
        main = self.accelerator.is_main_process
        with self.ema.applied():
            if is_split(self.phases[0].objective):
                weights = gathered(self.model.state_dict(), keep=main)
                if main:
                    self.shown.load_state_dict(weights)
            yield self.shown

    def _go_back(self, done: int, in_a_row: int) -> None:
        """Takes the weights of a state from before the trouble; steps and rows go on, past those that led into it.

        Each time that no step has counted since, one state further back.
        """
        before = [step for step in self.run.states.steps() if step <= done - in_a_row]
        self.went_back += 1
        if self.went_back > len(before):
            raise UserError(
                f"no loss or gradient was finite in the last {in_a_row} of {done} steps, and no earlier state is left "
                "to go back to; start again with a lower --learning-rate, or with --precision fp32, and --resume never"
            )
        step = before[-self.went_back]
        bad = f"no loss or gradient was finite in the last {in_a_row} of {done} steps"
        self.accelerator.print(f"\n{bad}: taking the weights of step {step}", file=sys.stderr)
        self._put_back(self.run.states.load(step))
        self.accelerator.wait_for_everyone()

    def _log(self, done: int, measured: dict[str, Tensor], skipped: int) -> None:
        values = torch.stack([torch.as_tensor(value).float() for value in measured.values()])
        reduced = cast(Tensor, self.accelerator.reduce(values, reduction="mean"))
        averaged = dict(zip(measured, reduced.tolist(), strict=True))
        speed = (done - self.timed_from) * self.config.batch_size / (time.perf_counter() - self.clock)
        rate = self.config.learning_rate * self.config.rate(done - 1)
        memory = peak_memory_bytes(self.accelerator.device) / 2**30
        state = {"learning_rate": rate, "skipped_steps": skipped, "rows_per_second": speed, "memory_gib": memory}
        self._record(done, {**averaged, **state})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in list(averaged.items())[:2])
        self.progress.set_postfix_str(shown, refresh=False)

    def _record(self, done: int, values: Mapping[str, float]) -> None:
        self.run.log(done, dict(values))
        self.accelerator.log(dict(values), step=done)

    def _report(self, done: int) -> float:
        """Logs what is held out and what `on_report` finds; the held-out loss, infinite if there is none."""
        found: dict[str, float] = {}
        with self._averaged() as model, torch.no_grad():
            for phase in self.phases:
                phase.objective.eval()
            if self.held_out is not None and len(self.held_out):
                found |= evaluate(self.accelerator, self.phases[0].objective, self.held_out, self.config)
            if self.on_report and self.accelerator.is_main_process:
                found |= self.on_report(done, model.to(self.accelerator.device)) or {}
                if is_split(self.phases[0].objective):
                    model.cpu()
            for phase in self.phases:
                phase.objective.train()
        if found:
            self._record(done, found)
        return found.get("held_out_loss", math.inf)


@torch.no_grad()
def evaluate(accelerator: Accelerator, objective: nn.Module, held_out: RowData, config: FitConfig) -> dict[str, float]:
    """The objective's loss and terms over held-out rows, each prefixed `held_out_`; the same draws every time.

    Every process goes through the same rows: there are few, and so nothing need be gathered.
    """
    rows = min(len(held_out), HELD_OUT_ROWS)
    stride, size = len(held_out) / rows, -(-config.batch_size // config.accumulation)
    totals: dict[str, float] = {}
    for start in range(0, rows, size):
        chosen = [int(row * stride) for row in range(start, min(start + size, rows))]
        batch = {name: tensor.to(accelerator.device) for name, tensor in held_out.__getitems__(chosen).items()}
        batch["seeds"] = row_seeds(config.seed, batch["rows"])
        batch["progress"] = torch.ones_like(batch["rows"], dtype=torch.float32)
        with accelerator.autocast():
            loss, terms = objective(batch)
        for name, value in {"loss": loss, **terms}.items():
            totals[f"held_out_{name}"] = totals.get(f"held_out_{name}", 0.0) + float(value) * len(chosen) / rows
    return totals
