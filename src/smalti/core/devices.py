"""Devices and mixed precision: what `--device` and `--precision` mean, and the defaults for this machine."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from smalti.core.config import require_choice
from smalti.core.errors import UserError

Device: TypeAlias = Literal["auto", "cpu", "cuda", "mps"]
Precision: TypeAlias = Literal["auto", "fp32", "bf16", "fp16"]
"""Precision of the networks under autocast. Parameters and optimizer states are always float32."""

BF16_INSTRUCTIONS = frozenset({"amx_bf16", "avx512_bf16"})
"""Instruction sets, as Linux names them, with which CPUs multiply bf16 matrices faster than fp32 ones. With AVX512-BF16
alone, training steps take 0.6 to 0.75 of fp32's time at equal losses (docs/benchmarks.md)."""


def cores() -> int:
    """Returns the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def best_device() -> torch.device:
    """Returns CUDA (or ROCm) if available, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def device(name: Device) -> torch.device:
    """Returns the device that a `--device` flag names.

    Raises:
        UserError: if this machine has no such device, or there is no such name.
    """
    require_choice("device", name, Device)
    missing = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if missing.get(name):
        raise UserError(f"--device {name}: there is none here; leave --device out to use the best device")
    return best_device() if name == "auto" else torch.device(name)


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Returns a context in which networks compute in mixed precision; code that needs float32 disables it locally."""
    resolved = resolve(precision, device)
    dtype = torch.float16 if resolved == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=resolved != "fp32")


def resolve(precision: Precision, device: torch.device | None = None) -> Literal["fp32", "bf16", "fp16"]:
    """Resolves `auto`: bf16 if the hardware multiplies matrices in it, fp16 on other CUDA devices, else fp32.

    Recent GPUs and CPUs with AMX or AVX512-BF16 have bf16. `device` defaults to this machine's best one.

    Raises:
        UserError: for fp16 on a CPU, or if there is no such precision.
    """
    require_choice("precision", precision, Precision)
    kind = (device or best_device()).type
    if precision == "fp16" and kind == "cpu":
        raise UserError("--precision fp16 needs a GPU; use bf16 or fp32")
    if precision != "auto":
        return precision
    if has_native_bf16(kind):
        return "bf16"
    return "fp16" if kind == "cuda" else "fp32"


@cache
def has_native_bf16(kind: str) -> bool:
    """Returns whether a device type, such as `cuda` or `cpu`, has hardware for matrix products in bf16.

    A CPU has it if it has one of `BF16_INSTRUCTIONS`; others emulate bf16, some 25 times slower than
    fp32. A list is used and not a timing, so that a machine always chooses the same precision.
    """
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and not BF16_INSTRUCTIONS.isdisjoint(_cpu_flags())


@contextmanager
def generators_kept() -> Iterator[None]:
    """Gives the caller's state back to torch's global generators: on the CPU and, if CUDA is in use, its device.

    Networks draw their initial weights from them, also those that are loaded. Trainings seed them, and draw more
    weights after loading, so `smalti.core.models.load` itself does not.
    """
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        yield


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Builds the networks within the block in float32, whatever default the caller has set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the peak memory so far: of torch's tensors on CUDA, otherwise of this process; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    status = Path("/proc/self/status")  # on Linux getrusage also counts the parent process's peak before the fork
    kibibytes = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.exists() else None
    unit = 1 if sys.platform == "darwin" else 1024
    return 1024 * int(kibibytes[1]) if kibibytes else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cpu_flags() -> frozenset[str]:
    """Returns this CPU's instruction sets as Linux names them; empty without /proc/cpuinfo."""
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            return frozenset(next((line.split(":")[1] for line in cpuinfo if line.startswith("flags")), "").split())
    except OSError:
        return frozenset()
