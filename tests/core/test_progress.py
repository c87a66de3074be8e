"""The expected time that progress bars print."""

import pytest

from smalti.core.progress import Bar, bar, duration, print_note


@pytest.fixture
def printed(monkeypatch):
    """The lines that bars print beside themselves."""
    lines = []
    monkeypatch.setattr(Bar, "write", lambda self, text, file: lines.append(text))
    return lines


def advance(progress, seconds):
    """Moves everything that a bar has measured to `seconds` earlier."""
    progress.start_t -= seconds
    if progress.first is not None:
        progress.first = progress.first[0] - seconds, progress.first[1]


def test_a_bar_prints_the_expected_time_once_after_five_seconds_without_the_first_item(printed):
    with bar(what="filling", total=600, initial=100, unit="step") as progress:
        advance(progress, 4)
        progress.update()
        progress.update()
        assert not printed
        advance(progress, 2)
        progress.update(3)
        progress.update()
    assert printed == ["filling: expected time 4 min for the remaining 495 steps"]


def test_bars_within_bars_write_no_cursor_movements_to_a_log(capsys):
    with bar(what="training", total=2, unit="step") as outer:
        for _ in bar(range(3), what="held-out loss", unit="batch"):
            pass
        outer.update()
    log = capsys.readouterr().err
    assert "held-out loss: 100%" in log
    assert "\x1b" not in log


def test_a_bar_over_items_prints_it_too(printed):
    progress = bar(range(100), what="features", unit="batch", delay_seconds=2.0)
    for item in progress:
        if item == 10:
            advance(progress, 10)
    assert printed == ["features: expected time 89 s for the remaining 89 batches"]
    assert progress.n == 100


def test_little_remaining_work_and_hidden_bars_print_nothing(printed):
    for settings in ({"initial": 90}, {"shown": False}):
        with bar(what="filling", total=100, **settings) as progress:
            progress.update(2)
            if not progress.disable:
                advance(progress, 9)
            progress.update(4)
    assert not printed


def test_a_single_slow_step_and_no_further_items_are_counted(printed):
    """Samplers that make one step count it, then the steps that they saved: none."""
    with bar(what="sampling", total=1000, unit="step") as progress:
        progress.update(1)
        advance(progress, 6)
        progress.update(0)
        assert not printed
        progress.update(1)
    assert len(printed) == 1


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


def test_notes_escape_control_characters(capsys):
    print_note("class \x1b[2J\x1b[31mred\nblue, café")
    assert capsys.readouterr().err == "class \\x1b[2J\\x1b[31mred\\nblue, café\n"
