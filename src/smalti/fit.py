"""The one training loop. It knows steps, phases, processes, interruption and resumption; what is trained, and on what loss, it does not.

Every random draw of a step is a function of the run's seed, the step and the row's number in the data set, so a resumed run repeats an
uninterrupted one without any generator's state.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from smalti.checkpoint import Checkpointed
from smalti.ema import EMA
from smalti.errors import UserError
from smalti.progress import bar
from smalti.randomness import derive, row_seeds
from smalti.rows import RowData, StepRows, batches
from smalti.runs import Run

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
        objective: `forward(batch)` returns the loss and named detached scalars to log. Everything with a gradient is computed inside it,
            so that a data-parallel wrapper sees it. The batch has what the data set gives, and `seeds`, an int64 for each row.
        optimizer: over those of the objective's parameters that this phase trains; the rates in its groups are multiplied by the schedule.
    """

    name: str
    objective: nn.Module
    optimizer: torch.optim.Optimizer


class Interrupted(Exception):  # noqa: N818 - not an error: the run stopped where it was asked to
    """A signal asked the run to stop, and its state is saved.

    Attributes:
        step: how many steps are done.
        signal_number: SIGINT or SIGTERM.
    """

    def __init__(self, step: int, steps: int, signal_number: int) -> None:
        super().__init__(f"stopped after step {step} of {steps}, state saved; the same command goes on from there")
        self.step, self.signal_number = step, signal_number


def adamw(module: nn.Module, config: FitConfig) -> torch.optim.AdamW:
    """AdamW over a module's parameters, with weight decay on matrices and larger only."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


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
    """Trains `model`, which the phases' objectives contain, and leaves it in `run.folder`; goes on where an earlier call stopped.

    Args:
        data: what to train on, such as `ImageRows` or `LatentRows`.
        held_out: rows for the held-out loss, computed with the averaged weights.
        on_report: called on the main process every `report_steps` and at the end, with the averaged weights in `model`, in evaluation mode.
        what: the progress bar's name.

    Raises:
        Interrupted: on SIGINT or SIGTERM, at the end of the step in hand.
        UserError: if the batch does not divide among the processes, there are fewer rows than one, or the loss is no longer a number.
    """
    if config.batch_size % accelerator.num_processes:
        raise UserError(f"a batch of {config.batch_size} does not divide among {accelerator.num_processes} processes; change --batch-size")
    if not len(data):
        raise UserError("there is nothing to train on: every image fell into the held-out part; give more images")
    run.folder.mkdir(parents=True, exist_ok=True)
    model.to(accelerator.device)
    ema = EMA(model, config.ema_decay)
    objectives = [accelerator.prepare_model(phase.objective) for phase in phases]
    optimizers = [accelerator.prepare_optimizer(phase.optimizer) for phase in phases]
    first_step = _restore(run.load_state(), phases, ema)
    base_rates = [[group["initial_lr"] for group in phase.optimizer.param_groups] for phase in phases]
    loop = _Loop(accelerator, phases, config, model, run, ema, held_out, on_report)
    loader = batches(
        data,
        StepRows(
            len(data),
            batch_size=config.batch_size,
            seed=config.seed,
            first_step=first_step,
            last_step=config.steps,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
        ),
        workers=config.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    with (
        _signals() as received,
        bar(what=what, total=config.steps, initial=first_step, unit="step", shown=accelerator.is_main_process) as progress,
    ):
        for step, host_batch in enumerate(loader, start=first_step):
            batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in host_batch.items()}
            batch["seeds"] = derive(row_seeds(config.seed, batch["rows"]), step)
            torch.manual_seed(int(derive(torch.tensor(config.seed), step, accelerator.process_index)))  # dropout and the like
            measured: dict[str, Tensor] = {}
            for phase, objective, optimizer, rates in zip(phases, objectives, optimizers, base_rates, strict=True):
                for group, rate in zip(phase.optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * config.rate(step)
                loss, terms = objective(batch)
                accelerator.backward(loss)
                norm = accelerator.clip_grad_norm_((p for group in phase.optimizer.param_groups for p in group["params"]), config.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
                prefix = f"{phase.name}/" if len(phases) > 1 else ""
                measured |= {f"{prefix}{name}": value for name, value in {"loss": loss.detach(), **terms, "gradient_norm": norm}.items()}
            ema.update(step)
            progress.update()
            stop = _agree(accelerator, received)
            loop.after(step + 1, measured, progress, stopping=bool(stop))
            if stop and step + 1 < config.steps:
                raise Interrupted(step + 1, config.steps, stop)


class _Loop:
    """What happens between steps: logging, saving, held-out losses and reports."""

    def __init__(
        self,
        accelerator: Accelerator,
        phases: Sequence[Phase],
        config: FitConfig,
        model: Checkpointed,
        run: Run,
        ema: EMA,
        held_out: RowData | None,
        on_report: Callable[[int], None] | None,
    ) -> None:
        self.accelerator, self.phases, self.config, self.model, self.run, self.ema = accelerator, phases, config, model, run, ema
        self.held_out, self.on_report = held_out, on_report
        self.last_logged = time.perf_counter()

    def after(self, done: int, measured: dict[str, Tensor], progress: Any, *, stopping: bool) -> None:
        """What is due after `done` steps."""
        last = done == self.config.steps
        if done % self.config.log_steps == 0 or last:
            self._log(done, measured, progress)
        if done % self.config.report_steps == 0 or last:
            self._report(done)
        if done % self.config.save_steps == 0 or last or stopping:
            self._save(done)

    def _log(self, done: int, measured: dict[str, Tensor], progress: Any) -> None:
        names, values = list(measured), torch.stack([torch.as_tensor(value).float() for value in measured.values()])
        averaged = dict(zip(names, self.accelerator.reduce(values, reduction="mean").tolist(), strict=True))  # pyright: ignore[reportAttributeAccessIssue]
        bad = [name for name, value in averaged.items() if not math.isfinite(value)]
        if bad:
            raise UserError(
                f"{bad[0]} is {averaged[bad[0]]} after step {done}; lower --learning-rate and go on from the last saved state, or use --precision fp32"
            )
        now = time.perf_counter()
        speed = self.config.log_steps * self.config.batch_size / (now - self.last_logged)
        self.last_logged = now
        rate = self.config.learning_rate * self.config.rate(done - 1)
        self.run.log(done, {**averaged, "learning_rate": rate, "rows_per_second": speed})
        progress.set_postfix_str(", ".join(f"{name} {value:.4g}" for name, value in list(averaged.items())[:2]), refresh=False)

    def _report(self, done: int) -> None:
        was_training = self.model.training
        with self.ema.applied(), torch.no_grad():
            for phase in self.phases:
                phase.objective.eval()
            if self.held_out is not None and len(self.held_out):
                self.run.log(done, evaluate(self.accelerator, self.phases[0].objective, self.held_out, self.config))
            if self.on_report and self.accelerator.is_main_process:
                self.on_report(done)
            for phase in self.phases:
                phase.objective.train(was_training)
        self.last_logged = time.perf_counter()

    def _save(self, done: int) -> None:
        if self.accelerator.is_main_process:
            with self.ema.applied():
                self.model.provenance = {**self.model.provenance, "steps": done}
                self.model.save(self.run.folder)
            # the state comes after the model: where it says that n steps are done, the model of step n stands already
            states = [{"objective": phase.objective.state_dict(), "optimizer": phase.optimizer.state_dict()} for phase in self.phases]
            self.run.save_state({"step": done, "phases": states, "ema": self.ema.state_dict()})
        self.accelerator.wait_for_everyone()
        self.last_logged = time.perf_counter()


@torch.no_grad()
def evaluate(accelerator: Accelerator, objective: nn.Module, held_out: RowData, config: FitConfig) -> dict[str, float]:
    """The objective's loss and terms over held-out rows, each prefixed `held_out_`; the same draws every time.

    The same rows on every process: held-out sets are small, and the mean needs no gathering.
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
    return int(accelerator.gather(torch.tensor([mine], device=accelerator.device)).max())  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM; the second one acts as it always does."""
    received: list[int] = []

    def receive(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
