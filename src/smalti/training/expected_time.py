"""The expected duration of a training, printed once after its first steps."""

import sys
import time
from collections.abc import Callable
from typing import Any

MEASURED_STEPS = 20
"""Steps after the first one, which compiles and allocates, that determine the expected time."""
MOST_SECONDS = 8.0
"""With slow steps the expected time is printed after this long, from the steps until then."""
SHORTEST = 10.0
"""Seconds; a shorter training prints no expected time."""


class ExpectedTime:
    """Measures the first steps of a training and prints how long the remaining ones take.

    Args:
        steps: the steps that this process trains for.
        progress: the progress bar, which the line must not break.
        shown: whether this process prints.
    """

    def __init__(self, steps: range, progress: Any, *, shown: bool) -> None:
        self._steps, self._progress, self._pending = steps, progress, shown and len(steps) > 2
        self._clock = 0.0

    def after_step(self, done: int, wait: Callable[[], Any]) -> None:
        """Prints the expected time if it is known.

        Args:
            done: number of steps done, earlier runs included.
            wait: waits for the device, which computes behind the loop.
        """
        if not self._pending:
            return
        measured = done - self._steps.start - 1
        if measured == 0:
            wait()
            self._clock = time.perf_counter()
        elif measured >= MEASURED_STEPS or time.perf_counter() - self._clock >= MOST_SECONDS:
            wait()
            self._pending = False
            step = (time.perf_counter() - self._clock) / measured
            remaining = step * (self._steps.stop - done)
            if remaining >= SHORTEST:
                text = f"expected time: {duration(remaining)} for the remaining {self._steps.stop - done} steps"
                self._progress.write(text, file=sys.stderr)


def duration(seconds: float) -> str:
    """Returns a duration in words, such as `50 s`, `12 min`, `3 h 20 min` or `2 d 4 h`."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{round(seconds)} s"
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
