"""Signals: they stop a command in one line and leave no files; a training collects the first one."""

import os
import signal
import sys
from dataclasses import dataclass

import pytest

from smalti import cli
from smalti.core import locks
from smalti.core.files import whole_file
from smalti.training.signals import received_signals, unwound_by_signals


@dataclass(frozen=True)
class Config:
    """Settings: none."""


def run(monkeypatch, command):
    """Runs a command; its exit status, 0 if it came back."""
    monkeypatch.setattr(sys, "argv", ["command.py"])
    try:
        cli.run(command, Config, about="About this.")
    except SystemExit as left:
        return left.code
    return 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_acts(number, second):
    outer = []
    before = {each: signal.signal(each, lambda *_: outer.append("as before")) for each in {number, second}}
    try:
        with received_signals() as received:
            os.kill(os.getpid(), number)
            assert (received, outer) == ([number], [])
            os.kill(os.getpid(), second)
            assert (received, outer) == ([number], ["as before"])
        os.kill(os.getpid(), second)
        assert outer == ["as before"] * 2
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_stop_a_command_in_one_line_and_leave_no_files(monkeypatch, capsys, tmp_path, name):
    number, out = getattr(signal, name), tmp_path / "new" / "a.png"

    def command(_config):
        with locks.claim([out]), whole_file(out) as partial:
            partial.write_bytes(b"half")
            signal.raise_signal(number)

    before = signal.signal(number, signal.SIG_DFL)  # nohup sets another one
    try:
        assert (run(monkeypatch, command), capsys.readouterr().err) == (128 + number, "\nstopped\n")
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_that_are_ignored_stay_ignored(monkeypatch, name):
    """`nohup` starts commands with SIGHUP ignored."""
    before = signal.signal(getattr(signal, name), signal.SIG_IGN)
    try:
        assert run(monkeypatch, lambda _config: signal.raise_signal(getattr(signal, name))) == 0
    finally:
        signal.signal(getattr(signal, name), before)


def test_the_second_signal_of_a_training_ends_it_at_once():
    """Also where a command would otherwise unwind."""
    with unwound_by_signals(), received_signals() as received:
        signal.raise_signal(signal.SIGTERM)
        assert (received, signal.getsignal(signal.SIGTERM)) == ([signal.SIGTERM], signal.SIG_DFL)
