"""Settings of the C libraries below torch on CPUs: how OpenMP threads wait, and what glibc's malloc does on free.

Only commands use these: a library must not make such choices for the program that imports it. Nothing here imports
torch, because torch reads the OpenMP setting while it loads.
"""

import ctypes
import os
import sys

SPINS = 1000

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # the numbers in glibc's malloc.h
LARGEST_KEPT_BYTES = 1 << 25  # the largest M_MMAP_THRESHOLD that glibc accepts
NEVER_TRIM_BYTES = (1 << 31) - 1


def wait_without_spinning() -> None:
    """Makes waiting OpenMP threads sleep after a short spin. Call it before torch is first imported.

    By default GNU OpenMP's threads spin for milliseconds. This is slightly faster on an idle machine, but on two cores
    shared with one other busy process a training step took 12 s instead of 0.4 s. Settings that the environment
    already has are kept.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def keep_freed_memory() -> bool:
    """Makes glibc's malloc keep freed memory for the next allocation instead of returning it to the system.

    A training step on a CPU allocates what the step before freed. Without this, the kernel clears these pages again at
    every step, which takes 7-20 % of a small model's time. The process stays as large as its peak.

    Returns:
        True if malloc accepted the settings; False with another C library.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries lack it, or return 0
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES) and mallopt(M_TRIM_THRESHOLD, NEVER_TRIM_BYTES))


def give_back_freed_memory() -> None:
    """Returns freed memory to the system once, after a peak that will not come again. Does nothing without glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)
