"""Comparisons of several variants of the same work, which benchmark sections yield; and number formats for results.

The studies format their results with the same functions. Timing is in `run.py`.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from smalti.core.devices import best_device

NOT_RUN = "not run"
"""Text of a table's cell whose work was not done."""


class Measured(float):
    """The result of a variant that measures itself: seconds per unit of work without its setup, or bytes."""


@dataclass(frozen=True)
class Variant:
    """One implementation of the work that a comparison measures.

    Attributes:
        name: The name in the table.
        work: The function that is timed. Its return value is only for tests, unless it is `Measured`.
        units: The number of units (batches, steps) that one call processes; times are divided by it.
        target: The promised ratio: its result must be at least this many times that of the first variant. None if
            nothing is promised.
    """

    name: str
    work: Callable[[], Any]
    units: int = 1
    target: float | None = None


def in_seconds(seconds: float) -> str:
    """Formats a time with three digits, in s, ms or µs."""
    unit, scale = next((u, s) for u, s in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)) if seconds >= s or u == "µs")
    return f"{seconds / scale:.3g} {unit}"


def in_mebibytes(size_bytes: float) -> str:
    """Formats a size in whole mebibytes."""
    return f"{size_bytes / 2**20:.0f} MiB"


def in_spread(values: Sequence[float], form: str) -> str:
    """Formats the mean of several values with their minimum and maximum; `NOT_RUN` if there are none."""
    if not values:
        return NOT_RUN
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


@dataclass(frozen=True)
class Comparison:
    """Several implementations of the same work, smalti's first.

    Attributes:
        path: The work that is compared, as the table names it.
        variants: The implementations, smalti's first.
        readable: The function that formats a result.
        varies: Whether results vary between runs. If not, each variant is measured once.
    """

    path: str
    variants: Sequence[Variant]
    readable: Callable[[float], str] = in_seconds
    varies: bool = True


def synchronize() -> None:
    """Waits until a CUDA device has finished all queued work."""
    if best_device().type == "cuda":
        torch.cuda.synchronize()
