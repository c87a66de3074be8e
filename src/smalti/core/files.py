"""Atomic writes: files and folders are written under a temporary name, synced to the disk, then renamed.

A file or folder written this way is either complete or absent, also after a kill.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial"


def sync(path: Path) -> None:
    """Flushes a file's bytes, or a folder's entries, to the disk (fsync).

    Folders are skipped on Windows, which cannot open them.
    """
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows syncs only what it may write
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, which becomes `path` if the block succeeds; otherwise `path` is kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # errors from write(), unlike open(), do not name the file
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill, which becomes `path` if the block succeeds. `path` must not exist before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)  # left by a kill
    try:
        partial.mkdir()
        yield partial
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        partial.rename(path)
        sync(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # errors from write(), unlike open(), do not name the file
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
