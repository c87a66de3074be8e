"""Tests of trackers, subnormal numbers and the refusal of fp16, as training uses them."""

import json

import pytest
import torch
from accelerate import Accelerator, PartialState, tracking
from accelerate.state import AcceleratorState
from accelerate.utils import LoggerType
from helpers import toys
from safetensors.torch import load_file

from smalti.core.errors import UserError
from smalti.core.models import WEIGHTS_NAME
from smalti.training import accelerator as accelerator_file
from smalti.training.accelerator import accelerator, note_single_process, subnormals_flushed, tracked


class ToFile(tracking.GeneralTracker):
    """A tracker such as a user may register."""

    name, requires_logging_directory, main_process_only = "to-file", True, True

    def __init__(self, run_name, logging_dir, **_):
        super().__init__()
        self.path = logging_dir / f"{run_name}.json"
        self.records = []

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.records.append(values)

    def log(self, values, step, **_):
        self.records.append({"step": step, **values})

    def finish(self):
        self.path.write_text(json.dumps(self.records))


def test_tracker_receives_settings_and_metrics(tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "to-file", ToFile)
    process = accelerator("fp32", ("to-file",), tmp_path)
    with tracked(process, {"steps": 12, "widths": (4, 6), "out": tmp_path}):
        toys.train(tmp_path, process=process)
    settings, *logged = json.loads((tmp_path / "smalti.json").read_text())
    assert settings == {"steps": 12, "widths": "(4, 6)", "out": str(tmp_path)}
    lines = toys.measured(tmp_path)
    assert len(logged) == len(lines)
    for line, record in zip(lines, logged, strict=True):
        assert {name: record[name] for name in line} == pytest.approx(line, rel=1e-5)


def test_unknown_or_missing_tracker_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"there is no tracker 'tensorbored'; Accelerate has .*tensorboard"):
        accelerator("fp32", ("tensorbored",), tmp_path)
    monkeypatch.setattr(accelerator_file, "get_available_trackers", lambda: [LoggerType.WANDB])
    accelerator("fp32", ("wandb",), tmp_path)
    with pytest.raises(UserError, match="the tracker tensorboard is not installed; install it"):
        accelerator("fp32", ("wandb", "tensorboard"), tmp_path)


def test_fp16_training_is_refused_without_a_gpu(monkeypatch):
    monkeypatch.setattr("smalti.core.devices.best_device", lambda: torch.device("cpu"))
    with pytest.raises(UserError, match=r"^--precision fp16 needs a GPU; use bf16 or fp32$"):
        accelerator("fp16")


def test_subnormal_numbers_are_zero_during_training_only(tmp_path):
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


@pytest.mark.parametrize("steps", ["4", "auto"])
def test_gradient_accumulation_of_accelerate_is_refused(steps, monkeypatch):
    """Accelerate would divide every gradient by the steps that its environment names."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
    with pytest.raises(UserError, match=rf"STEPS={steps} would divide every gradient; set it to 1, .* --accumulation"):
        accelerator("fp32")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    assert accelerator("fp32").gradient_accumulation_steps == 1


def test_an_accelerator_that_accumulates_is_refused_by_the_loop(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)  # on a GPU: of the tests before
    process = Accelerator(cpu=True, gradient_accumulation_steps=4)
    with pytest.raises(UserError, match="gradient_accumulation_steps=4 would divide every gradient"):
        toys.train(tmp_path, process=process)


def test_the_device_can_be_chosen():
    assert accelerator("fp32", device_name="cpu").device.type == "cpu"
    if not torch.backends.mps.is_available():
        with pytest.raises(UserError, match="--device mps: there is none here"):
            accelerator("fp32", device_name="mps")


@pytest.fixture
def settings_of_another_device():
    """Accelerate's settings as if this process had used a GPU before, without a training."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    PartialState._shared_state["device"] = torch.device("cuda")
    yield PartialState._shared_state
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_training_may_be_on_another_device_than_what_ran_before(settings_of_another_device):
    assert accelerator("fp32", device_name="cpu").device.type == "cpu"


def test_connected_processes_stay_on_their_device(settings_of_another_device):
    settings_of_another_device["num_processes"] = 2
    with pytest.raises(UserError, match="these processes are connected on cuda; they cannot train on cpu"):
        accelerator("fp32", device_name="cpu")


def test_trainings_of_one_process_may_have_different_precisions(tmp_path):
    """Accelerate keeps the first precision of a process and refuses others."""
    for name, precision in [("first", "fp32"), ("second", "bf16"), ("third", "fp32")]:
        toys.train(tmp_path / name, process=accelerator(precision))
    first, second, third = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("first", "second", "third"))
    assert all(torch.equal(third[name], weight) for name, weight in first.items())
    assert any(not torch.equal(second[name], weight) for name, weight in first.items())


@pytest.mark.parametrize(
    ("environment", "notes"),
    [
        ({"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}, 1),  # accelerate launch --cpu --num_processes 2
        ({"ACCELERATE_USE_CPU": "False"}, 0),  # accelerate launch
        ({"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500", "PMI_SIZE": "2"}, 0),  # with MPI
        ({"WORLD_SIZE": "2", "MASTER_PORT": "29500"}, 0),  # torchrun, and accelerate launch --multi_gpu
    ],
)
def test_launch_of_several_processes_that_starts_one_is_noted(monkeypatch, capsys, environment, notes):
    for name in ("WORLD_SIZE", "MASTER_PORT", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    note_single_process.cache_clear()
    note_single_process()
    note_single_process()
    assert capsys.readouterr().err.count("torchrun --nproc_per_node") == notes
