"""The fake device: finds bugs that otherwise only a GPU would show. `fake_device.cpp` implements it.

This is a pytest plugin: `PYTHONPATH=tests/fake_device python -m pytest -p fake_device tests/fake_device/cases.py`.
Smalti and Accelerate use `current_device()` as the best device: the CPU, or the fake device within `on_fake_device()`.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch.utils.cpp_extension import include_paths, library_paths

CPU = torch.device("cpu")
COMPILER = os.environ.get("CXX", "c++")
_SOURCE = Path(__file__).with_suffix(".cpp")
_current = CPU


def current_device() -> torch.device:
    return _current


@contextmanager
def on_fake_device() -> Iterator[torch.device]:
    """Makes the fake device the best device within the block."""
    global _current
    _current = torch.device("fake_device:0")
    try:
        yield _current
    finally:
        _current = CPU


def synchronizations() -> int:
    """Returns how often an operation would have waited for a GPU so far."""
    return torch.ops.fake_device.synchronizations()


@contextmanager
def synchronizing_refused() -> Iterator[None]:
    """Makes operations that would wait for a GPU raise errors within the block."""
    torch.ops.fake_device.refuse_synchronizing(True)
    try:
        yield
    finally:
        torch.ops.fake_device.refuse_synchronizing(False)


def pytest_configure() -> None:
    """Sets the device up before any test file imports smalti."""
    register()
    replace_best_device()


def register() -> None:
    """Builds the device, which takes some twenty seconds, and registers it with torch; once per process."""
    torch.utils.rename_privateuse1_backend("fake_device")
    flags = [*(f"-I{path}" for path in include_paths()), *(f"-L{path}" for path in library_paths())]
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/fake_device.so"
        command = [COMPILER, "-shared", "-fPIC", "-std=c++20", str(_SOURCE), "-o", library, *flags]
        subprocess.run([*command, "-ltorch_cpu", "-lc10"], check=True)
        torch.ops.load_library(library)
    module = ModuleType("torch.fake_device")
    results = {"is_available": True, "_is_in_bad_fork": False, "device_count": 1, "current_device": 0}
    for name, result in results.items():
        setattr(module, name, lambda result=result: result)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    module.manual_seed_all = module.set_rng_state = lambda *_: None
    module.get_rng_state = lambda *_: torch.get_rng_state()
    torch._register_device_module("fake_device", module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    # parameters keep their identity when a module moves, as between a CPU and a GPU
    torch.__future__.set_swap_module_params_on_conversion(True)
    storage_to_cpu = torch.storage._StorageBase.cpu

    def to_cpu(self):
        bytes_ = torch.empty(0, dtype=torch.uint8, device=self.device)
        return storage_to_cpu(self) if self.device == CPU else bytes_.set_(self).cpu().untyped_storage()

    torch.storage._StorageBase.cpu = to_cpu


def replace_best_device() -> None:
    """Makes smalti and Accelerate use `current_device` as the best device."""
    assert "smalti.training.loop" not in sys.modules, "modules that imported best_device have the original"
    import accelerate.state

    import smalti.core.devices

    smalti.core.devices.best_device = current_device
    accelerate.state.PartialState.default_device = property(lambda _: current_device())
    import smalti.latentsets.dataset

    smalti.latentsets.dataset._free_bytes = lambda _: 2**30
