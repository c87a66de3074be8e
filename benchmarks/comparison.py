"""What a benchmark compares, as data: ways to do the same work, what was promised of them, and how results are told,
those of the reproduced studies too."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from smalti.core.devices import best_device


class Measured(float):
    """What a way returns that measures itself: seconds a unit of work whose start and end do not count, or bytes."""


@dataclass(frozen=True)
class Variant:
    """One way to do the work.

    Attributes:
        name: for the table.
        work: does it. What it returns is for tests, unless it is `Measured`.
        units: how many units (batches, steps) one call does.
        target: how many times that of ours its result must be; None where nothing is promised.
    """

    name: str
    work: Callable[[], Any]
    units: int = 1
    target: float | None = None


def in_seconds(seconds: float) -> str:
    """Three digits, with the unit that fits."""
    unit, scale = next((u, s) for u, s in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)) if seconds >= s or u == "µs")
    return f"{seconds / scale:.3g} {unit}"


def in_mebibytes(size_bytes: float) -> str:
    """Whole mebibytes."""
    return f"{size_bytes / 2**20:.0f} MiB"


def in_spread(values: Sequence[float], form: str) -> str:
    """The mean, and from the least to the most where there are several; `not run` where there is none."""
    if not values:
        return "not run"
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


@dataclass(frozen=True)
class Comparison:
    """One hot path: our way first, then the others.

    Attributes:
        path: what is compared, for the table.
        ways: ours first.
        readable: turns a result into text.
        varies: whether it must be repeated; what is the same every time is measured once.
    """

    path: str
    variants: Sequence[Variant]
    readable: Callable[[float], str] = in_seconds
    varies: bool = True


def synchronize() -> None:
    """Waits until the device has done what it was given."""
    if best_device().type == "cuda":
        torch.cuda.synchronize()
