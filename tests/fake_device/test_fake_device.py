"""Runs `cases.py` on the fake device, to find code that works on the CPU only."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_device import COMPILER

FOLDER = Path(__file__).parent


@pytest.mark.skipif(not shutil.which(COMPILER), reason=f"the fake device needs the C++ compiler {COMPILER}")
def test_results_on_the_fake_device_equal_the_cpus():
    """The cases run in a separate process, because the device stays registered with torch."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "fake_device", FOLDER / "cases.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    finished = subprocess.run(
        command,
        env={**environment, "PYTHONPATH": os.pathsep.join([str(FOLDER), os.environ["PYTHONPATH"]])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout
