"""Stopping a run: SIGINT and SIGTERM are collected for the loop, which saves a snapshot and raises `Interrupted`."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(Exception):  # noqa: N818 - not an error: the run stopped where it was asked to
    """Raised when a signal stopped the run, after its snapshot was saved.

    Attributes:
        step: number of steps done.
        signal_number: SIGINT or SIGTERM.
    """

    def __init__(self, step: int, steps: int, signal_number: int) -> None:
        super().__init__(f"stopped after step {step} of {steps}, state saved; the same command resumes from there")
        self.step, self.signal_number = step, signal_number


@contextmanager
def received_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM within the block; a second signal, of either kind, has its usual effect.

    Only the main thread can; a training on another one is stopped as the program decides.
    """
    received: list[int] = []

    def receive(number: int, _frame: object) -> None:
        received.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before: dict[int, Any] = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield received
    finally:
        restore()
