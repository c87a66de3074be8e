"""Progress bars: live on a terminal, a line now and then in a log file."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

SLOW_SECONDS = 2.0
"""For `delay_seconds`: what is usually done sooner needs no bar."""


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
    """A progress bar named `what`. `shown=False` on all processes but one; work done within the delay shows none."""
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
    """A sampler's callback that moves a progress bar by a step."""

    def count(_step: int, _codes: Any) -> None:
        progress.update()

    return count
