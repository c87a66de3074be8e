"""Stopping when asked to: SIGINT and SIGTERM noted, not obeyed at once, and what a loop raises when it has saved."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(Exception):  # noqa: N818 - not an error: the run stopped where it was asked to
    """A signal asked the run to stop, and its state is saved.

    Attributes:
        step: how many steps are done.
        signal_number: SIGINT or SIGTERM.
    """

    def __init__(self, step: int, steps: int, signal_number: int) -> None:
        super().__init__(f"stopped after step {step} of {steps}, state saved; the same command goes on from there")
        self.step, self.signal_number = step, signal_number


@contextmanager
def received_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM; the second one acts as it always does."""
    received: list[int] = []

    def receive(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
