"""How the tests run, whoever runs them: shapes checked, no network, one thread, the user's caches untouched.

All of it happens on import, before any test file imports smalti: the libraries read these settings when they are first
imported. No fixtures live here.
"""

import inspect
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Self

import jaxtyping
import pytest
from beartype import BeartypeConf, FrozenDict, beartype

_CACHE = tempfile.TemporaryDirectory(
    prefix="smalti-tests-", ignore_cleanup_errors=True
)  # removed when the process ends
_TESTS = str(Path(__file__).parent)
os.environ |= {
    "PYTHONPATH": os.pathsep.join([_TESTS, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),  # for `helpers`
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": _CACHE.name,
    "HF_DATASETS_CACHE": f"{_CACHE.name}/datasets",
    "OMP_NUM_THREADS": "1",  # of the commands that tests start, too
}

# Every annotated shape becomes a check, dimensions of one name agreeing within a call. What torch.compile must trace is
# marked with `typing.no_type_check`, which leaves the function as it was written. The hook decorates methods singly,
# where beartype cannot know what `Self` is, so that alone goes unchecked.
_beartyped = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({Self: Any})))
_CALLS_CHECKED = 10  # of each function, in each test: to check all calls takes a third of the time of all tests
_calls: Counter[tuple[str, str]] = Counter()
_spared: set[Any] = set()


def checked(function: Any) -> Any:
    """The function, checking what it is called with, until the test in hand has called it often enough."""
    name = function.__module__, function.__qualname__
    beartyped = None  # made when it is called: most tests call few functions

    def check(*args: Any, **options: Any) -> Any:
        nonlocal beartyped
        _calls[name] += 1
        if _calls[name] > _CALLS_CHECKED:
            return _spare(*name)
        beartyped = beartyped or _beartyped(function)
        return beartyped(*args, **options)

    return check


def _spare(module: str, qualified: str) -> None:
    """Marks a function as `typing.no_type_check` does, which jaxtyping asks about at each call."""
    found: Any = sys.modules[module]
    for part in qualified.split("."):
        found = inspect.getattr_static(found, part, None)
    found = inspect.unwrap(getattr(found, "fget", None) or getattr(found, "__func__", None) or found)
    if inspect.isfunction(found):  # not within another function
        found.__no_type_check__ = True
        _spared.add(found)


def pytest_runtest_setup() -> None:
    """Every test begins with all checks."""
    for function in _spared:
        del function.__no_type_check__
    _spared.clear()
    _calls.clear()


jaxtyping.install_import_hook("smalti", f"{__name__}.checked")

from smalti.core.malloc import wait_without_spinning

wait_without_spinning()

import torch  # noqa: E402 - after the settings above
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)  # the order of float sums does not hang on the machine, and tests may run side by side

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

LONGEST_FIRST = (
    "test_survival.py",
    "test_sharding.py",
    "test_fit_processes.py",
    "test_compile.py",
    "test_commands.py",
    "test_adversarial.py",
    "test_hqa_commands.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that train in processes of their own go first: begun last, one would outlast all others."""
    items.sort(key=lambda item: item.path.name not in LONGEST_FIRST)
