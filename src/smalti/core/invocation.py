"""How this program was started, and texts that name commands in that form: a script of a checkout, or `smalti COMMAND`.

It imports nothing large, so that help texts and errors are fast.
"""

import re
import sys
from pathlib import Path

PROGRAM = "smalti"
_SCRIPT = re.compile(r"(?:(?P<launch>accelerate launch(?: --?\w+(?: \d+)?)*) |python )scripts/(?P<name>\w+)\.py")


def program_name() -> str:
    """Returns the program's name for help texts: the path of a script as typed, or `smalti COMMAND`."""
    return sys.argv[0] if sys.argv[0].startswith(f"{PROGRAM} ") else Path(sys.argv[0]).as_posix()


def as_invoked(text: str) -> str:
    """Returns a text with its commands in the form in which this one was typed.

    Texts name `python scripts/train_prior.py`; started as `smalti ...`, a person reads `smalti train-prior`.
    """
    if not program_name().startswith(f"{PROGRAM} "):
        return text

    def installed(match: re.Match[str]) -> str:
        launch = f"{match['launch']} -m " if match["launch"] else ""
        return f"{launch}{PROGRAM} {match['name'].replace('_', '-')}"

    return _SCRIPT.sub(installed, text)
