"""Which device, and which arithmetic on it, when the person does not say."""

import re
import sys
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from smalti.core.errors import UserError

Device: TypeAlias = Literal["auto", "cpu", "cuda", "mps"]
Precision: TypeAlias = Literal["auto", "fp32", "bf16"]


def best_device() -> torch.device:
    """CUDA (or ROCm), else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def device(name: Device) -> torch.device:
    """The device that a flag names.

    Raises:
        UserError: if this machine has none.
    """
    missing = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if missing.get(name):
        raise UserError(f"--device {name}: there is none here; leave --device out to use what there is")
    return best_device() if name == "auto" else torch.device(name)


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Networks within compute in this precision; what must be float32 says so itself."""
    return torch.autocast(device.type, torch.bfloat16, enabled=resolve(precision) == "bf16")


def resolve(precision: Precision) -> Literal["fp32", "bf16"]:
    """What `auto` means: bf16 where the hardware multiplies matrices in it (recent GPUs, CPUs with AMX), else fp32.

    Measured on two CPU cores with AMX: convolutions and linear layers 3-4 times faster than in fp32.
    """
    if precision != "auto":
        return precision
    return "bf16" if multiplies_bf16(best_device().type) else "fp32"


@cache
def multiplies_bf16(kind: str) -> bool:
    """Whether a kind of device, `cuda` or `cpu` say, multiplies matrices in bf16 by hardware of its own.

    Others do so too, but slowly: CPUs without AMX some 25 times as slowly as in fp32.
    """
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and "amx_bf16" in _cpu_flags()


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory so far: of torch's tensors on a CUDA device, otherwise of this process; 0 where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    status = Path("/proc/self/status")  # getrusage's peak, on Linux, is of the process that started this one, if larger
    kibibytes = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.exists() else None
    unit = 1 if sys.platform == "darwin" else 1024
    return 1024 * int(kibibytes[1]) if kibibytes else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cpu_flags() -> frozenset[str]:
    """Instruction sets of this CPU as Linux names them; empty where there is no /proc/cpuinfo."""
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            return frozenset(next((line.split(":")[1] for line in cpuinfo if line.startswith("flags")), "").split())
    except OSError:
        return frozenset()
