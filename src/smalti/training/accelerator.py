"""Sets up a training process: Accelerate with mixed precision and trackers, layer seeds, subnormal numbers."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, LoggerType

from smalti.core.devices import Device, Precision, device, resolve
from smalti.core.errors import UserError
from smalti.core.progress import print_note
from smalti.training.fsdp import refuse_engines

T = TypeVar("T")

ACCUMULATION_VARIABLE = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
LONGEST_WAIT = timedelta(days=30)
"""Time for which processes wait for one another: the others wait while the first one decodes all images. The
libraries' timeout is ten minutes on GPUs. A training that hangs is ended by its stall watchdog."""


def accelerator(
    precision: Precision, trackers: Sequence[str] = (), folder: Path | None = None, device_name: Device = "auto"
) -> Accelerator:
    """Returns this process's `Accelerator`. The processes are those of `accelerate launch` or `torchrun`.

    With fp16, Accelerate's `GradScaler` scales the loss in `accelerator.backward`; the loop does the rest (`loop.py`).
    A process may train several models, one after another, each with its own precision. Only the latest `Accelerator`
    may be used, since Accelerate's objects share their settings.

    Args:
        precision: of the networks (mixed precision: parameters stay float32).
        trackers: names of further loggers, as Accelerate has them.
        folder: where trackers write their files.
        device_name: the device to train on; with several GPUs, each process has its own.

    Raises:
        UserError: for a tracker that is unknown or not installed, for fp16 on a CPU, for a device that is not there,
            for gradient accumulation in Accelerate's environment, for another device than that of a group of processes
            that exists, or as `refuse_engines` does.
    """
    refuse_engines()
    note_single_process()
    if (steps := os.environ.get(ACCUMULATION_VARIABLE, "1")) != "1":
        raise _accumulation_error(f"{ACCUMULATION_VARIABLE}={steps}")
    chosen = device(device_name)
    installed = [kind.value for kind in get_available_trackers()]
    for name in trackers:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"there is no tracker {name!r}; Accelerate has {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if name in LoggerType.list() and name not in installed:  # names not in the list are registered by the user
            raise UserError(f"the tracker {name} is not installed; install it (pip install {name}) or leave it out")
    resolved = resolve(precision, chosen)
    mixed_precision = "no" if resolved == "fp32" else resolved
    _forget_other_settings(chosen, mixed_precision)
    return Accelerator(
        cpu=chosen.type == "cpu",  # otherwise several processes on CPUs would not form a group
        mixed_precision=mixed_precision,
        log_with=list(trackers) or None,
        project_dir=folder,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )


def _forget_other_settings(chosen: torch.device, mixed_precision: str) -> None:
    """Lets a further `Accelerator` of this process have another precision and, in a single process, another device.

    Accelerate keeps the first settings of a process and refuses others or, for devices, ignores them. It has no public
    way to forget them.
    """
    settings = AcceleratorState._shared_state or PartialState._shared_state
    if not settings:
        return
    alone, device_differs = settings["num_processes"] == 1, settings["device"].type != chosen.type
    if device_differs and not alone:
        raise UserError(f"these processes are connected on {settings['device'].type}; they cannot train on {chosen}")
    if device_differs or settings.get("_mixed_precision", mixed_precision) != mixed_precision:
        AcceleratorState._reset_state(reset_partial_state=alone)


@contextmanager
def accelerator_kept() -> Iterator[None]:
    """Gives an `Accelerator` that the caller made before its settings back: in a process, all share one state."""
    before = {state: dict(state._shared_state) for state in (PartialState, AcceleratorState)}
    try:
        yield
    finally:
        if before[AcceleratorState] and before[PartialState]["num_processes"] == 1:
            for state, settings in before.items():
                state._shared_state.clear()
                state._shared_state.update(settings)


def refuse_accumulation(process: Accelerator) -> None:
    """Refuses an `Accelerator` with gradient accumulation of its own, which would divide every gradient.

    Raises:
        UserError: if it accumulates more than one step; recommends `--accumulation`.
    """
    if process.gradient_accumulation_steps != 1:
        raise _accumulation_error(f"Accelerate's gradient_accumulation_steps={process.gradient_accumulation_steps}")


@cache
def note_single_process() -> None:
    """Prints a note, once, if `accelerate launch` was asked for several processes and started this one alone.

    It does so with `--cpu`, and on machines without GPUs unless it is given `--multi_gpu`. Only its launcher of one
    process sets `ACCELERATE_USE_CPU`, and for several it also sets the port at which they meet.
    """
    several = {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}  # of torchrun and MPI
    if {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= os.environ.keys() and not several & os.environ.keys():
        print_note(
            "note: accelerate launch was asked for several processes, but starts only one on CPUs; to use several, "
            "start the command with torchrun --nproc_per_node NUMBER"
        )


def _accumulation_error(setting: str) -> UserError:
    return UserError(f"{setting} would divide every gradient; set it to 1, and use --accumulation for micro-batches")


def main_first(process: Accelerator | PartialState, work: Callable[[], T]) -> T:
    """Does the same `work` on every process, on the main one first: it fills caches that the others read.

    Raises:
        UserError: the error of `work`, once no process waits for another.
    """
    results: list[T | UserError] = []
    with process.main_process_first():
        try:
            results.append(work())
        except UserError as error:
            results.append(error)
    (result,) = results
    if isinstance(result, UserError):
        raise result
    return result


@contextmanager
def subnormals_flushed() -> Iterator[None]:
    """Treats subnormal numbers as zero within the block.

    Posteriors decay to subnormal numbers, with which CPUs are 2-5 times slower.
    """
    before = not bool((torch.full((1,), 2.0**-130) * 1.0).any())  # torch has no getter
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def seed_layers(seed: int, device: torch.device) -> None:
    """Seeds torch's global generator, from which torch's layers, such as dropout, draw."""
    if device.type == "cpu":  # torch.manual_seed seeds every possible device type, which takes a millisecond
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@contextmanager
def tracked(process: Accelerator, settings: Mapping[str, Any]) -> Iterator[None]:
    """Opens the trackers, passes them the run's settings, and closes them at the end of the block."""
    accepted = (bool, int, float, str)  # the types that every tracker accepts
    process.init_trackers("smalti", {k: v if isinstance(v, accepted) else str(v) for k, v in settings.items()})
    try:
        yield
    finally:
        for tracker in process.trackers:
            tracker.finish()
