"""Settings of all tests: shapes are checked, there is no network, one thread, and the user's caches are not used.

They are applied on import, before any test file imports smalti, because libraries read them when they are first
imported. There are no fixtures here.
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
)  # deleted when the process ends
_TESTS = str(Path(__file__).parent)
os.environ |= {
    "PYTHONPATH": os.pathsep.join([_TESTS, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),  # to import `helpers`
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": _CACHE.name,
    "HF_DATASETS_CACHE": f"{_CACHE.name}/datasets",
    "OMP_NUM_THREADS": "1",  # also of the commands that tests start
}

# jaxtyping checks every annotated shape; dimensions of one name must agree within a call. Functions that torch.compile
# traces are marked with `typing.no_type_check`, which leaves them undecorated. The hook decorates methods one by one,
# where beartype cannot resolve `Self`, which is not checked.
_beartyped = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({Self: Any})))
_CALLS_CHECKED = 2  # per function and test: the checks of ten took a third of the tests' time
_calls: Counter[tuple[str, str]] = Counter()
_unchecked: set[Any] = set()


def checked(function: Any) -> Any:
    """Decorates a function with shape checks of its first calls in each test."""
    name = function.__module__, function.__qualname__
    beartyped = None  # made at the first call, because most tests call few functions

    def check(*args: Any, **options: Any) -> Any:
        nonlocal beartyped
        _calls[name] += 1
        if _calls[name] > _CALLS_CHECKED:
            return _stop_checking(*name)
        beartyped = beartyped or _beartyped(function)
        return beartyped(*args, **options)

    return check


def _stop_checking(module: str, qualified: str) -> None:
    """Marks a function as `typing.no_type_check` does; jaxtyping reads this mark at each call."""
    function: Any = sys.modules[module]
    for name in qualified.split("."):
        function = inspect.getattr_static(function, name, None)
    function = inspect.unwrap(getattr(function, "fget", None) or getattr(function, "__func__", None) or function)
    if inspect.isfunction(function):  # functions defined within functions cannot be looked up
        function.__no_type_check__ = True
        _unchecked.add(function)


def pytest_runtest_setup() -> None:
    """Turns all checks on again before each test."""
    for function in _unchecked:
        del function.__no_type_check__
    _unchecked.clear()
    _calls.clear()


jaxtyping.install_import_hook("smalti", f"{__name__}.checked")

from smalti.core.malloc import wait_without_spinning  # noqa: E402 - after the import hook

wait_without_spinning()

import torch  # noqa: E402 - after the settings above
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)  # the order of float sums must not depend on the machine, and tests may run in parallel

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

LONGEST_FIRST = (
    "test_survival.py",
    "test_fake_device.py",
    "test_fsdp.py",
    "test_loop_processes.py",
    "test_compile.py",
    "test_commands.py",
    "test_losses.py",
    "test_hqa_commands.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts files that train in separate processes first; if started last, one would outlast all others."""
    items.sort(key=lambda item: item.path.name not in LONGEST_FIRST)
