"""Trackers and memory as runs use them. What else is in `devices.py` the commands show."""

import json

import pytest
import torch
from accelerate import tracking
from accelerate.state import AcceleratorState
from accelerate.utils import LoggerType
from helpers import toys

from smalti.core import devices
from smalti.core.devices import peak_memory_bytes
from smalti.core.errors import UserError
from smalti.training.accelerator import accelerator, subnormals_flushed, tracked


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


class ToFile(tracking.GeneralTracker):
    """A tracker as a user might register one."""

    name, requires_logging_directory, main_process_only = "to-file", True, True

    def __init__(self, run_name, logging_dir, **_):
        super().__init__()
        self.path = logging_dir / f"{run_name}.json"
        self.conditioning = []

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.conditioning.append(values)

    def log(self, values, step, **_):
        self.conditioning.append({"step": step, **values})

    def finish(self):
        self.path.write_text(json.dumps(self.conditioning))


def test_a_tracker_is_told_what_the_run_writes_down(tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "to-file", ToFile)
    process = accelerator("fp32", ("to-file",), tmp_path)
    with tracked(process, {"steps": 12, "widths": (4, 6), "out": tmp_path}):
        toys.train(tmp_path, process=process)
    settings, *told = json.loads((tmp_path / "smalti.json").read_text())
    assert settings == {"steps": 12, "widths": "(4, 6)", "out": str(tmp_path)}
    lines = toys.measured(tmp_path)
    assert len(told) == len(lines)
    for ours, theirs in zip(lines, told, strict=True):
        assert {name: theirs[name] for name in ours} == pytest.approx(ours, rel=1e-5)


def test_a_tracker_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"there is no tracker 'tensorbored'; Accelerate knows .*tensorboard"):
        accelerator("fp32", ("tensorbored",), tmp_path)
    monkeypatch.setattr(devices, "get_available_trackers", lambda: [LoggerType.WANDB])
    accelerator("fp32", ("wandb",), tmp_path)
    with pytest.raises(UserError, match="the tracker tensorboard is not installed; install it"):
        accelerator("fp32", ("wandb", "tensorboard"), tmp_path)


def test_subnormal_numbers_slow_no_training_down_and_are_back_after_it(tmp_path):
    """In training they count as zero."""
    subnormal, seen = torch.full((4,), 2.0**-130), []

    class Watched:
        def __init__(self, rows):
            self.rows = rows

        def __len__(self):
            return len(self.rows)

        def __getitems__(self, numbers):
            seen.append((subnormal * 1.0).any().item())
            return self.rows.__getitems__(numbers)

    toys.train(tmp_path, wrap=Watched)
    assert len(seen) > 1
    assert not any(seen)
    assert (subnormal * 1.0).any()
    with subnormals_flushed():
        with subnormals_flushed():
            assert not (subnormal * 1.0).any()
        assert not (subnormal * 1.0).any()


def test_memory_is_counted_in_bytes():
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(2**27)  # half a GiB
    assert peak_memory_bytes(torch.device("cpu")) >= 2**29
    assert before < 2**36
    del held
