"""The work between training steps: logging, held-out losses, reports, saving snapshots, and rollback.

Only here does the loop synchronize with the device. What a step does is in `loop.py`; how snapshots are stored is in
`snapshots.py`.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from smalti.core.devices import peak_memory_bytes
from smalti.core.errors import UserError
from smalti.core.models import Checkpointed
from smalti.core.progress import SLOW_SECONDS, bar, print_note
from smalti.core.randomness import row_seeds
from smalti.training.batches import RowData
from smalti.training.config import FitConfig, Phase
from smalti.training.ema import EMA
from smalti.training.fsdp import gather_full, is_sharded, split_like
from smalti.training.nan_and_stalls import ROLL_BACK_AFTER, SkippedSteps
from smalti.training.optimizers import restore
from smalti.training.run_folder import Run

HELD_OUT_ROWS = 1_024
"""Largest number of rows of a held-out loss, which determines it to about one per cent."""

FIRST_PICTURES_SECONDS = 60.0
"""The first pictures are drawn this long after the start, if no report came before."""

OnReport: TypeAlias = Callable[[int, Any], Mapping[str, float] | None]
"""Called with the number of steps done and the model; what it returns is logged."""

Draw: TypeAlias = Callable[[Any], Path | None]
"""Draws pictures of the model; returns their file, or None if there are none."""


@dataclass
class CheckpointsAndLogs:
    """Logs, reports, saves and rolls back a run. A snapshot holds the state of phases, EMA, counts and loss scale.

    Attributes:
        full_model: the model to save and report: `model` itself, or its full copy on the CPU if `model` is sharded.
        timed_from, clock: the step and the time from which rows per second are measured.
        best: lowest held-out loss so far and the step of its snapshot.
        rollbacks: number of rollbacks since a step last counted.
        started: the time at which this process began to train.
        drawn: whether pictures have been drawn since then.
    """

    accelerator: Accelerator
    phases: Sequence[Phase]
    config: FitConfig
    model: Checkpointed
    full_model: Checkpointed
    run: Run
    ema: EMA
    skipped: SkippedSteps
    held_out: RowData | None
    on_report: OnReport | None
    draw: Draw | None
    progress: Any
    timed_from: int = 0
    clock: float = 0.0
    best: tuple[float, int | None] = (math.inf, None)
    rollbacks: int = 0
    started: float = 0.0
    drawn: bool = False

    def begin(self) -> int:
        """Restores the snapshot that the run resumes from, on every process. Returns the number of steps done in it.

        Raises:
            UserError: if the processes do not see the same snapshot.
        """
        for phase in self.phases:
            for group in phase.optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
        step = self.run.step
        own = torch.tensor([step], device=self.accelerator.device)
        steps = cast(Tensor, self.accelerator.gather(own)).tolist()
        if len(set(steps)) > 1:
            raise UserError(
                f"the processes see different snapshots in {self.run.folder}, of steps {steps}; "
                "put it on a disk they all share"
            )
        if state := self.run.state():
            self._restore(state)
            self.skipped.counts.copy_(torch.tensor(state["health"]))
            loss, best_step = state["best"]
            if best_step in self.run.states.steps():  # else it was deleted after a better one, which is deleted now
                self.best = (loss, best_step)
            self.rollbacks = state["went_back"]
            if self.accelerator.scaler is not None and "scaler" in state:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        self.accelerator.wait_for_everyone()  # the main process may delete files only after all have read them
        self.run.begin()
        self.timed_from, self.clock = step, time.perf_counter()
        self.started = self.clock
        return step

    def _restore(self, state: dict[str, Any]) -> None:
        for phase, saved in zip(self.phases, state["phases"], strict=True):
            current = phase.objective.state_dict()
            weights = {
                name: split_like(tensor, current.get(name, tensor)) for name, tensor in saved["objective"].items()
            }
            phase.objective.load_state_dict(weights)
            restore(phase.optimizer, saved["optimizer"])
        self.ema.load_state_dict(state["ema"])

    def after_step(self, done: int, measured: dict[str, Tensor]) -> None:
        """Does everything that is due after `done` steps."""
        last, config = self.is_last(done), self.config
        log, report, save = (
            last or done % every == 0 for every in (config.log_steps, config.report_steps, config.save_steps)
        )
        if not (log or report or save):
            return
        skipped, in_a_row = self.skipped.read()
        if log:
            self._log(done, measured, skipped)
        if in_a_row >= ROLL_BACK_AFTER:
            self._roll_back(done, in_a_row)
        elif not in_a_row:
            self.rollbacks = 0
        loss = self._report(done) if report else math.inf
        if loss < self.best[0] and not in_a_row:
            self.best, save = (loss, done), True
        if save and (last or not in_a_row):  # skipped steps changed nothing, and saving would push out a good snapshot
            self.save(done)
        self.timed_from, self.clock = done, time.perf_counter()

    def is_last(self, done: int) -> bool:
        """Returns whether no step follows. With early stopping too, all processes agree: their losses are equal."""
        patience, best = self.config.patience, self.best[1]
        return done == self.config.steps or bool(patience and best is not None and done - best >= patience)

    def save(self, done: int, *, keep: int | None = None) -> None:
        """Saves the model, then the snapshot, so that the model of every complete snapshot is in place.

        Args:
            done: number of steps done.
            keep: number of newest snapshots to keep [default: as configured].
        """
        main = self.accelerator.is_main_process
        with self._averaged() as model:
            if main:
                model.provenance = {**model.provenance, "steps": done}
                model.save(self.run.folder)
        phases = [
            {"objective": phase.objective.state_dict(), "optimizer": phase.optimizer.state_dict()}
            for phase in self.phases
        ]
        learned = gather_full({"phases": phases, "ema": self.ema.state_dict()}, keep=main)
        if main:
            # the names in the file stay what they were, so that older snapshots can be resumed
            counts = {"health": list(self.skipped.read()), "best": list(self.best), "went_back": self.rollbacks}
            state = {"step": done, **learned, **counts}
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
            self.run.states.save(done, state, keep=keep or self.config.keep_states, best=self.best[1])
        self.run.step = done
        self.accelerator.wait_for_everyone()

    def stop(self, done: int) -> int:
        """Saves a snapshot for a run that is stopped, unless its last step is saved; returns the snapshot's step.

        A snapshot within skipped steps does not push out those from before, to which a rollback would go, but takes the
        place of others within them. After a rollback none is saved until a step counts: it would pass for a good one.
        The resumed run repeats these steps.
        """
        in_a_row = self.skipped.read()[1]
        if self.run.step < done and not (self.run.step and self.rollbacks):
            if self.accelerator.is_main_process:
                self.run.states.delete([step for step in self.run.states.steps() if step > done - in_a_row])
            self.save(done, keep=self.config.keep_states + bool(in_a_row))
        return self.run.step

    def end(self) -> None:
        """Ends the run after its last step. With early stopping, the model gets the best weights and is drawn again."""
        ending, best = self.run.end(self.config.steps, self.config.patience), self.best[1]
        if self.config.patience and self.accelerator.is_main_process:
            print_note(f"training has ended: {ending}")
        if self.config.patience and best is not None and best < self.run.step and not self.run.states.damage(best):
            self._restore(self.run.states.load(best))
            with self._evaluated() as model:
                self._draw(best, model)
        self.accelerator.wait_for_everyone()  # the next layer's training loads the model that the main process put here

    @contextmanager
    def _averaged(self) -> Iterator[Checkpointed]:
        """Yields the model with the averaged weights; on the main process in full."""
        main = self.accelerator.is_main_process
        with self.ema.applied():
            if is_sharded(self.phases[0].objective):
                weights = gather_full(self.model.state_dict(), keep=main)
                if main:
                    self.full_model.load_state_dict(weights)
            yield self.full_model

    def _roll_back(self, done: int, in_a_row: int) -> None:
        """Restores the weights of an intact snapshot from before the skipped steps. Step count and data order advance.

        Each further rollback without a good step in between goes one snapshot further back. The loss scale of fp16 is
        not restored: it has fallen with every skipped step.
        """
        states = self.run.states
        before = [step for step in states.steps() if step <= done - in_a_row and not states.damage(step)]
        self.rollbacks += 1
        trouble = f"no loss or gradient was finite in the last {in_a_row} of {done} steps"
        if self.rollbacks > len(before):
            raise UserError(
                f"{trouble}, and no earlier snapshot is left for a rollback; start again with a lower --learning-rate, "
                "or with --precision fp32, and --resume never"
            )
        step = before[-self.rollbacks]
        if self.accelerator.is_main_process:
            print_note(f"{trouble}: taking the weights of step {step} (rollback)")
        self._restore(states.load(step))
        self.skipped.counts[1] = 0  # the restored weights get as many steps before the next rollback
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
        postfix = ", ".join(f"{name} {value:.4g}" for name, value in list(averaged.items())[:2])
        self.progress.set_postfix_str(postfix, refresh=False)

    def _record(self, done: int, values: Mapping[str, float]) -> None:
        self.run.log(done, dict(values))
        self.accelerator.log(dict(values), step=done)

    def _report(self, done: int) -> float:
        """Logs held-out losses and what `on_report` returns. Returns the held-out loss; infinity if there is none."""
        values: dict[str, float] = {}
        with self._evaluated() as model:
            if self.held_out is not None and len(self.held_out):
                values |= held_out_losses(self.accelerator, self.phases[0].objective, self.held_out, self.config)
            self._draw(done, model)
            if self.on_report and self.accelerator.is_main_process:
                values |= self.on_report(done, model.to(self.accelerator.device)) or {}
        if values:
            self._record(done, values)
        return values.get("held_out_loss", math.inf)

    @contextmanager
    def _evaluated(self) -> Iterator[Checkpointed]:
        """Yields the model as `_averaged` does, with all phases in evaluation mode and without gradients."""
        with self._averaged() as model, torch.no_grad():
            for phase in self.phases:
                phase.objective.eval()
            yield model
            if is_sharded(self.phases[0].objective) and self.accelerator.is_main_process:
                model.cpu()  # the full copy
            for phase in self.phases:
                phase.objective.train()

    def first_pictures_due(self) -> bool:
        """Returns whether pictures are due before the first report; only the main process's clock decides."""
        waited = time.perf_counter() - self.started >= FIRST_PICTURES_SECONDS
        return waited and not self.drawn and self.draw is not None and self.accelerator.is_main_process

    def draw_first(self, done: int) -> None:
        """Draws the first pictures; all processes call it after the same step. Nothing is logged, so logs are equal."""
        if self.drawn:
            return
        start = time.perf_counter()
        with self._evaluated() as model:
            self._draw(done, model)
        self.clock += time.perf_counter() - start  # rows per second are those of training

    def _draw(self, done: int, model: Checkpointed) -> None:
        """Draws pictures on the main process, and prints their file the first time."""
        if self.draw and self.accelerator.is_main_process:
            path = self.draw(model.to(self.accelerator.device))
            if path is not None and not self.drawn and done < self.config.steps:
                text = f"pictures after {done} steps: {path}; redrawn every {self.config.report_steps} steps"
                print_note(text)
        self.drawn = True


@torch.compiler.set_stance("force_eager")  # compiling it too took 52 s on an H100 (docs/gpu.md)
@torch.no_grad()
def held_out_losses(
    accelerator: Accelerator, objective: nn.Module, held_out: RowData, config: FitConfig
) -> dict[str, float]:
    """Returns the objective's loss and terms over held-out rows, with the prefix `held_out_`.

    The random draws are the same every time. Every process evaluates the same rows: they are few, and nothing needs to
    be gathered.
    """
    rows = min(len(held_out), HELD_OUT_ROWS)
    stride, size = len(held_out) / rows, -(-config.batch_size // config.accumulation)
    totals: dict[str, float] = {}
    starts, main = range(0, rows, size), accelerator.is_main_process
    for start in bar(starts, what="held-out loss", unit="batch", delay_seconds=SLOW_SECONDS, shown=main):
        numbers = [int(row * stride) for row in range(start, min(start + size, rows))]
        batch = {name: tensor.to(accelerator.device) for name, tensor in held_out.__getitems__(numbers).items()}
        batch["seeds"] = row_seeds(config.seed, batch["rows"])
        batch["progress"] = torch.ones_like(batch["rows"], dtype=torch.float32)
        with accelerator.autocast():
            loss, terms = objective(batch)
        for name, value in {"loss": loss, **terms}.items():
            totals[f"held_out_{name}"] = totals.get(f"held_out_{name}", 0.0) + float(value) * len(numbers) / rows
    return totals
