"""What commands tell the C libraries, in processes of their own."""

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_what_is_kept_goes_back_when_asked_for():
    command = [sys.executable, "-c", MEMORY_AFTER_A_PEAK]
    kept, left = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert kept > 60  # of 95
    assert left < 10


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_what_is_freed_is_not_faulted_in_again():
    command = [sys.executable, "-c", FAULTS_OF_A_LOOP]
    kept, count = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert kept == "True"
    assert int(count) < 1000  # of 40 960 pages that the loop writes to; without the call mostly all of them


def openmp_settings(**environment: str) -> str:
    """What GNU OpenMP says that it goes by, in a process that imports what commands do, in that order."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    ran = subprocess.run(
        [sys.executable, "-c", "from smalti import cli; import torch"],
        env={**bare, "OMP_DISPLAY_ENV": "VERBOSE", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="torch has another OpenMP elsewhere")
def test_threads_of_commands_do_not_spin_unless_the_environment_says_so():
    assert "GOMP_SPINCOUNT = '1000'" in openmp_settings()
    assert "GOMP_SPINCOUNT = '7'" in openmp_settings(GOMP_SPINCOUNT="7")
    assert "GOMP_SPINCOUNT = '1000'" not in openmp_settings(OMP_WAIT_POLICY="active")
