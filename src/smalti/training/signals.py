"""Stopping a command by a signal. Trainings save a snapshot and raise `Interrupted`; all else raises `Stopped`."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn


class Interrupted(Exception):  # noqa: N818 - not an error: the run stopped where it was asked to
    """Raised when a signal stopped the run, after its snapshot was saved.

    Attributes:
        step: number of steps done.
        signal_number: SIGINT or SIGTERM.
    """

    def __init__(self, step: int, steps: int, signal_number: int) -> None:
        super().__init__(f"stopped after step {step} of {steps}, state saved; the same command resumes from there")
        self.step, self.signal_number = step, signal_number


class Stopped(KeyboardInterrupt):  # so that libraries end their workers as after Ctrl-C
    """Raised when SIGTERM or SIGHUP stopped a command that has no snapshot to save.

    Attributes:
        signal_number: SIGTERM or SIGHUP.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__("stopped")
        self.signal_number = signal_number


@contextmanager
def unwound_by_signals() -> Iterator[None]:
    """Raises `Stopped` on SIGTERM and SIGHUP (a closed terminal) within the block, so that locks and temporary files
    are removed.

    Signals that the process ignores, such as SIGHUP under `nohup`, stay ignored.
    """
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = _replaced([number for number in numbers if signal.getsignal(number) != signal.SIG_IGN], _raise_stopped)
    try:
        yield
    finally:
        _restore(before)


def _raise_stopped(number: int, _frame: object) -> NoReturn:
    raise Stopped(number)


@contextmanager
def received_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM within the block; a second signal, of either kind, has its usual effect.

    Only the main thread can; a training on another one is stopped as the program decides.
    """
    received: list[int] = []

    def receive(number: int, _frame: object) -> None:
        received.append(number)
        _restore({each: signal.SIG_DFL if handler is _raise_stopped else handler for each, handler in before.items()})

    before = _replaced([signal.SIGINT, signal.SIGTERM], receive)
    try:
        yield received
    finally:
        _restore(before)


def _replaced(numbers: Sequence[int], handler: Any) -> dict[int, Any]:
    """Sets the handler of signals and returns those before; on other threads than the main one, which cannot, none."""
    on_main_thread = threading.current_thread() is threading.main_thread()
    return {number: signal.signal(number, handler) for number in numbers} if on_main_thread else {}


def _restore(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)
