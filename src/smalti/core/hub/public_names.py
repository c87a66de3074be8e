"""Names in shared files: without the folders of the machine that made them, and without the secrets in URLs."""

import os
import re
import shlex
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from smalti.core.errors import PROGRAM, SCRIPTS
from smalti.core.hub.ids import OWN_FOLDERS

PATHS = (
    "image_source",
    "held_out",
    "held_out_source",
    "tokenizer_source",
    "condition_source",
    "init",
    "converted_from",
)
"""Fields of a provenance that are paths, or names of other kinds."""
NAMES_OF_DATA = ("label_names", "label_column", "image_column", "caption_column")
"""Fields that are kept as they are, because they decide what the data mean."""

_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_FOLDERS_IN_TEXT = re.compile(r"(?<![\w.:/\\-])(?:~[\w.-]*|[A-Za-z]:)?[/\\](?:[^/\\\s\"'`]+[/\\])+")
_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<authority>[^/?#]*)(?P<path>[^?#]*)", re.IGNORECASE | re.DOTALL)
_URL_IN_TEXT = re.compile(r"[a-z][a-z0-9+.-]*://[^\s\"'`]+", re.IGNORECASE)
_BETWEEN_NAMES = re.compile(r"(::|, )")
"""Separates the names of nested archives (fsspec), and those of the sources of several files that are read as one."""
_LOCAL_SCHEMES = ("file", "local")


def public_path(text: str) -> str:
    """Returns the last part of a local path. Names of embedded images, hub ids and paths below `runs/` stay.

    URLs lose the user's name, the password, the query and the fragment, which may hold a signature.
    """
    parts = _BETWEEN_NAMES.split(text)
    if any(map(_URL.match, parts)):
        return "".join(map(_public_url, parts))
    path = PureWindowsPath(text) if _WINDOWS.match(text) else PurePosixPath(text)
    if text.startswith(OWN_FOLDERS) and ".." not in path.parts:
        return text
    local = path.is_absolute() or text.startswith(("~", ".")) or len(path.parts) > 2 or os.path.exists(text)
    return path.name or "images" if local else text


def _public_url(text: str) -> str:
    url = _URL.match(text)
    if url is None:
        return public_path(text)
    if url["scheme"].lower() in _LOCAL_SCHEMES:
        return PurePosixPath(url["path"]).name or "images"
    return f"{url['scheme']}://{url['authority'].rpartition('@')[2]}{url['path']}"


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
    return type(value)(_public_value(name, item) for item in value) if isinstance(value, list | tuple) else value


def _without_folders(text: str) -> str:
    if PurePosixPath(text).is_absolute():
        return public_path(text)
    return _FOLDERS_IN_TEXT.sub("", _URL_IN_TEXT.sub(lambda url: public_path(url[0]), text))
