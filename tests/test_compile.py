"""Runs under `--compile` train what others do. This file is also the program that trains them.

In a process of its own, without the shape checks of the tests, which would break the compiler's graphs.
"""

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import toys

from smalti.signals import Interrupted

COMPILED = replace(toys.CONFIG, compile=True)
STOPPED_AT = 5  # batches


def program(folder):
    import torch._dynamo.utils

    def train(name, config, wrap=lambda rows: rows):
        toys.train(folder / name, toys.plain_toy, config, wrap=wrap)

    def graphs():
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    train("eager", toys.CONFIG)
    assert not graphs()
    with suppress(Interrupted):
        train("compiled", COMPILED, lambda rows: toys.Signalling(rows, STOPPED_AT))
    assert graphs()
    shutil.copytree(folder / "compiled", folder / "eager from there")
    train("compiled", COMPILED)
    train("eager from there", toys.CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("compile")
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("way", ["compiled", "eager from there"])
def test_a_compiled_run_trains_what_another_does(folder, way):
    """Stopped, and gone on with compiled again or not."""
    lines, others = toys.measured(folder / way), toys.measured(folder / "eager")
    assert len(lines) == len(others) > toys.CONFIG.steps
    for line, other in zip(lines, others, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)


if __name__ == "__main__":
    program(Path(sys.argv[1]))
