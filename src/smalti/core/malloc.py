"""What the C libraries beneath torch are told on CPUs: how threads wait for each other, and where freed memory goes.

For commands: a library must not decide this for the program that imports it. Nothing here imports torch, which reads
the first of it while it loads.
"""

import ctypes
import os
import sys

SPINS = 1000

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as glibc's malloc.h numbers them
LARGEST_KEPT_BYTES = 1 << 25  # the most that glibc takes for its threshold
NEVER_TRIM_BYTES = (1 << 31) - 1


def wait_without_spinning() -> None:
    """Lets a thread that waits for another one sleep soon; to be called before torch is first imported.

    GNU OpenMP's threads burn their core for milliseconds instead, which is a little faster on an idle machine and ruin
    on a busy one: a training step of the demonstration's prior on two cores took 0.19-0.24 s idle and 12 s beside one
    other busy process, and with this 0.20-0.23 and 0.4. What the environment says already is left as it is.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def keep_freed_memory() -> bool:
    """Tells glibc to keep what is freed for the next allocation, not to give it back to the system each time.

    A training step on a CPU allocates what the one before it freed; without this the kernel takes the pages away and
    clears them anew: some 11 000 page faults a step of the demonstration's prior, 7-20 % of its time. The process stays
    as large as it once was.

    Returns:
        Whether it could be told; not where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries lack it, or answer 0
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES) and mallopt(M_TRIM_THRESHOLD, NEVER_TRIM_BYTES))


def give_back_freed_memory() -> None:
    """Returns what is free to the system, once, after a peak that will not come again; nothing without glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)
