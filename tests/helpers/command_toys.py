"""Commands called in this process, and a tiny pair of models on disk for them."""

import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from helpers.toys import untrained_pair


def run(capfd, main, *arguments):
    """Calls a command in this process, in the current folder: (exit status, standard output, standard error)."""
    AcceleratorState._reset_state(reset_partial_state=True)
    capfd.readouterr()
    before, sys.argv = sys.argv, [f"{main.__module__.split('.')[-1]}.py", *map(str, arguments)]
    try:
        main()
        status = 0
    except SystemExit as left:
        status = left.code
    finally:
        sys.argv = before
    return status, *capfd.readouterr()


def save_pair(folder: Path) -> Path:
    """A prior's folder as training leaves it, of models that were not trained: 8x16 pixels, codes of two pixels."""
    prior, tokenizer = untrained_pair()
    prior.provenance = {"tokenizer_digest": tokenizer.digest()}
    prior.save(folder)
    tokenizer.save(folder / "tokenizer")
    return folder
