"""The command line: flags, what a person sees of an error, and exit statuses."""

import errno
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from smalti import __main__, cli
from smalti.core.errors import SCRIPTS, OneProcessError, UserError, as_invoked
from smalti.scripts import sample, train_prior, train_tokenizer
from smalti.training.signals import Interrupted


@dataclass(frozen=True)
class Inner:
    learning_rate: float = 0.1
    """A rate."""


@dataclass(frozen=True)
class Config:
    """Settings."""

    inner: Inner = field(default_factory=Inner)
    seed: int = 0
    """A seed."""


def run(monkeypatch, command, *arguments, config_class=Config):
    """Runs a command; its exit status, 0 if it came back."""
    monkeypatch.setattr(sys, "argv", ["command.py", *arguments])
    try:
        cli.run(command, config_class, about="About this.")
    except SystemExit as left:
        return left.code
    return 0


def failing(error):
    def command(_config):
        raise error

    return command


def test_flags_have_no_prefixes_and_reach_the_command(monkeypatch):
    seen = []
    assert run(monkeypatch, seen.append, "--learning-rate", "0.5", "--seed", "3") == 0
    assert run(monkeypatch, seen.append, "--seed", "4", config_class=lambda: (Config, Config(Inner(0.2)))) == 0
    assert run(monkeypatch, seen.append, config_class=lambda: Config) == 0
    assert seen == [Config(Inner(0.5), 3), Config(Inner(0.2), 4), Config()]


def test_help_says_what_the_command_does(monkeypatch, capsys):
    assert run(monkeypatch, failing(AssertionError()), "--help") == 0
    shown = capsys.readouterr().out
    assert "About this." in shown
    assert "--learning-rate" in shown
    assert "A rate." in shown


def test_a_flag_of_one_or_several_numbers_names_its_values(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command.py", "--branching", "8", "x"])
    with pytest.raises(SystemExit) as left:
        train_tokenizer.main()
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Error parsing --branching: no type matching INT [INT ...] could be instantiated from ['8', 'x']" in line
    assert "Got errors" not in line
    monkeypatch.setattr(sys, "argv", ["command.py", "--branching", "8", "4", "2", "--depth", "2"])
    with pytest.raises(SystemExit):
        train_tokenizer.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert "branching 8 4 2 has one value for each of 3 layers, but depth is 2; give 2 values of branching" in line


@pytest.mark.parametrize(
    ("main", "wrong", "right"),
    [
        (train_tokenizer.main, "--brunching", "--branching"),
        (train_prior.main, "--unroled-steps", "--unrolled-steps"),
        (sample.main, "--temprature", "--temperature"),
    ],
)
def test_a_wrong_flag_suggests_the_right_one(monkeypatch, capsys, main, wrong, right):
    monkeypatch.setattr(sys, "argv", ["command.py", wrong, "4"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    shown = capsys.readouterr().err
    assert wrong in shown
    assert right in shown
    assert "Traceback" not in shown


def test_two_wrong_flags_suggest_flags_and_no_rules_between_them(monkeypatch, capsys):
    wrong = ["--revive-below", "-1", "--gradient", "rotation"]  # two boxes of suggestions, with a rule between them
    monkeypatch.setattr(sys, "argv", ["command.py", "--tokenizer", "vae", *wrong])
    with pytest.raises(SystemExit):
        train_tokenizer.main()
    shown = capsys.readouterr().err
    assert "Unrecognized options: --revive-below, -1, --gradient, rotation; " in shown
    assert "----" not in shown


@pytest.mark.parametrize("form", [["--tokenizer", "hrqv"], ["--tokenizer=hrqv"]])
def test_a_kind_with_a_typo_suggests_the_right_one(monkeypatch, capsys, form):
    monkeypatch.setattr(sys, "argv", ["train_tokenizer.py", *form])
    with pytest.raises(SystemExit) as left:
        train_tokenizer.main()
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: there is no tokenizer of kind 'hrqv'; did you mean 'hrvq'?\n"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("give more"), 2, "error: give more\n"),
        (Interrupted(3, 10, signal.SIGINT), 130, "\nstopped after step 3 of 10, state saved; the same command"),
        (Interrupted(3, 10, signal.SIGTERM), 143, "\nstopped after step 3 of 10, state saved; the same command"),
        (KeyboardInterrupt(), 130, "\nstopped\n"),
        (OSError(errno.ENOSPC, "no space", "x.h5"), 2, "error: x.h5 cannot be written: the disk is full; make room"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:5] Connection closed by peer [::1]:9"), 1, "error: another process"),
        (OSError(errno.EFBIG, "too large", "x.h5"), 2, "error: x.h5 cannot be written: it is larger than a file may"),
        (
            PermissionError(errno.EACCES, "denied"),
            2,
            "error: a file cannot be written: permission denied; give another",
        ),
        (IsADirectoryError(errno.EISDIR, "is a folder", "out"), 2, "error: out cannot be written: it is a folder"),
    ],
)
def test_what_stops_a_command_is_one_line_and_a_status(monkeypatch, capsys, error, status, said):
    assert run(monkeypatch, failing(error)) == status
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(said)
    assert shown.err.strip().count("\n") == 0


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), OSError(errno.EIO, "the disk is broken"), BrokenPipeError("a worker's")]
)
def test_a_bug_keeps_its_traceback(monkeypatch, error):
    with pytest.raises(type(error)):
        run(monkeypatch, failing(error))


def test_of_several_processes_one_speaks_unless_only_another_has_something_to_say(monkeypatch, capsys):
    monkeypatch.setattr(cli.time, "sleep", pytest.fail)
    for rank, error, lines in [("0", UserError, 1), ("1", UserError, 0), ("1", OneProcessError, 1)]:
        monkeypatch.setenv("RANK", rank)
        assert run(monkeypatch, failing(error("give more"))) == 2
        assert capsys.readouterr().err.count("\n") == lines


def test_an_error_of_another_process_is_printed_unless_the_main_one_fails_too(monkeypatch, capsys):
    """The launcher ends the other processes when the main one has failed, during the time that they wait."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    assert run(monkeypatch, failing(UserError("give more"))) == 2
    assert capsys.readouterr().err == "error: give more (in process 2 of 4)\n"
    assert len(waited) == 1
    assert run(monkeypatch, failing(KeyboardInterrupt())) == 130  # each process is stopped
    assert capsys.readouterr().err == ""


def test_help_that_nobody_reads_to_the_end_is_no_bug():
    """The reader of a pipe ends first, as in `--help | head -1`."""
    read, write = os.pipe()
    os.close(read)
    script = Path(train_prior.__file__).resolve()
    done = subprocess.run(
        [sys.executable, script, "--help"], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize(
    ("failure", "status", "said"),
    [("KeyboardInterrupt", -signal.SIGINT, "\nstopped\n"), ("ZeroDivisionError", 1, "Traceback")],
)
def test_ctrl_c_while_a_command_is_still_importing_is_one_line(tmp_path, failure, status, said):
    """In the midst of the imports: a module of ours stands in for a slow one. A bug there keeps its traceback."""
    (tmp_path / "torch.py").write_text(f"raise {failure}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    script = Path(train_prior.__file__).resolve()
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr[: len(said)]) == (status, said)


def entry(monkeypatch, capsys, *arguments):
    """Runs `smalti ARGUMENTS`; returns exit status, output and errors."""
    monkeypatch.setattr(sys, "argv", ["/usr/bin/smalti", *arguments])
    status = 0
    try:
        __main__.main()
    except SystemExit as left:
        status = left.code
    return status, *capsys.readouterr()


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_smalti_lists_its_commands(monkeypatch, capsys, arguments):
    status, out, _ = entry(monkeypatch, capsys, *arguments)
    assert status in (0, None)
    places = [out.index(f"  {name}  ") for name in ("demo  ", "train-tokenizer", "train-prior  ", "sample  ")]
    assert places == sorted(places)


def test_smalti_runs_the_script_of_that_name(monkeypatch, capsys):
    status, out, _ = entry(monkeypatch, capsys, "sample", "--help")
    assert status in (0, None)
    assert "usage: smalti sample" in out
    assert "$ smalti sample" in out
    assert "scripts/" not in out


def test_unknown_command_suggests_the_nearest(monkeypatch, capsys):
    status, _, err = entry(monkeypatch, capsys, "train_priors")
    assert (status, err) == (2, "error: there is no command 'train_priors'; did you mean `smalti train-prior`?\n")
    assert "`smalti --help` lists the commands" in entry(monkeypatch, capsys, "xyzzy")[2]


def test_texts_name_commands_as_they_were_typed(monkeypatch):
    text = "python scripts/sample.py; accelerate launch --num_processes 8 scripts/train_prior.py --level 1"
    monkeypatch.setattr(sys, "argv", ["scripts/sample.py"])
    assert as_invoked(text) == text
    monkeypatch.setattr(sys, "argv", ["smalti sample"])
    expected = "smalti sample; accelerate launch --num_processes 8 -m smalti train-prior --level 1"
    assert as_invoked(text) == expected


def test_help_texts_are_wrapped_once(monkeypatch, capsys):
    """A field's docstring of several source lines comes out as one paragraph."""

    @dataclass(frozen=True)
    class Long:
        """Settings."""

        value: int = 0
        """A first line that is long enough to be wrapped when it is shown, as it has many words in it, and then
        a second line."""

    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, failing(AssertionError()), "--help", config_class=Long) == 0
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    first = next(number for number, line in enumerate(lines) if "A first line" in line)
    assert "in it, and then a second line." in lines[first + 1]


def test_optional_flags_show_what_to_type_and_one_default(monkeypatch, capsys):
    @dataclass(frozen=True)
    class Optional:
        """Settings."""

        out: Path | None = None
        """A folder [default: beside it]."""
        column: str | None = None
        """A column of build_latents.py."""

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["smalti sample", "--help"])
    with pytest.raises(SystemExit):
        cli.run(failing(AssertionError()), Optional, about="About this.")
    text = " ".join(capsys.readouterr().out.split())
    assert "--out PATH A folder. (default: beside it)" in text
    assert "--column STR A column of smalti build-latents. (default: none)" in text
    assert "None" not in text


def test_bare_names_of_scripts_are_those_of_all_commands(monkeypatch):
    assert {name.replace("_", "-") for name in SCRIPTS} == set(__main__.COMMANDS)
    monkeypatch.setattr(sys, "argv", ["smalti sample"])
    assert as_invoked("sample.py and train_prior.py") == "smalti sample and smalti train-prior"
    assert as_invoked("my/sample.py, resample.py, my-sample.py") == "my/sample.py, resample.py, my-sample.py"


LAUNCHER = """
import os, subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env={**os.environ, "TORCHELASTIC_RUN_ID": "x"})
worker.wait()
print("Traceback of the launcher", file=sys.stderr)
"""
WORKER = """
import sys
from dataclasses import dataclass
from smalti import cli
from smalti.training.signals import Interrupted

@dataclass
class Config:
    value: int = 0

def command(_config):
    raise Interrupted(5, 10, 2)

sys.argv = ["smalti train-prior"]
cli.run(command, Config, about="Trains.")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the message is printed by a forked process")
def test_the_last_line_of_a_stopped_run_comes_after_the_launchers_traceback():
    launched = subprocess.run([sys.executable, "-c", LAUNCHER, WORKER], capture_output=True, text=True, timeout=120)
    lines = [line for line in launched.stderr.splitlines() if line]
    stopped = "stopped after step 5 of 10, state saved; the same command resumes from there"
    assert lines == ["Traceback of the launcher", stopped]


def test_names_that_the_terminal_cannot_show_are_escaped():
    worker = WORKER.replace("raise Interrupted(5, 10, 2)", "print('犬 €uro'); raise cli.UserError('no class 猫')")
    env = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    shown = subprocess.run([sys.executable, "-c", worker], capture_output=True, env=env, timeout=120)
    assert (shown.returncode, shown.stdout) == (2, b"\\u72ac \\u20acuro\n")
    assert shown.stderr == b"error: no class \\u732b\n"


def test_a_missing_compiler_is_one_line(monkeypatch, capsys):
    error = RuntimeError("InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx")
    assert run(monkeypatch, failing(error)) == 2
    assert capsys.readouterr().err == (
        "error: --compile needs a C++ compiler, and none was found: install g++, or leave --compile out\n"
    )
