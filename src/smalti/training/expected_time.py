"""The expected duration of a training, printed once after its first steps."""

import time
from collections.abc import Callable
from typing import Any

from smalti.core.progress import Bar

MEASURED_STEPS = 20
"""Steps after the first one, which compiles and allocates, that determine the expected time."""
MOST_SECONDS = 5.0
"""With slow steps the expected time is printed after this long, from the steps until then."""


class ExpectedTime:
    """Measures the first steps of a training and prints how long the remaining ones take.

    Args:
        steps: the steps that this process trains for.
        progress: the progress bar, which the line must not break.
        shown: whether this process prints.
    """

    def __init__(self, steps: range, progress: Bar, *, shown: bool) -> None:
        progress.estimates = False  # the bar would count the first step, and steps that the device has not done
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
            self._progress.print_estimate(step * (self._steps.stop - done))
