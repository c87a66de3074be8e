"""That nothing holds on the CPU alone: `fake_device/cases.py`, on a device that is not there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_device import COMPILER

FOLDER = Path(__file__).parent


# what the device is built with; smalti itself needs none, so a machine may well have none
@pytest.mark.skipif(not shutil.which(COMPILER), reason=f"there is no {COMPILER}, with which the device is built")
def test_another_device_does_what_the_cpu_does():
    """In a process of its own: torch knows the device from then on."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "fake_device", FOLDER / "cases.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    found = subprocess.run(
        command,
        env={**environment, "PYTHONPATH": str(FOLDER)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert found.returncode == 0, found.stdout
