"""A device that is not there, to find what a GPU would: see `fake_device.cpp`.

A plugin of pytest's: `PYTHONPATH=tests/fake_device python -m pytest -p fake_device tests/fake_device/cases.py`. What smalti
and Accelerate take for this machine's best device is `where()`: the CPU, and within `there()` the other one.
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
_where = CPU


def where() -> torch.device:
    return _where


@contextmanager
def there() -> Iterator[torch.device]:
    """Within, everything runs there."""
    global _where
    _where = torch.device("fake_device:0")
    try:
        yield _where
    finally:
        _where = CPU


def waited() -> int:
    """How often so far something would have waited for a GPU."""
    return torch.ops.fake_device.waited()


@contextmanager
def not_waiting() -> Iterator[None]:
    """Within, what would wait for a GPU is an error."""
    torch.ops.fake_device.refuse_waiting(True)
    try:
        yield
    finally:
        torch.ops.fake_device.refuse_waiting(False)


def pytest_configure() -> None:
    """Before any test file imports smalti."""
    register()
    pretend()


def register() -> None:
    """Builds it, in some twenty seconds; once in a process."""
    torch.utils.rename_privateuse1_backend("fake_device")
    flags = [*(f"-I{path}" for path in include_paths()), *(f"-L{path}" for path in library_paths())]
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/fake_device.so"
        command = [COMPILER, "-shared", "-fPIC", "-std=c++20", str(_SOURCE), "-o", library, *flags]
        subprocess.run([*command, "-ltorch_cpu", "-lc10"], check=True)
        torch.ops.load_library(library)
    module = ModuleType("torch.fake_device")
    answers = {"is_available": True, "_is_in_bad_fork": False, "device_count": 1, "current_device": 0}
    for name, answer in answers.items():
        setattr(module, name, lambda answer=answer: answer)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    module.manual_seed_all = module.set_rng_state = lambda *_: None
    module.get_rng_state = lambda *_: torch.get_rng_state()
    torch._register_device_module("fake_device", module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    # modules' parameters stay the tensors they are when they move, as between a CPU and a GPU
    torch.__future__.set_swap_module_params_on_conversion(True)
    storage_to_cpu = torch.storage._StorageBase.cpu

    def to_cpu(self):
        bytes_ = torch.empty(0, dtype=torch.uint8, device=self.device)
        return storage_to_cpu(self) if self.device == CPU else bytes_.set_(self).cpu().untyped_storage()

    torch.storage._StorageBase.cpu = to_cpu


def pretend() -> None:
    """Puts `where` in the place of what looks for this machine's devices."""
    assert "smalti.training.loop" not in sys.modules, "what imports best_device already has the other one"
    import accelerate.state

    import smalti.core.devices

    smalti.core.devices.best_device = where
    accelerate.state.PartialState.default_device = property(lambda _: where())
    import smalti.latentsets.dataset
    import smalti.tokenizers.layers.strips

    smalti.latentsets.dataset._free_bytes = lambda _: 2**30
    largest = smalti.tokenizers.layers.strips.LARGEST_WHOLE
    largest["fake_device"] = largest["cpu"]
