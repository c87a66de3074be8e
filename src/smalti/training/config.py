"""What there is to say before training: settings, and the phases of a step. The loop itself is in `fit.py`."""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Int64
from torch import Tensor, nn

from smalti.core.errors import UserError, require_at_least_one
from smalti.training.optimizers import BETAS, Optimizer, OptimizerName, make_optimizer


@dataclass(frozen=True)
class FitConfig:
    """How to train. Rates are for the global batch, whatever the number of processes."""

    steps: int = 1_000
    """Optimiser steps in all."""
    batch_size: int = 64
    """Rows a step, over all processes and slices together."""
    accumulation: int = 1
    """Slices in which each process takes its share of the batch, to save memory; the result is the same."""
    gradient_checkpointing: bool = False
    """Compute what blocks of the network held again in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Fuse the network with torch.compile: slow to start, then faster on GPUs."""
    learning_rate: float = 1e-3
    """The optimiser's rate after warm-up."""
    optimizer: OptimizerName = "adamw"
    """`muon` orthogonalises the updates of linear layers, at five times the rate; the rest stays with AdamW. `adamax`
    (arXiv 1412.6980) is selfVAE's."""
    warmup_steps: int = 50
    """Steps over which the rate rises from zero."""
    decay_fraction: float = 0.5
    """Share of the steps, at the end, over which the rate falls to a hundredth along a cosine."""
    weight_decay: float = 0.0
    """Weight decay, on matrices only: decoupled, but for AdaMax."""
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
    keep_states: int = 2
    """How many of the newest states stay on the disk; the one with the best held-out loss stays too."""
    workers: int = 0
    """Processes that prepare batches beside each training process; 0 where the data is in memory."""
    trackers: tuple[str, ...] = ()
    """Where else to log, by Accelerate's names (`tensorboard wandb`); metrics.jsonl is always written."""
    stall_seconds: int = 1_800
    """If no step ends for so long, say where every thread is and exit with status 75; 0 waits for ever."""

    def __post_init__(self) -> None:
        require_at_least_one(
            self, "steps", "batch_size", "accumulation", "log_steps", "report_steps", "save_steps", "keep_states"
        )
        for name in ("warmup_steps", "weight_decay", "workers", "stall_seconds"):
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

    def optimizer_of(self, module: nn.Module, betas: tuple[float, float] = BETAS) -> Optimizer:
        """The optimiser of a module's parameters; `betas` are AdamW's alone."""
        return make_optimizer(
            module, self.optimizer, learning_rate=self.learning_rate, weight_decay=self.weight_decay, betas=betas
        )

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


@runtime_checkable
class LearnsAfterSteps(Protocol):
    """A module within an objective that learns otherwise than by gradients, such as a codebook of running means."""

    def after_step(self, seeds: Int64[Tensor, " b"], bad: Bool[Tensor, ""]) -> None:
        """Learns from all slices of the step, once after the optimiser, on every process.

        Args:
            seeds: of this process's rows, in the order in which the objective saw them.
            bad: whether the step does not count. Saved buffers are put back then; what else changes is the module's.
        """
        ...
