"""Tests of precision and peak memory. The choice of devices is tested by the commands."""

import io

import pytest
import torch

from smalti.core import devices
from smalti.core.devices import autocast, has_native_bf16, peak_memory_bytes, resolve
from smalti.core.errors import UserError

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.mark.parametrize(
    ("device", "native", "expected"),
    [
        (CPU, True, "bf16"),
        (CPU, False, "fp32"),
        (CUDA, True, "bf16"),
        (CUDA, False, "fp16"),
        (MPS, False, "fp32"),
    ],
)
def test_auto_precision_depends_on_the_device(device, native, expected, monkeypatch):
    monkeypatch.setattr(devices, "has_native_bf16", lambda kind: native)
    monkeypatch.setattr(devices, "best_device", lambda: device)
    assert resolve("auto") == resolve("auto", device) == expected
    assert resolve("fp32") == "fp32"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor : 0\nflags : fpu avx2 avx512f avx512_bf16\nprocessor : 1\n", True),
        ("flags\t\t: fpu avx512_bf16 amx_bf16 amx_tile\n", True),
        ("flags : fpu avx2 avx512f avx512vl\n", False),
        ("no flags\n", False),
    ],
)
def test_cpus_have_native_bf16_by_their_instruction_sets(cpuinfo, expected, monkeypatch):
    monkeypatch.setattr("builtins.open", lambda path: io.StringIO(cpuinfo))
    assert has_native_bf16.__wrapped__("cpu") == expected


def test_fp16_is_refused_on_cpus():
    with pytest.raises(UserError, match=r"^--precision fp16 needs a GPU; use bf16 or fp32$"):
        autocast(CPU, "fp16")
    with pytest.raises(UserError, match="needs a GPU"):
        resolve("fp16", CPU)
    assert resolve("fp16", CUDA) == "fp16"


def test_autocast_uses_the_precision_of_its_own_device(monkeypatch):
    """On a machine with a GPU without bf16, `--device cpu` must not get the GPU's fp16."""
    monkeypatch.setattr(devices, "has_native_bf16", lambda kind: False)
    monkeypatch.setattr(devices, "best_device", lambda: CUDA)
    with autocast(CPU, "auto"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with autocast(CPU, "bf16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_peak_memory_is_in_bytes():
    before = peak_memory_bytes(CPU)
    tensor = torch.ones(2**27)  # half a GiB
    assert peak_memory_bytes(CPU) >= 2**29
    assert before < 2**36
    del tensor
