"""Every flag of every command: absurd numbers and names give one line that names the flag, before any work."""

import dataclasses
import errno
import sys
import types
import typing
from pathlib import Path

import pytest

from smalti import cli
from smalti.app.server import App
from smalti.commands import inpaint, presets, sample
from smalti.commands.build_latents import BuildLatents
from smalti.commands.compress import Compress, Decompress
from smalti.commands.inspect_latents import InspectLatents
from smalti.commands.selfvae_modes import SampleMode
from smalti.core import models
from smalti.core.errors import UserError
from smalti.demo import Demo
from smalti.evaluation.report import config_for
from smalti.scripts import evaluate
from smalti.scripts.convert import Convert
from smalti.scripts.convert_latents import ConvertLatents
from smalti.scripts.reproduce import STUDIES

NUMBERS = {int: ("1" + "0" * 30, "-" + "9" * 30), float: ("nan", "inf", "-inf")}
REQUIRED = {"image": "in.png", "codes": "x.smalti", "source": "x", "mode": "generation"}
REQUIRED |= {"images": "x", "test_images": "x", "data": "mnist"}


def config_classes():
    """Yields the dataclass of every command, of every kind of model."""
    for kind in models.kinds("prior"):
        yield from (presets.default_prior_config("small", kind), sample.default_config(kind))
        if kind != "realnvp":
            yield from (inpaint.default_config(kind), config_for("prior", kind), config_for("inpainting", kind))
    yield from (presets.default_config("small", kind) for kind in models.kinds("tokenizer"))
    yield from (config_for(of, "hourglass") for of in ("tokenizer", "modes", "likelihood"))
    yield from (App, Demo, BuildLatents, Compress, Decompress, InspectLatents, SampleMode, Convert, ConvertLatents)
    yield from (study.config_class for study in STUDIES.values())


def numbers(cls):
    """Yields (field, type of number, how many) of a dataclass and of those in it."""
    plain = typing.get_origin(cls) or cls
    parameters = dict(zip(getattr(plain, "__parameters__", ()), typing.get_args(cls), strict=False))
    for name, hint in typing.get_type_hints(plain).items():
        hint = parameters.get(hint, hint) if isinstance(hint, typing.TypeVar) else hint
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if dataclasses.is_dataclass(origin or hint):
            yield from numbers(hint)
        elif origin in (typing.Union, types.UnionType):
            yield from ((name, kind, 1) for kind in arguments if kind in NUMBERS)
        elif origin is tuple and arguments[0] in NUMBERS:
            yield name, arguments[0], len(arguments) - (... in arguments)
        elif hint in NUMBERS:
            yield name, hint, 1


def run(monkeypatch, capsys, config_class, *arguments):
    """Parses a command line for a command that must not run; returns the error line."""
    monkeypatch.setattr(sys, "argv", ["command.py", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.run(lambda _config: pytest.fail("it ran"), lambda: config_class, about="")
    out, err = capsys.readouterr()
    assert (left.value.code, out, err.count("\n"), err[:7]) == (2, "", 1, "error: "), err
    assert err.strip().isprintable()
    assert len(err) < 1100
    return err


def test_absurd_numbers_of_every_flag_are_one_line(monkeypatch, capsys):
    """Each name of a flag once, in the first command that has it, with one of the numbers in turn: parsing is slow."""
    seen = set()
    for chosen in config_classes():
        cls = chosen[0] if isinstance(chosen, tuple) else chosen
        plain = typing.get_origin(cls) or cls
        required = [f for f in dataclasses.fields(plain) if f.default is f.default_factory is dataclasses.MISSING]
        given = [
            word
            for f in required
            if f.name == "study"
            for word in typing.get_args(typing.get_type_hints(plain)["study"])
        ]
        for name in {f.name for f in required} & REQUIRED.keys():
            given += [f"--{name.replace('_', '-')}", REQUIRED[name]]
        for name, kind, count in numbers(cls):
            if (name, kind) in seen:
                continue
            seen.add((name, kind))
            flag = f"--{name.replace('_', '-')}"
            value = NUMBERS[kind][len(seen) % len(NUMBERS[kind])]
            err = run(monkeypatch, capsys, chosen, *given, flag, *[value] * count)
            assert "--" in err.split(";")[0], err  # this flag, or one that must fit it
            assert "Error parsing" not in err or f"Error parsing {flag}" in err, err
    assert len(seen) > 100


@dataclasses.dataclass(frozen=True)
class Names:
    """Settings."""

    prior: tuple[str, ...] = ("hourglass",)
    """A prior."""
    out: Path = Path("out.png")
    """A file."""
    log_steps: int = 1
    """A number."""
    steps: int = 1
    """Another."""

    def __post_init__(self):
        for name in ("log_steps", "steps"):
            if getattr(self, name) == 0:
                raise UserError(f"{name} must not be 0")


@dataclasses.dataclass(frozen=True)
class Nested:
    """Settings."""

    names: Names = dataclasses.field(default_factory=Names)


@pytest.mark.parametrize("flag", ["--out", "--prior"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("n" * 300, "is too long (300 characters)"),
        ("n" * 5000, "is too long (5000 characters)"),
        ("n/" * 2500, "is too long (5000 characters)"),
        ("é" * 200, "is too long (200 characters)"),
        ("a\0b", "has a zero byte"),
        ("", "is empty"),
    ],
)
def test_impossible_names_are_one_line_that_names_the_flag(monkeypatch, capsys, flag, value, message):
    for arguments in ([flag, value], [f"{flag}={value}"]):
        assert run(monkeypatch, capsys, Nested, *arguments).startswith(f"error: {flag} ")
        assert message in run(monkeypatch, capsys, Nested, *arguments)


def test_errors_of_configs_name_the_flag_as_typed(monkeypatch, capsys):
    assert "error: --log-steps must not be 0; --help" in run(monkeypatch, capsys, Nested, "--log-steps", "0")
    assert "error: --steps must not be 0; --help" in run(monkeypatch, capsys, Nested, "--steps", "0")
    monkeypatch.setattr(sys, "argv", ["command.py"])

    def refuse(_config):
        raise UserError("log_steps of log_steps.png and my-log_steps: steps")

    with pytest.raises(SystemExit):
        cli.run(refuse, Nested, about="")
    assert capsys.readouterr().err == "error: --log-steps of log_steps.png and my-log_steps: steps\n"


def test_the_home_folder_is_expanded_after_the_equals_sign(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["command.py", "--out=~/a.png", "--prior", "~/b", "a~c", "hourglass"])
    cli.run(seen.append, Names, about="")
    assert seen == [Names((str(tmp_path / "b"), "a~c", "hourglass"), tmp_path / "a.png")]
    assert cli.chosen("--out", "") == f"{tmp_path}/a.png"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory on cpu; lower --batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "error: out of memory on cpu (Default"),
        (RuntimeError("CUDA out of memory. Tried to"), "error: out of memory on cuda (CUDA out of memory. Tried to);"),
        (RuntimeError("Storage size calculation overflowed"), "error: out of memory (Storage size"),
        (PermissionError(errno.EACCES, "Permission denied", __file__), "cannot be read: Permission denied"),
        (OSError(errno.ENAMETOOLONG, "too long", "n.h5"), "n.h5 cannot be written: its name is too long"),
    ],
)
def test_what_the_system_refuses_is_one_line(monkeypatch, capsys, error, message):
    monkeypatch.setattr(sys, "argv", ["command.py"])
    monkeypatch.setattr("os.access", lambda *_: False)

    def fail(_config):
        raise error

    with pytest.raises(SystemExit) as left:
        cli.run(fail, Names, about="")
    err = capsys.readouterr().err
    assert (left.value.code, err.count("\n"), message in err) == (2, 1, True), err


@pytest.mark.parametrize("of", ["prior", "images"])
def test_help_lists_the_choices_of_a_flag_without_the_absent_one(monkeypatch, capsys, of):
    monkeypatch.setattr(sys, "argv", ["command.py", "--of", of, "--help"])
    with pytest.raises(SystemExit):
        evaluate.main()
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--of {tokenizer,prior,inpainting,likelihood,modes,images} " in shown
    assert "--fit {crop,pad,squash} " in shown
    assert "--image-depth {8,16} " in shown
    assert "None" not in shown
    monkeypatch.setattr(sys, "argv", ["command.py", "--of", "tokenizer", "--fit", "x"])
    with pytest.raises(SystemExit):
        evaluate.main()
    error = capsys.readouterr().err
    assert "invalid choice 'x' for argument '--fit'" in error
    assert "None" not in error
