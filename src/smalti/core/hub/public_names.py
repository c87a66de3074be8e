"""Names in shared files: without the folders of the machine that made them."""

import os
import re
import shlex
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from smalti.core.errors import PROGRAM, SCRIPTS
from smalti.core.hub.ids import OWN_FOLDERS

PATHS = ("image_source", "held_out", "tokenizer_source", "init", "converted_from")
"""Fields of a provenance that are paths, or names of other kinds."""
NAMES_OF_DATA = ("label_names", "label_column", "image_column")
"""Fields that are kept as they are, because they decide what the data mean."""

_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_FOLDERS_IN_TEXT = re.compile(r"(?<![\w.:/\\-])(?:~[\w.-]*|[A-Za-z]:)?[/\\](?:[^/\\\s\"'`]+[/\\])+")


def public_path(text: str) -> str:
    """Returns the last part of a local path. Names of embedded images, hub ids and paths below `runs/` stay."""
    path = PureWindowsPath(text) if _WINDOWS.match(text) else PurePosixPath(text)
    if text.startswith(OWN_FOLDERS) and ".." not in path.parts:
        return text
    local = path.is_absolute() or text.startswith(("~", ".")) or len(path.parts) > 2 or os.path.exists(text)
    return path.name or "images" if local and "://" not in text else text


def public_command(command: str) -> str:
    """Returns a command line that trained or encoded something, as `smalti COMMAND ...` and without local folders."""
    program, *rest = _without_folders_in_words(command).split(" ", 1)
    if program.removesuffix(".py") in SCRIPTS:
        program = f"{PROGRAM} {program.removesuffix('.py').replace('_', '-')}"
    return " ".join([program, *rest])


def _without_folders_in_words(command: str) -> str:
    """Returns a command line in which paths have only their last part; the same text if none has more."""
    try:
        words = shlex.split(command)
    except ValueError:
        return _without_folders(command)
    public = [_public_word(word) for word in words]
    return shlex.join(public) if public != words else command


def _public_word(word: str) -> str:
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{flag}{equals}{public_path(value)}" if value else word


def public_values(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a provenance in which no text has an absolute path. Names of classes and columns stay."""
    return {name: value if name in NAMES_OF_DATA else _public_value(name, value) for name, value in values.items()}


def _public_value(name: str, value: Any) -> Any:
    if isinstance(value, str):
        if name == "command":
            return _without_folders_in_words(value)
        return public_path(value) if name in PATHS else _without_folders(value)
    if isinstance(value, dict):
        return public_values(value)
    return [_public_value(name, item) for item in value] if isinstance(value, list | tuple) else value


def _without_folders(text: str) -> str:
    return public_path(text) if PurePosixPath(text).is_absolute() else _FOLDERS_IN_TEXT.sub("", text)


def has_folders(text: str) -> bool:
    """Returns whether a text has an absolute path."""
    return _without_folders(text) != text
