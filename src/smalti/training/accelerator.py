"""Sets up a training process: Accelerate with mixed precision and trackers, layer seeds, subnormal numbers."""

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
    """Returns this process's `Accelerator`. The processes are those of `accelerate launch` or `torchrun`.

    With fp16, Accelerate's `GradScaler` scales the loss in `accelerator.backward`; the loop does the rest (`loop.py`).

    Args:
        precision: of the networks (mixed precision: parameters stay float32).
        trackers: names of further loggers, as Accelerate has them.
        folder: where trackers write their files.

    Raises:
        UserError: for a tracker that is unknown or not installed, for fp16 on a CPU, or as `refuse_engines` does.
    """
    refuse_engines()
    installed = [kind.value for kind in get_available_trackers()]
    for name in trackers:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"there is no tracker {name!r}; Accelerate has {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if name in LoggerType.list() and name not in installed:  # names not in the list are registered by the user
            raise UserError(f"the tracker {name} is not installed; install it (pip install {name}) or leave it out")
    resolved = resolve(precision)
    return Accelerator(
        cpu=best_device().type == "cpu",  # otherwise several processes on CPUs would not form a group
        mixed_precision="no" if resolved == "fp32" else resolved,
        log_with=list(trackers) or None,
        project_dir=folder,
    )


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
