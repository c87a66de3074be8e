"""Progress bars: updated in place on a terminal, a line now and then in a log file."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

SLOW_SECONDS = 2.0
"""A usual `delay_seconds`: work that ends sooner needs no bar."""


def bar(
    items: Iterable[Any] | None = None,
    *,
    what: str,
    total: int | None = None,
    initial: int = 0,
    unit: str = "it",
    shown: bool = True,
    delay_seconds: float = 0.0,
) -> tqdm:
    """Returns a tqdm progress bar.

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
    return tqdm(
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
    )


def counting(progress: tqdm) -> Callable[[int, Any], None]:
    """Returns a sampler's callback that advances a progress bar by one step."""

    def count(_step: int, _codes: Any) -> None:
        progress.update()

    return count
