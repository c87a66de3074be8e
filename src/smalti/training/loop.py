"""The one training loop. It knows steps, phases, processes, interruption; what is trained, on what loss, it does not.

Every random draw of a step is a function of the run's seed, the step and the row's number in the data set, so a resumed
run repeats an uninterrupted one without any generator's state. What happens between steps is in `upkeep.py`.
"""

import copy
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smalti.core.errors import UserError
from smalti.core.models import Checkpointed
from smalti.core.progress import bar
from smalti.core.randomness import derive, row_seeds
from smalti.training.accelerator import seed_layers, subnormals_flushed
from smalti.training.batches import Batch, RowData, StepRows, batches
from smalti.training.checkpoints_and_logs import OnReport, Upkeep
from smalti.training.config import FitConfig, LearnsAfterSteps, Phase
from smalti.training.ema import EMA
from smalti.training.fsdp import is_split, plan, refuse_engines, shard
from smalti.training.nan_and_stalls import Buffers, Health, StopAgreement, Watchdog, explained, poisoned
from smalti.training.optimizers import clip, step_unless
from smalti.training.run_folder import Run
from smalti.training.signals import Interrupted, received_signals


def fit(
    accelerator: Accelerator,
    phases: Sequence[Phase],
    data: RowData,
    config: FitConfig,
    *,
    model: Checkpointed,
    run: Run,
    held_out: RowData | None = None,
    on_report: OnReport | None = None,
    what: str = "training",
) -> None:
    """Trains `model`, which the phases' objectives contain, and leaves it in `run.folder`; goes on where a run stopped.

    A step whose loss or gradient is not finite changes nothing but its count; after `ROLL_BACK_AFTER` in a row, noticed
    where something is logged, reported or saved, the weights of an earlier state come back and the rows go on.

    Args:
        accelerator: the processes, their device and arithmetic.
        phases: what is done at each step.
        data: what to train on, such as `ImageRows` or `LatentRows`; at least one row.
        config: how to train.
        model: what is averaged and saved.
        run: the folder, and the state in it.
        held_out: rows for the held-out loss, computed with the averaged weights.
        on_report: called on the main process every `report_steps` and at the end, with the number of steps done and the
            model with the averaged weights, in evaluation mode; what it returns is logged. The model is `model` itself,
            or a whole copy where that is split among processes.
        what: the progress bar's name.

    Raises:
        Interrupted: on SIGINT or SIGTERM, at the end of the step in hand.
        UserError: if the batch does not divide among processes and slices, the model cannot be split as Accelerate's
            configuration says, the network has no blocks to compute again, the states differ between processes, memory
            is full, a worker died, or the loss is no longer a number and there is no state to go back to.
    """
    _check(accelerator, config)
    shown = _split(accelerator, phases, model)
    for phase in phases:
        if not is_split(phase.objective):  # what is split is there already
            phase.objective.to(accelerator.device)
    if config.gradient_checkpointing:
        _compute_again(model)
    health, device = Health(accelerator.device), accelerator.device
    with (
        received_signals() as received,
        subnormals_flushed(),
        Watchdog(config.stall_seconds) as watchdog,
        explained(device, _savings(config)),
        bar(
            what=what, total=config.steps, initial=run.step, unit="step", shown=accelerator.is_main_process
        ) as progress,
    ):
        ema = EMA(model, config.ema_decay)
        upkeep = Upkeep(accelerator, phases, config, model, shown, run, ema, health, held_out, on_report, progress)
        steps = range(upkeep.begin(), config.steps)
        if config.compile:
            for phase in phases:
                phase.objective.compile()
        prepared = [_prepare(accelerator, phase) for phase in phases]
        agreement = StopAgreement(accelerator.num_processes)
        for step, batch in zip(steps, _batches(accelerator, data, config, steps), strict=True):
            measured = _step(accelerator, prepared, batch, config, step, health)
            ema.update(step)
            progress.update()
            watchdog.hear(step + 1)
            upkeep.after(step + 1, measured)
            watchdog.hear(step + 1)
            if stop := agreement.after_step(received[0] if received else 0, last=step + 1 == config.steps):
                upkeep.save(step + 1)
                raise Interrupted(step + 1, config.steps, stop)


def _check(accelerator: Accelerator, config: FitConfig) -> None:
    processes, slices = accelerator.num_processes, config.accumulation
    if config.batch_size % (processes * slices):
        among = f"{processes} processes" + (f" of {slices} slices" if slices > 1 else "")
        raise UserError(
            f"a batch of {config.batch_size} does not divide among {among}; change --batch-size"
            + (" or --accumulation" if slices > 1 else "")
        )
    refuse_engines()


def _split(accelerator: Accelerator, phases: Sequence[Phase], model: Checkpointed) -> Checkpointed:
    """Splits the model among processes where Accelerate is to; the model as the main process shows and saves it."""
    how = plan(accelerator)
    if how is None:
        return model
    if len(phases) > 1:
        raise UserError(
            f"{model.kind} is trained in {len(phases)} phases, whose networks FSDP cannot split; launch with "
            "--multi_gpu, where each process holds the whole model"
        )
    shown = copy.deepcopy(model).cpu().eval() if accelerator.is_main_process else model
    shard(phases[0].objective, model.recomputable(), phases[0].optimizer.param_groups, how)
    return shown


def _compute_again(model: Checkpointed) -> None:
    """Gradient checkpointing (arXiv 1604.06174) of the blocks that the model names."""
    blocks = model.recomputable()
    if not blocks:
        raise UserError(f"{model.kind} has no blocks to compute again; leave --gradient-checkpointing out")
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _savings(config: FitConfig) -> list[str]:
    """What a person whose memory is full may try, the best first."""
    again = [] if config.gradient_checkpointing else ["--gradient-checkpointing"]
    more = f"--accumulation {2 * config.accumulation} (the result stays the same, and this run goes on)"
    return [more, *again, "a smaller --batch-size"]


def _batches(accelerator: Accelerator, data: RowData, config: FitConfig, steps: range) -> Iterable[Batch]:
    process, processes = accelerator.process_index, accelerator.num_processes
    rows = StepRows(
        len(data), batch_size=config.batch_size, seed=config.seed, steps=steps, process=process, processes=processes
    )
    # with no workers the data is in memory, perhaps the device's
    pin_memory = accelerator.device.type == "cuda" and config.workers > 0
    return batches(data, rows, workers=config.workers, pin_memory=pin_memory)


@dataclass(frozen=True)
class _Prepared:
    """A phase, its objective as processes share it, what a bad step must not leave behind, and what learns after it."""

    phase: Phase
    wrapped: nn.Module
    buffers: Buffers
    learners: Sequence[LearnsAfterSteps]


def _prepare(accelerator: Accelerator, phase: Phase) -> _Prepared:
    # what is split needs no wrapper, only the arithmetic
    wrapped = accelerator.prepare_model(phase.objective, evaluation_mode=is_split(phase.objective))
    learners = [module for module in phase.objective.modules() if isinstance(module, LearnsAfterSteps)]
    return _Prepared(phase, wrapped, Buffers(phase.objective), learners)


def _step(
    accelerator: Accelerator,
    prepared: Sequence[_Prepared],
    batch: Batch,
    config: FitConfig,
    step: int,
    health: Health,
) -> dict[str, Tensor]:
    """Runs every phase once; what they measured, by name."""
    batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
    batch["seeds"] = derive(row_seeds(config.seed, batch["rows"]), step)
    batch["progress"] = torch.full_like(batch["rows"], step / config.steps, dtype=torch.float32)
    seed_layers(int(derive(torch.tensor(config.seed), step, accelerator.process_index)), accelerator.device)
    measured: dict[str, Tensor] = {}
    skipped = torch.zeros((), dtype=torch.bool, device=accelerator.device)
    for part in prepared:
        phase = part.phase
        for group in phase.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * config.rate(step)
        part.buffers.keep()
        found = _gradients(accelerator, part.wrapped, batch, config.accumulation)
        trained = [parameter for group in phase.optimizer.param_groups for parameter in group["params"]]
        norm = found["gradient_norm"] = clip(trained, config.clip_norm)
        bad = ~norm.isfinite()  # the same on all processes, whose gradients are the same
        step_unless(phase.optimizer, bad)
        for module in part.learners:
            module.after_step(batch["seeds"], bad)
        part.buffers.restore(bad)
        skipped |= bad
        part.wrapped.zero_grad()  # all: a discriminator in the generator's phase has gradients that are not its own
        prefix = f"{phase.name}/" if len(prepared) > 1 else ""
        measured |= {f"{prefix}{name}": value for name, value in found.items()}
    health.count(skipped)
    return measured


def _gradients(accelerator: Accelerator, objective: nn.Module, batch: Batch, slices: int) -> dict[str, Tensor]:
    """Leaves the gradients of the mean loss over the slices in the parameters; means of what the slices measured."""
    sliced = zip(*(tensor.chunk(slices) for tensor in batch.values()), strict=True)
    parts = [dict(zip(batch, tensors, strict=True)) for tensors in sliced]
    means: dict[str, Tensor] = {}
    for number, part in enumerate(parts, 1):
        with ExitStack() as stack:
            if number < slices:
                stack.enter_context(accelerator.no_sync(objective))  # processes exchange gradients once a step
            loss, terms = objective(part)
            accelerator.backward(poisoned(loss) / slices)
        for name, value in {"loss": loss.detach(), **terms}.items():
            means[name] = means.get(name, 0) + value / slices
    return means
