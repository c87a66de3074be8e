"""Sets up the process's Accelerator: precision, trackers, torch's layer seeds, subnormal numbers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from smalti.core.devices import Precision, best_device, resolve
from smalti.core.errors import UserError
from smalti.training.fsdp import refuse_engines


def accelerator(precision: Precision, trackers: Sequence[str] = (), folder: Path | None = None) -> Accelerator:
    """The process's `Accelerator` in the given precision; processes are those of `accelerate launch` or `torchrun`.

    Args:
        precision: of the networks.
        trackers: Accelerate's names of where else to log.
        folder: where those of them write that write files.

    Raises:
        UserError: for a tracker that is unknown or not installed, or as `refuse_engines` does.
    """
    refuse_engines()
    installed = [kind.value for kind in get_available_trackers()]
    for name in trackers:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"there is no tracker {name!r}; Accelerate knows {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if name in LoggerType.list() and name not in installed:  # the others a person has registered
            raise UserError(f"the tracker {name} is not installed; install it (pip install {name}) or leave it out")
    mixed_precision = "bf16" if resolve(precision) == "bf16" else "no"
    return Accelerator(
        cpu=best_device().type == "cpu",  # or else several processes on CPUs would not see each other
        mixed_precision=mixed_precision,
        log_with=list(trackers) or None,
        project_dir=folder,
    )


@contextmanager
def subnormals_flushed() -> Iterator[None]:
    """Counts subnormal numbers as zero, and afterwards as before: posteriors fade to them, with which CPUs take 2-5
    times as long."""
    before = not bool((torch.full((1,), 2.0**-130) * 1.0).any())  # torch does not say
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def seed_layers(seed: int, device: torch.device) -> None:
    """Seeds what layers of torch's, such as dropout, draw from; they know no other generator."""
    if device.type == "cpu":  # torch's function seeds every kind of device there might be, for a millisecond
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@contextmanager
def tracked(process: Accelerator, settings: Mapping[str, Any]) -> Iterator[None]:
    """Opens the process's trackers, tells them the settings of the run, and closes them at the end."""
    plain = (bool, int, float, str)  # what every tracker takes
    process.init_trackers("smalti", {k: v if isinstance(v, plain) else str(v) for k, v in settings.items()})
    try:
        yield
    finally:
        for tracker in process.trackers:
            tracker.finish()
