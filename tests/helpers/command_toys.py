"""Calls commands in this process, and saves a tiny prior and tokenizer for them."""

import importlib.util
import sys
from pathlib import Path

from helpers.toys import untrained_pair

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(capfd, main, *arguments):
    """Calls a command in this process and folder. Returns (exit status, standard output, standard error)."""
    capfd.readouterr()
    before, sys.argv = sys.argv, [f"{main.__module__.split('.')[-1]}.py", *map(str, arguments)]
    try:
        main()
        status = 0
    except SystemExit as exited:
        status = exited.code
    finally:
        sys.argv = before
    return status, *capfd.readouterr()


def save_pair(folder: Path) -> Path:
    """Saves an untrained prior with its tokenizer as training does: 8x16 pixels, each code for 2x2 of them."""
    prior, tokenizer = untrained_pair()
    prior.provenance = {"tokenizer_digest": tokenizer.digest()}
    prior.save(folder)
    tokenizer.save(folder / "tokenizer")
    return folder


def example(name: str):
    """Loads a program in examples/ as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
