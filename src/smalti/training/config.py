"""Settings of the training loop, the phases of a step, and the interface of modules that learn without gradients.

The loop itself is in `loop.py`.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Int64
from torch import Tensor, nn

from smalti.core.config import require_choices
from smalti.core.errors import UserError, require_at_least_one
from smalti.core.randomness import require_seed
from smalti.training.optimizers import BETAS, Optimizer, OptimizerName, make_optimizer


@dataclass(frozen=True)
class FitConfig:
    """Settings of a training run, in steps, not epochs. Batch size and rates are those of all processes together."""

    steps: int = 1_000
    """Number of optimizer steps."""
    batch_size: int = 64
    """Rows per step, over all processes and micro-batches together."""
    accumulation: int = 1
    """Gradient accumulation: number of micro-batches into which each process splits its share of the batch. Raise it if
    memory is full; the result is the same, except with dropout, whose draws differ, and with the quantizers `dot` and
    `lfq`."""
    gradient_checkpointing: bool = False
    """Recompute activations of the network's blocks in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the network with torch.compile; a prior runs as a CUDA graph on one GPU. It takes a minute at the start;
    then a step of a small prior takes a quarter of the time on a GPU."""
    learning_rate: float = 1e-3
    """Learning rate after warm-up."""
    optimizer: OptimizerName = "adamw"
    """`adamw`; `muon`, which trains linear layers and convolutions with Muon at five times the learning rate, and the
    rest, such as embeddings and the hourglass's maps to queries and keys, with AdamW; or `adamax` (arXiv 1412.6980),
    which selfVAE uses."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises linearly from zero."""
    decay_fraction: float = 0.5
    """Share of the steps, at the end, over which the learning rate falls along a cosine to a hundredth."""
    weight_decay: float = 0.0
    """Weight decay, on matrices only. It is decoupled, except in AdaMax."""
    clip_norm: float = 1.0
    """Gradient clipping: largest norm of all gradients together; longer gradients are scaled down to it. 0 turns it
    off."""
    ema_decay: float = 0.0
    """Decay of the EMA (moving average) of the weights, which is then what is saved; 0 saves the weights themselves."""
    seed: int = 0
    """Seed of initial weights, row order and every random draw."""
    log_steps: int = 25
    """Steps between lines in metrics.jsonl."""
    report_steps: int = 500
    """Steps between held-out losses and pictures. The first pictures are drawn after a minute, if no report was due."""
    save_steps: int = 250
    """Steps between snapshots: the most that a killed run loses."""
    keep_states: int = 2
    """Number of newest snapshots to keep on the disk; the one with the best held-out loss is kept too."""
    patience: int = 0
    """Early stopping: end the training if the held-out loss has not fallen to a new minimum for this many steps, and
    keep the weights of the minimum. 0 trains for all steps and keeps the last weights."""
    workers: int = 0
    """Data loader processes per training process; 0 if the data is in memory."""
    trackers: tuple[str, ...] = ()
    """Further loggers, by Accelerate's names (`tensorboard wandb`); metrics.jsonl is always written."""
    stall_seconds: int = 1_800
    """Stall watchdog: if no step ends for this long, print the stacks of all threads and exit with status 75. 0
    disables it."""

    def __post_init__(self) -> None:
        require_choices(self)
        require_at_least_one(
            self, "steps", "batch_size", "accumulation", "log_steps", "report_steps", "save_steps", "keep_states"
        )
        for name in ("warmup_steps", "weight_decay", "patience", "workers", "stall_seconds", "clip_norm"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must not be negative, not {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate must be above 0, not {self.learning_rate}")
        if not (0 <= self.decay_fraction <= 1 and 0 <= self.ema_decay < 1):
            raise UserError(
                f"decay_fraction must be from 0 to 1, and ema_decay from 0 to below 1, "
                f"not {self.decay_fraction} and {self.ema_decay}"
            )
        require_seed(self.seed)

    def optimizer_of(self, module: nn.Module, betas: tuple[float, float] = BETAS) -> Optimizer:
        """Returns the optimizer of a module's parameters; only AdamW uses `betas`."""
        return make_optimizer(
            module, self.optimizer, learning_rate=self.learning_rate, weight_decay=self.weight_decay, betas=betas
        )

    def rate(self, step: int) -> float:
        """Returns the learning-rate schedule's factor in [0, 1]: linear warm-up, flat, cosine decay to a hundredth."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        decay_steps = self.decay_fraction * self.steps
        progress = max(0.0, (step + 1 - (self.steps - decay_steps)) / decay_steps) if decay_steps else 0.0
        return warm * (0.01 + 0.99 * (1 + math.cos(math.pi * min(1.0, progress))) / 2)


@dataclass(frozen=True)
class Phase:
    """One loss and the optimizer that minimizes it. A step runs every phase in turn.

    Attributes:
        name: prefix of the logged names, if there are several phases.
        objective: `forward(batch)` returns the loss and named detached scalars to log. Everything with a gradient must
            be computed inside it, so that it goes through the data-parallel wrapper. The batch has the columns of the
            data set; `seeds`, int64 per row; and `progress`, the share of the steps done, per row.
        optimizer: over the objective's parameters that this phase trains. The schedule multiplies the learning rates
            of its groups.
        cuda_graph: whether `--compile` runs the objective as a CUDA graph on one GPU. For networks so small that the
            launches of their kernels take longer than their work; all batches must have one shape.
    """

    name: str
    objective: nn.Module
    optimizer: Optimizer
    cuda_graph: bool = False


@runtime_checkable
class LearnsAfterSteps(Protocol):
    """A module within an objective that learns without gradients, such as a codebook of running means."""

    def after_step(self, seeds: Int64[Tensor, " b"], bad: Bool[Tensor, ""]) -> None:
        """Learns from all micro-batches of a step. Called once after the optimizer, on every process.

        Args:
            seeds: of this process's rows, in the order of the objective's batches.
            bad: whether the NaN guard skips this step. Saved buffers are then restored by the loop; the module must
                leave everything else unchanged.
        """
        ...
