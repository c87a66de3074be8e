"""Tests of the settings of glibc and OpenMP, each in its own process."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS_OF_A_LOOP = """
import resource, torch
from smalti.core.malloc import keep_freed_memory
torch.set_num_threads(1)
kept = keep_freed_memory()
def work():
    tensors = [torch.ones(1 << 18) for _ in range(8)]  # 1 MiB each
for _ in range(5):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    work()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

MEMORY_AFTER_A_PEAK = """
import re
from pathlib import Path
from smalti.core.malloc import give_back_freed_memory, keep_freed_memory
def mebibytes():
    return int(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
keep_freed_memory()
before = mebibytes()
held = [b"x" * 100_000 for _ in range(1000)]
del held
kept = mebibytes() - before
give_back_freed_memory()
print(kept, mebibytes() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_kept_memory_is_returned_on_request():
    command = [sys.executable, "-c", MEMORY_AFTER_A_PEAK]
    kept, remaining = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert kept > 60  # of 95
    assert remaining < 10


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_freed_memory_causes_no_new_page_faults():
    command = [sys.executable, "-c", FAULTS_OF_A_LOOP]
    kept, count = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert kept == "True"
    assert int(count) < 1000  # of the 40 960 pages that the loop writes to; without the call, of nearly all of them


def openmp_settings(**environment: str) -> str:
    """Returns the settings that GNU OpenMP prints in a process with the imports of a command, in their order."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    finished = subprocess.run(
        [sys.executable, "-c", "from smalti import cli; import torch"],
        env={**bare, "OMP_DISPLAY_ENV": "VERBOSE", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return finished.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="torch has another OpenMP without glibc")
def test_openmp_threads_spin_only_if_the_environment_asks_for_it():
    assert "GOMP_SPINCOUNT = '1000'" in openmp_settings()
    assert "GOMP_SPINCOUNT = '7'" in openmp_settings(GOMP_SPINCOUNT="7")
    assert "GOMP_SPINCOUNT = '1000'" not in openmp_settings(OMP_WAIT_POLICY="active")
