"""Runs each fuzzer of data files for a moment. Longer runs are started by hand; see the drivers."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("name", ["fuzz_latents", "fuzz_packed", "fuzz_images", "fuzz_masks"])
def test_a_second_of_fuzzing_finds_no_failure(name):
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--seconds", "1", "--seed", "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 distinct failures" in result.stdout
    assert not result.stdout.startswith("0 cases")
