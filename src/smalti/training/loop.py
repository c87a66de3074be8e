"""The training loop: steps, phases, micro-batches, processes and interruption, for any model and loss.

Every random draw of a step is a function of the seed of the run, the step and the number of the row in the data set;
dropout depends on seed, step and process. So a resumed run equals an uninterrupted one without any generator state.
What happens between steps is in `checkpoints_and_logs.py`.

Mixed precision: Accelerate runs the objective under autocast. With fp16, `accelerator.backward` multiplies the loss by
the scale of `accelerator.scaler`; here gradients are divided by it before gradient clipping, overflows are skipped by
the NaN guard like any step that is not finite, and the scale is updated once per step. The tests cover fp16 loss
scaling on CPUs; on a GPU, a tokenizer was trained in fp16 for 100 steps.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from jaxtyping import Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smalti.core.errors import UserError
from smalti.core.models import Checkpointed
from smalti.core.progress import bar
from smalti.core.randomness import derive, row_seeds
from smalti.training.accelerator import refuse_accumulation, seed_layers, subnormals_flushed
from smalti.training.batches import Batch, RowData, StepRows, batches
from smalti.training.checkpoints_and_logs import CheckpointsAndLogs, Draw, OnReport
from smalti.training.config import FitConfig, LearnsAfterSteps, Phase
from smalti.training.ema import EMA
from smalti.training.expected_time import ExpectedTime
from smalti.training.fsdp import fsdp_plugin, is_sharded, refuse_engines, shard
from smalti.training.nan_and_stalls import Agreement, Buffers, SkippedSteps, Watchdog, explain_errors, spread_nan
from smalti.training.optimizers import clip, step_unless, unscale
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
    draw: Draw | None = None,
    what: str = "training",
) -> None:
    """Trains `model`, which the phases' objectives contain, and saves it in `run.folder`; resumes a stopped run.

    NaN guard: a step whose loss or gradient is not finite is skipped and counted. After `ROLL_BACK_AFTER` in a row,
    detected at the next log, report or save, the weights are rolled back to an earlier snapshot; step count and data
    order keep advancing.

    Args:
        accelerator: the processes, their device and precision.
        phases: what each step does.
        data: the training rows, such as `ImageRows` or `LatentRows`; at least one.
        config: how to train.
        model: the model to average and save.
        run: the folder, and the snapshot to resume from.
        held_out: rows for the held-out loss, which is computed with the averaged weights.
        on_report: called on the main process every `report_steps` and at the end, with the number of steps done and the
            model with the averaged weights, in evaluation mode; what it returns is logged. The model is `model` itself,
            or a full copy if that is sharded.
        draw: called as `on_report` is, and a first time a minute after the start. It writes pictures of the model and
            returns their file, or None. It must not use torch's global generator or change the model.
        what: the progress bar's name.

    Raises:
        Interrupted: on SIGINT or SIGTERM, at the end of the current step.
        UserError: if the batch does not divide among processes and micro-batches, FSDP cannot shard the model, early
            stopping is on but no rows are held out, gradient checkpointing is on but the network has no blocks for it,
            the processes see different snapshots, memory is full, a data loader worker died, or rollback does not help.
    """
    _check(accelerator, config, held_out)
    full_model = _shard(accelerator, phases, model)
    for phase in phases:
        if not is_sharded(phase.objective):  # sharding has moved it
            phase.objective.to(accelerator.device)
    if config.gradient_checkpointing:
        _checkpoint_gradients(model)
    skipped, device = SkippedSteps(accelerator.device), accelerator.device
    with (
        received_signals() as received,
        subnormals_flushed(),
        Watchdog(config.stall_seconds) as watchdog,
        Agreement(accelerator.num_processes) as agreement,
        explain_errors(device, _memory_remedies(config)),
        bar(
            what=what, total=config.steps, initial=run.step, unit="step", shown=accelerator.is_main_process
        ) as progress,
    ):
        ema = EMA(model, config.ema_decay)
        between = CheckpointsAndLogs(
            accelerator, phases, config, model, full_model, run, ema, skipped, held_out, on_report, draw, progress
        )
        first = between.begin()
        steps = range(first, first if first and between.is_last(first) else config.steps)
        if config.compile:
            for phase in phases:
                graph = _is_graph(phase, config, device, accelerator.num_processes)
                phase.objective.compile(mode="reduce-overhead" if graph else None)
        prepared = [_prepare(accelerator, phase) for phase in phases]
        expected = ExpectedTime(steps, progress, shown=accelerator.is_main_process)
        for step, batch in zip(steps, _batches(accelerator, data, config, steps), strict=True):
            measured = _step(accelerator, prepared, batch, config, step, len(data), skipped)
            ema.update(step)
            progress.update()
            expected.after_step(step + 1, next(iter(measured.values())).item)
            watchdog.progressed(step + 1)
            between.after_step(step + 1, measured)
            watchdog.progressed(step + 1)
            signal_number, last = received[0] if received else 0, between.is_last(step + 1)
            stop, draw_now = agreement.after_step(signal_number, between.first_pictures_due(), last=last)
            if draw_now and not stop:
                between.draw_first(step + 1)
                watchdog.progressed(step + 1)
            if stop:
                raise Interrupted(between.stop(step + 1), config.steps, stop)
            if last:
                break
        between.end()


def _check(accelerator: Accelerator, config: FitConfig, held_out: RowData | None) -> None:
    processes, micro_batches = accelerator.num_processes, config.accumulation
    if config.batch_size % (processes * micro_batches):
        among = f"{processes} processes" + (f" of {micro_batches} micro-batches" if micro_batches > 1 else "")
        raise UserError(
            f"a batch of {config.batch_size} does not divide among {among}; change --batch-size"
            + (" or --accumulation" if micro_batches > 1 else "")
        )
    if config.patience and not held_out:
        raise UserError("--patience needs held-out images, and there are none; leave it out")
    refuse_engines()
    refuse_accumulation(accelerator)


def _shard(accelerator: Accelerator, phases: Sequence[Phase], model: Checkpointed) -> Checkpointed:
    """Shards the model if Accelerate is configured for FSDP. Returns the full model, for the main process to save."""
    plugin = fsdp_plugin(accelerator)
    if plugin is None:
        return model
    if len(phases) > 1:
        raise UserError(
            f"{model.kind} is trained in {len(phases)} phases, whose networks FSDP cannot shard; launch with "
            "--multi_gpu, where each process holds the whole model"
        )
    full_model = copy.deepcopy(model).cpu().eval() if accelerator.is_main_process else model
    shard(phases[0].objective, model.recomputable(), phases[0].optimizer.param_groups, plugin)
    return full_model


def _checkpoint_gradients(model: Checkpointed) -> None:
    """Applies gradient checkpointing (arXiv 1604.06174) to the model's recomputable blocks."""
    blocks = model.recomputable()
    if not blocks:
        raise UserError(f"{model.kind} has no blocks to recompute; leave --gradient-checkpointing out")
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _memory_remedies(config: FitConfig) -> list[str]:
    """Returns what to try if memory is full, the best first."""
    recompute = [] if config.gradient_checkpointing else ["--gradient-checkpointing"]
    accumulate = f"--accumulation {2 * config.accumulation} (with it, this run resumes)"
    return [accumulate, *recompute, "a smaller --batch-size"]


def _is_graph(phase: Phase, config: FitConfig, device: torch.device, processes: int) -> bool:
    """Returns whether the compiled objective of a phase is run as a CUDA graph (docs/gpu.md: 4.3 times faster).

    Not with accumulation, because gradients add up in tensors that the next replay of a graph would overwrite, nor with
    several processes, which exchange gradients within the backward pass.
    """
    return config.compile and phase.cuda_graph and device.type == "cuda" and processes == config.accumulation == 1


def _batches(accelerator: Accelerator, data: RowData, config: FitConfig, steps: range) -> Iterable[Batch]:
    process, processes = accelerator.process_index, accelerator.num_processes
    rows = StepRows(
        len(data), batch_size=config.batch_size, seed=config.seed, steps=steps, process=process, processes=processes
    )
    # without workers the data is in memory, perhaps on the device already
    pin_memory = accelerator.device.type == "cuda" and config.workers > 0
    return batches(data, rows, workers=config.workers, pin_memory=pin_memory)


@dataclass(frozen=True)
class _Prepared:
    """A phase, its objective wrapped for data-parallel training, its buffers, and modules that learn after steps."""

    phase: Phase
    wrapped: nn.Module
    buffers: Buffers
    learners: Sequence[LearnsAfterSteps]


def _prepare(accelerator: Accelerator, phase: Phase) -> _Prepared:
    # in evaluation mode Accelerate adds only autocast: a sharded module needs no data-parallel wrapper
    wrapped = accelerator.prepare_model(phase.objective, evaluation_mode=is_sharded(phase.objective))
    learners = [module for module in phase.objective.modules() if isinstance(module, LearnsAfterSteps)]
    return _Prepared(phase, wrapped, Buffers(phase.objective), learners)


def _step(
    accelerator: Accelerator,
    prepared: Sequence[_Prepared],
    batch: Batch,
    config: FitConfig,
    step: int,
    size: int,
    skipped_steps: SkippedSteps,
) -> dict[str, Tensor]:
    """Runs every phase once. Returns what they measured, by name. `size` is the number of rows of the data."""
    first = step * config.batch_size + accelerator.process_index * len(batch["rows"])
    batch = batch | {"seeds": step_seeds(config, step, batch["rows"], first, size)}
    batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
    batch["progress"] = torch.full_like(batch["rows"], step / config.steps, dtype=torch.float32)
    seed_layers(int(derive(torch.tensor(config.seed), step, accelerator.process_index)), accelerator.device)
    measured: dict[str, Tensor] = {}
    skipped = torch.zeros((), dtype=torch.bool, device=accelerator.device)
    for part in prepared:
        phase = part.phase
        for group in phase.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * config.rate(step)
        part.buffers.keep()
        if _is_graph(phase, config, accelerator.device, accelerator.num_processes):
            torch.compiler.cudagraph_mark_step_begin()
        values = _gradients(accelerator, part.wrapped, batch, config.accumulation)
        if accelerator.scaler is not None:
            unscale(accelerator.scaler, phase.optimizer)
        trained = [parameter for group in phase.optimizer.param_groups for parameter in group["params"]]
        norm = values["gradient_norm"] = clip(trained, config.clip_norm or math.inf)
        bad = ~norm.isfinite()  # equal on all processes, because their gradients are
        step_unless(phase.optimizer, bad)
        for module in part.learners:
            module.after_step(batch["seeds"], bad)
        part.buffers.restore(bad)
        skipped |= bad
        part.wrapped.zero_grad()  # of all parameters: the generator's loss also has gradients in the discriminator
        prefix = f"{phase.name}/" if len(prepared) > 1 else ""
        measured |= {f"{prefix}{name}": value for name, value in values.items()}
    if accelerator.scaler is not None:
        accelerator.scaler.update()
    skipped_steps.count(skipped)
    return measured


def step_seeds(config: FitConfig, step: int, rows: Int64[Tensor, " b"], first: int, size: int) -> Int64[Tensor, " b"]:
    """Returns one seed for each row of a step, equal for any number of processes.

    A step that spans epochs can have a row several times: in each epoch after the step's first, it has another seed.

    Args:
        config: of the training.
        step: counted from 0.
        rows: numbers of rows in the data set.
        first: the position of the first of them in the training, counted over all steps.
        size: the number of rows of the data set.
    """
    seeds = derive(row_seeds(config.seed, rows), step)
    if step * config.batch_size // size == ((step + 1) * config.batch_size - 1) // size:  # all of one epoch
        return seeds
    begun = (first + torch.arange(len(rows), device=rows.device)) // size - step * config.batch_size // size
    return torch.where(begun > 0, derive(seeds, begun), seeds)


def _gradients(accelerator: Accelerator, objective: nn.Module, batch: Batch, count: int) -> dict[str, Tensor]:
    """Gradient accumulation: sums the gradients of `count` micro-batches. Returns the means of what they measured."""
    columns = zip(*(tensor.chunk(count) for tensor in batch.values()), strict=True)
    micro_batches = [dict(zip(batch, tensors, strict=True)) for tensors in columns]
    means: dict[str, Tensor] = {}
    for number, micro_batch in enumerate(micro_batches, 1):
        with ExitStack() as stack:
            if number < count:
                stack.enter_context(accelerator.no_sync(objective))  # processes exchange gradients once per step
            loss, terms = objective(micro_batch)
            accelerator.backward(spread_nan(loss) / count)
        for name, value in {"loss": loss.detach(), **terms}.items():
            means[name] = means.get(name, 0) + value / count
    return means
