"""Progress bars: updated in place on a terminal, a line now and then in a log file.

Long work also prints its expected time, once, within ten seconds.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

from tqdm import tqdm

from smalti.core.errors import printable

SLOW_SECONDS = 2.0
"""A usual `delay_seconds`: work that ends sooner needs no bar."""
SECONDS_TO_ESTIMATE = 5.0
"""The expected time is computed from the items that were done in this time, without the first, which often includes the
start of other processes."""
SHORTEST_ESTIMATE = 10.0
"""Seconds; if less than this remains, no expected time is printed."""


class Bar(tqdm):
    """A progress bar that prints the expected time of long work on a line of its own.

    Attributes:
        estimates: whether the expected time is still to be printed.
        first: the time after the first items, and their number.
    """

    estimates = True
    first: tuple[float, float] | None = None

    def __iter__(self) -> Iterator[Any]:
        """Yields the items, and counts each one when the next is asked for."""
        with self:
            for item in cast(Iterable[Any], self.iterable):
                yield item
                self.update()

    def update(self, n: Any = 1) -> bool | None:
        """Counts `n` further items."""
        displayed = super().update(n)
        if self.estimates and not self.disable and self.total:
            now = time.time()  # as tqdm measures
            if self.first is None:
                self.first = now, self.n
            elif self.n > self.first[1] and now - self.start_t >= SECONDS_TO_ESTIMATE:
                self.estimates = False
                self.print_estimate((now - self.first[0]) / (self.n - self.first[1]) * (self.total - self.n))
        return displayed

    def print_estimate(self, seconds: float) -> None:
        """Prints the expected time, unless little remains."""
        if seconds >= SHORTEST_ESTIMATE:
            units = f"{self.unit}es" if self.unit.endswith("ch") else f"{self.unit}s"
            remaining = f"for the remaining {self.total - self.n:.0f} {units}"
            self.write(f"{self.desc}: expected time {duration(seconds)} {remaining}", file=sys.stderr)


def bar(
    items: Iterable[Any] | None = None,
    *,
    what: str,
    total: int | None = None,
    initial: int = 0,
    unit: str = "it",
    shown: bool = True,
    delay_seconds: float = 0.0,
) -> Bar:
    """Returns a progress bar.

    Args:
        items: what to iterate over, if anything.
        what: the bar's name.
        total: number of items.
        initial: items done before, by a resumed run.
        unit: name of one item.
        shown: False on all processes but one.
        delay_seconds: no bar is shown for work that ends sooner.
    """
    live = sys.stderr.isatty()
    return Bar(
        items,
        desc=what,
        total=total,
        initial=initial,
        unit=unit,
        disable=not shown,
        dynamic_ncols=live,
        mininterval=0.2 if live else 15,
        smoothing=0.05,
        delay=delay_seconds,
        leave=None if live else True,  # on a terminal only the outermost bar stays
        position=None if live else 0,  # no cursor movements in log files
    )


def counting(progress: Bar) -> Callable[[int, Any], None]:
    """Returns a sampler's callback that advances a progress bar by one step."""

    def count(_step: int, _codes: Any) -> None:
        progress.update()

    return count


def print_note(text: str) -> None:
    """Prints a line on standard error, above any progress bar, with its control characters escaped.

    Notes and warnings name files, classes and sources, which a stranger may have written.
    """
    tqdm.write(printable(text), file=sys.stderr)


def duration(seconds: float) -> str:
    """Returns a duration in words, such as `50 s`, `12 min`, `3 h 20 min` or `2 d 4 h`."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
