"""That nothing holds on the CPU alone: `elsewhere/cases.py`, on a device that is not there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "elsewhere"


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++")), reason="no C++ compiler: the device is not built")
def test_another_device_does_what_the_cpu_does():
    """In a process of its own: torch knows the device from then on."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "elsewhere", FOLDER / "cases.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    found = subprocess.run(
        command,
        env={**environment, "PYTHONPATH": str(FOLDER)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert found.returncode == 0, found.stdout
