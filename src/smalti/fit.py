"""The one training loop. It knows steps, phases, processes, interruption; what is trained, on what loss, it does not.

Every random draw of a step is a function of the run's seed, the step and the row's number in the data set, so a resumed
run repeats an uninterrupted one without any generator's state.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from smalti.checkpoint import Checkpointed
from smalti.ema import EMA
from smalti.errors import UserError
from smalti.optimizers import Optimizer, OptimizerName, make_optimizer
from smalti.progress import bar
from smalti.randomness import derive, row_seeds
from smalti.rows import Batch, RowData, StepRows, batches
from smalti.runs import Run
from smalti.signals import Interrupted, received_signals

HELD_OUT_ROWS = 1_024  # at most: enough for a loss to about one per cent


@dataclass(frozen=True)
class FitConfig:
    """How to train. Rates are for the global batch, whatever the number of processes."""

    steps: int = 1_000
    """Optimiser steps in all."""
    batch_size: int = 64
    """Rows a step, over all processes together."""
    learning_rate: float = 1e-3
    """AdamW's rate after warm-up."""
    optimizer: OptimizerName = "adamw"
    """`muon` orthogonalises the updates of linear layers, at five times the rate; the rest stays with AdamW."""
    warmup_steps: int = 50
    """Steps over which the rate rises from zero."""
    decay_fraction: float = 0.5
    """Share of the steps, at the end, over which the rate falls to a hundredth along a cosine."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, on matrices only."""
    clip_norm: float = 1.0
    """Gradients longer than this are scaled down to it."""
    ema_decay: float = 0.0
    """Decay of the averaged weights that are saved; 0 saves the weights themselves."""
    seed: int = 0
    """Decides the start, the order of the rows and every random draw."""
    log_steps: int = 25
    """Steps between lines in metrics.jsonl."""
    report_steps: int = 500
    """Steps between held-out losses and pictures."""
    save_steps: int = 250
    """Steps between saved states: the most that a killed run loses."""
    workers: int = 0
    """Processes that prepare batches beside each training process; 0 where the data is in memory."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_steps", "report_steps", "save_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "workers"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, not {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be above 0, not {getattr(self, name)}")
        if not (0 <= self.decay_fraction <= 1 and 0 <= self.ema_decay < 1):
            raise UserError(
                f"decay_fraction must be from 0 to 1, and ema_decay from 0 to below 1, "
                f"not {self.decay_fraction} and {self.ema_decay}"
            )
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"seed must fit into 64 bits, which {self.seed} does not")

    def optimizer_of(self, module: nn.Module) -> Optimizer:
        """The optimiser of a module's parameters."""
        return make_optimizer(module, self.optimizer, learning_rate=self.learning_rate, weight_decay=self.weight_decay)

    def rate(self, step: int) -> float:
        """The learning rate's factor in [0, 1] at a step: linear warm-up, flat, cosine down to a hundredth."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        decay_steps = self.decay_fraction * self.steps
        progress = max(0.0, (step + 1 - (self.steps - decay_steps)) / decay_steps) if decay_steps else 0.0
        return warm * (0.01 + 0.99 * (1 + math.cos(math.pi * min(1.0, progress))) / 2)


@dataclass(frozen=True)
class Phase:
    """One loss and the optimiser that lowers it; a step runs every phase in turn.

    Attributes:
        name: put before what the phase logs, where there are several.
        objective: `forward(batch)` returns the loss and named detached scalars to log. Everything with a gradient is
            computed inside it, so that a data-parallel wrapper sees it. The batch has what the data set gives, and
            `seeds`, an int64 for each row.
        optimizer: over those of the objective's parameters that this phase trains; the rates in its groups are
            multiplied by the schedule.
    """

    name: str
    objective: nn.Module
    optimizer: Optimizer


def fit(
    accelerator: Accelerator,
    phases: Sequence[Phase],
    data: RowData,
    config: FitConfig,
    *,
    model: Checkpointed,
    run: Run,
    held_out: RowData | None = None,
    on_report: Callable[[int], None] | None = None,
    what: str = "training",
) -> None:
    """Trains `model`, which the phases' objectives contain, and leaves it in `run.folder`; goes on where a run stopped.

    Args:
        accelerator: the processes, their device and arithmetic.
        phases: what is done at each step.
        data: what to train on, such as `ImageRows` or `LatentRows`; at least one row.
        config: how to train.
        model: what is averaged and saved.
        run: the folder, and the state in it.
        held_out: rows for the held-out loss, computed with the averaged weights.
        on_report: called on the main process every `report_steps` and at the end, with the averaged weights in `model`,
            in evaluation mode.
        what: the progress bar's name.

    Raises:
        Interrupted: on SIGINT or SIGTERM, at the end of the step in hand.
        UserError: if the batch does not divide among the processes, or the loss is no longer a number.
    """
    process, processes = accelerator.process_index, accelerator.num_processes
    if config.batch_size % processes:
        raise UserError(
            f"a batch of {config.batch_size} does not divide among {processes} processes; change --batch-size"
        )
    for phase in phases:
        phase.objective.to(accelerator.device)
    ema = EMA(model, config.ema_decay)
    first_step = _restore(run.begin(), phases, ema)
    wrapped = [accelerator.prepare_model(phase.objective) for phase in phases]
    steps = range(first_step, config.steps)
    rows = StepRows(
        len(data), batch_size=config.batch_size, seed=config.seed, steps=steps, process=process, processes=processes
    )
    # with no workers the data is in memory, perhaps the device's
    pin_memory = accelerator.device.type == "cuda" and config.workers > 0
    loader = batches(data, rows, workers=config.workers, pin_memory=pin_memory)
    with (
        received_signals() as received,
        bar(
            what=what, total=config.steps, initial=first_step, unit="step", shown=accelerator.is_main_process
        ) as progress,
    ):
        between = _BetweenSteps(accelerator, phases, config, model, run, ema, held_out, on_report, progress, first_step)
        for step, batch in zip(steps, loader, strict=True):
            measured = _step(accelerator, phases, wrapped, batch, config, step)
            ema.update(step)
            progress.update()
            between.after(step + 1, measured)
            if stop := _agree(accelerator, received):
                between.save(step + 1, measured)
                raise Interrupted(step + 1, config.steps, stop)


def _step(
    accelerator: Accelerator,
    phases: Sequence[Phase],
    wrapped: Sequence[nn.Module],
    batch: Batch,
    config: FitConfig,
    step: int,
) -> dict[str, Tensor]:
    """Runs every phase once; what they measured, by name."""
    batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
    batch["seeds"] = derive(row_seeds(config.seed, batch["rows"]), step)
    torch.manual_seed(int(derive(torch.tensor(config.seed), step, accelerator.process_index)))  # for layers of torch's
    measured: dict[str, Tensor] = {}
    for phase, objective in zip(phases, wrapped, strict=True):
        for group in phase.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * config.rate(step)
        loss, terms = objective(batch)
        accelerator.backward(loss)
        trained = [parameter for group in phase.optimizer.param_groups for parameter in group["params"]]
        norm = accelerator.clip_grad_norm_(trained, config.clip_norm)
        phase.optimizer.step()
        objective.zero_grad()  # all of it: a discriminator in the generator's phase has gradients that are not its own
        prefix = f"{phase.name}/" if len(phases) > 1 else ""
        found = {"loss": loss.detach(), **terms, "gradient_norm": norm}
        measured |= {f"{prefix}{name}": value for name, value in found.items()}
    return measured


@dataclass
class _BetweenSteps:
    """What happens between steps: logging, held-out losses and reports, saving."""

    accelerator: Accelerator
    phases: Sequence[Phase]
    config: FitConfig
    model: Checkpointed
    run: Run
    ema: EMA
    held_out: RowData | None
    on_report: Callable[[int], None] | None
    progress: Any
    timed_from: int  # the step after which the clock for rows per second was last set

    def __post_init__(self) -> None:
        self.clock = time.perf_counter()

    def after(self, done: int, measured: dict[str, Tensor]) -> None:
        """Does what is due after `done` steps."""
        last, config = done == self.config.steps, self.config
        log, report, save = (
            last or done % every == 0 for every in (config.log_steps, config.report_steps, config.save_steps)
        )
        if log:
            self._log(done, measured)
        if report:
            self._report(done)
        if save:
            self.save(done, measured)
        if log or report or save:
            self.timed_from, self.clock = done, time.perf_counter()

    def save(self, done: int, measured: dict[str, Tensor]) -> None:
        """Saves the model, then the state: where that says that n steps are done, the model of step n is there."""
        self._averaged(done, measured)  # weights that are no longer numbers must not replace those that are
        if self.accelerator.is_main_process:
            with self.ema.applied():
                self.model.provenance = {**self.model.provenance, "steps": done}
                self.model.save(self.run.folder)
            states = [
                {"objective": phase.objective.state_dict(), "optimizer": phase.optimizer.state_dict()}
                for phase in self.phases
            ]
            self.run.save_state({"step": done, "phases": states, "ema": self.ema.state_dict()})
        self.accelerator.wait_for_everyone()

    def _log(self, done: int, measured: dict[str, Tensor]) -> None:
        averaged = self._averaged(done, measured)
        speed = (done - self.timed_from) * self.config.batch_size / (time.perf_counter() - self.clock)
        rate = self.config.learning_rate * self.config.rate(done - 1)
        self.run.log(done, {**averaged, "learning_rate": rate, "rows_per_second": speed})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in list(averaged.items())[:2])
        self.progress.set_postfix_str(shown, refresh=False)

    def _averaged(self, done: int, measured: dict[str, Tensor]) -> dict[str, float]:
        """Means over the processes; refuses what is not finite."""
        values = torch.stack([torch.as_tensor(value).float() for value in measured.values()])
        reduced = cast(Tensor, self.accelerator.reduce(values, reduction="mean"))
        averaged = dict(zip(measured, reduced.tolist(), strict=True))
        for name, value in averaged.items():
            if not math.isfinite(value):
                raise UserError(
                    f"{name} is {value} after step {done}; start again with a lower --learning-rate, or with "
                    "--precision fp32, and --restart"
                )
        return averaged

    def _report(self, done: int) -> None:
        with self.ema.applied(), torch.no_grad():
            for phase in self.phases:
                phase.objective.eval()
            if self.held_out is not None and len(self.held_out):
                self.run.log(done, evaluate(self.accelerator, self.phases[0].objective, self.held_out, self.config))
            if self.on_report and self.accelerator.is_main_process:
                self.on_report(done)
            for phase in self.phases:
                phase.objective.train()


@torch.no_grad()
def evaluate(accelerator: Accelerator, objective: nn.Module, held_out: RowData, config: FitConfig) -> dict[str, float]:
    """The objective's loss and terms over held-out rows, each prefixed `held_out_`; the same draws every time.

    Every process goes through the same rows: there are few, and so nothing need be gathered.
    """
    rows = min(len(held_out), HELD_OUT_ROWS)
    stride = len(held_out) / rows
    totals: dict[str, float] = {}
    for start in range(0, rows, config.batch_size):
        chosen = [int(row * stride) for row in range(start, min(start + config.batch_size, rows))]
        batch = {name: tensor.to(accelerator.device) for name, tensor in held_out.__getitems__(chosen).items()}
        batch["seeds"] = row_seeds(config.seed, batch["rows"])
        with accelerator.autocast():
            loss, terms = objective(batch)
        for name, value in {"loss": loss, **terms}.items():
            totals[f"held_out_{name}"] = totals.get(f"held_out_{name}", 0.0) + float(value) * len(chosen) / rows
    return totals


def _restore(state: dict[str, Any] | None, phases: Sequence[Phase], ema: EMA) -> int:
    """Puts a saved state back; the step to go on from."""
    for phase in phases:
        for group in phase.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
    if state is None:
        return 0
    for phase, saved in zip(phases, state["phases"], strict=True):
        phase.objective.load_state_dict(saved["objective"])
        phase.optimizer.load_state_dict(saved["optimizer"])
    ema.load_state_dict(state["ema"])
    return state["step"]


def _agree(accelerator: Accelerator, received: list[int]) -> int:
    """The signal that any process received, on all of them: they must stop after the same step. 0 if none did."""
    mine = received[0] if received else 0
    if accelerator.num_processes == 1:
        return mine
    return int(cast(Tensor, accelerator.gather(torch.tensor([mine], device=accelerator.device))).max())
