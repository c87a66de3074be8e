"""The expected time of a training."""

import io
import sys

from smalti.core.progress import Bar
from smalti.training import expected_time
from smalti.training.expected_time import ExpectedTime


class Clock:
    """A clock that advances by a fixed time at every step."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class LinesBar(Bar):
    """A progress bar that keeps what is written above it."""

    def __init__(self, steps: range) -> None:
        super().__init__(total=steps.stop, initial=steps.start, desc="training", unit="step", file=io.StringIO())
        self.lines = []

    def write(self, s, file=None, end="\n", nolock=False):
        assert file is sys.stderr
        self.lines.append(s)


def lines(monkeypatch, steps: range, seconds: float, *, shown: bool = True) -> list[tuple[int, str]]:
    """Returns what is printed, each with the number of steps done; the first step takes a hundred seconds longer."""
    clock, bar, printed = Clock(), LinesBar(steps), []
    monkeypatch.setattr(expected_time, "time", clock)
    expected = ExpectedTime(steps, bar, shown=shown)
    for step in steps:
        clock.now += seconds + 100 * (step == steps.start)
        bar.update()
        expected.after_step(step + 1, lambda: None)
        printed += [(step + 1, line) for line in bar.lines[len(printed) :]]
    return printed


def test_the_expected_time_is_printed_once_after_the_first_steps(monkeypatch):
    assert lines(monkeypatch, range(1000), 0.05) == [(21, "training: expected time 49 s for the remaining 979 steps")]
    assert lines(monkeypatch, range(300, 1000), 0.2) == [
        (321, "training: expected time 2 min for the remaining 679 steps")
    ]


def test_slow_steps_print_it_earlier(monkeypatch):
    assert lines(monkeypatch, range(1000), 5) == [(2, "training: expected time 83 min for the remaining 998 steps")]


def test_short_trainings_and_other_processes_print_nothing(monkeypatch):
    assert lines(monkeypatch, range(50), 0.1) == []
    assert lines(monkeypatch, range(5), 0.1) == []
    assert lines(monkeypatch, range(1000), 1, shown=False) == []
