"""The expected time that progress bars print."""

import io
import sys

import pytest

from smalti.core.progress import Bar, bar, duration


@pytest.fixture
def printed(monkeypatch):
    """The lines that bars print beside themselves."""
    lines = []
    monkeypatch.setattr(Bar, "write", lambda self, text, file: lines.append(text))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    return lines


def advance(progress, seconds):
    """Moves the start of a bar's work to `seconds` ago."""
    progress.start_t = progress._time() - seconds


def test_a_bar_prints_the_expected_time_once_after_five_seconds(printed):
    with bar(what="filling", total=600, initial=100, unit="step") as progress:
        progress.update()
        assert not printed
        advance(progress, 5)
        progress.update(4)
        progress.update()
    assert printed == ["filling: expected time 8 min for the remaining 495 steps"]


def test_a_bar_over_items_prints_it_too(printed):
    progress = bar(range(100), what="features", unit="image", delay_seconds=2.0)
    for item in progress:
        if item == 9:
            advance(progress, 9)
    assert printed == ["features: expected time 81 s for the remaining 90 images"]
    assert progress.n == 100


def test_little_remaining_work_and_hidden_bars_print_nothing(printed):
    for settings in ({"initial": 92}, {"shown": False}):
        with bar(what="filling", total=100, **settings) as progress:
            if not progress.disable:
                advance(progress, 9)
            progress.update(4)
    assert not printed


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (50.4, "50 s"),
        (89.0, "89 s"),
        (720.0, "12 min"),
        (12_000.0, "3 h 20 min"),
        (187_200.0, "2 d 4 h"),
    ],
)
def test_durations_are_in_words(seconds, text):
    assert duration(seconds) == text
