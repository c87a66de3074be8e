"""A run's folder: what it writes down, what it refuses to go on with, and what `resume` goes back to or throws away."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from smalti.core.config import flatten
from smalti.core.errors import UserError
from smalti.core.models import CONFIG_NAME, WEIGHTS_NAME
from smalti.training import run_folder
from smalti.training.run_folder import METRICS_NAME, RUN_NAME, Run, last_metrics
from smalti.training.snapshots import STATE_NAME

SETTINGS = {"learning_rate": 0.1, "widths": (4, 6), "steps": 10, "out": Path("here"), "tokenizer": None}


def started(folder, step=5, **settings):
    """A run that saved its state after two and after `step` steps, and measured after two more."""
    run = Run(folder, {**SETTINGS, **settings})
    assert run.state() is None
    run.begin()
    for done in range(1, step + 3):
        run.log(done, {"loss": 1 / done, "gone": math.inf})
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        (folder / name).write_text("a model")
    for done in (2, step):
        run.states.save(done, {"step": done, "weights": torch.arange(done)}, keep=2, best=None)
    return run


def test_a_run_goes_on_from_its_state_and_forgets_what_came_after(tmp_path):
    started(tmp_path)
    again = Run(tmp_path, SETTINGS)
    assert again.step == 5
    assert last_metrics(tmp_path) == {"step": 7, "loss": 0.142857}
    assert torch.equal(again.state()["weights"], torch.arange(5))
    again.begin()
    assert last_metrics(tmp_path) == {"step": 5, "loss": 0.2}


def test_a_run_goes_back_to_the_state_that_is_asked_for(tmp_path):
    started(tmp_path)
    with pytest.raises(UserError, match=r"keeps no state of step 3; --resume one of these: 2, 5$"):
        Run(tmp_path, SETTINGS, resume=3)
    back = Run(tmp_path, SETTINGS, resume=2)
    assert torch.equal(back.state()["weights"], torch.arange(2))
    assert back.states.steps() == [2, 5]  # until it begins
    back.begin()
    assert back.states.steps() == [2]
    assert last_metrics(tmp_path)["step"] == 2
    with pytest.raises(UserError, match="none at all"):
        Run(tmp_path / "empty", SETTINGS, resume=2)


def test_a_damaged_state_is_passed_over_in_one_line(tmp_path, capsys):
    run = started(tmp_path)
    file = run.states.path(5) / STATE_NAME
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert Run(tmp_path, SETTINGS, main=False).step == 2
    assert capsys.readouterr().err == ""  # one process speaks
    again = Run(tmp_path, SETTINGS)
    assert again.step == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("going on from the state before it")
    assert "step_00000005 is damaged (the bytes of state.pt are not those that were saved)" in line
    with pytest.raises(UserError, match=r"step_00000005 is damaged .*--resume auto"):
        Run(tmp_path, SETTINGS, resume=5)
    again.begin()
    assert again.states.steps() == [2]


def test_without_a_state_everything_measured_is_forgotten(tmp_path):
    run = Run(tmp_path, SETTINGS)
    run.begin()
    run.log(1, {"loss": 1.0})
    again = Run(tmp_path, {**SETTINGS, "learning_rate": 0.2})  # nothing is lost: no refusal
    assert again.step == 0
    again.begin()
    assert (tmp_path / METRICS_NAME).read_text() == ""
    assert json.loads((tmp_path / RUN_NAME).read_text())["settings"]["learning_rate"] == 0.2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"learning_rate": 0.2}, "learning_rate=0.1, not 0.2"),
        ({"widths": (4, 8)}, r"widths=\[4, 6\], not \[4, 8\]"),
        ({"tokenizer": "x"}, "tokenizer=None, not 'x'"),
        ({"fresh": 1}, "fresh=None, not 1"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, changed, said):
    started(tmp_path)
    before = (tmp_path / RUN_NAME).read_text()
    with pytest.raises(UserError, match=f"holds a run with {said}.*--out.*--resume never") as caught:
        Run(tmp_path, {**SETTINGS, **changed})
    assert "\n" not in str(caught.value)
    assert (tmp_path / RUN_NAME).read_text() == before


def test_settings_that_leave_the_result_alone_may_change(tmp_path):
    started(tmp_path, steps=10, log_steps=1, workers=0)
    more = {"steps": 20, "log_steps": 3, "workers": 2, "out": Path("there"), "save_steps": 7, "report_steps": 8}
    more |= {"accumulation": 4, "compile": True, "gradient_checkpointing": True, "resume": "auto", "keep_states": 9}
    assert Run(tmp_path, {**SETTINGS, **more}).step == 5


@pytest.mark.parametrize("off", [None, False, 0, "", ()])
def test_a_setting_that_the_run_did_not_have_yet_is_off_there(tmp_path, off):
    started(tmp_path)
    assert Run(tmp_path, {**SETTINGS, "new": off}).step == 5
    fewer = {name: value for name, value in SETTINGS.items() if name != "learning_rate"}
    with pytest.raises(UserError, match=r"holds a run with learning_rate=0\.1, not None"):
        Run(tmp_path, fewer)


def test_never_resuming_throws_the_run_away(tmp_path):
    started(tmp_path)
    beside = Run(tmp_path, SETTINGS, main=False, resume="never")
    assert beside.step == 5  # only the main process throws away
    again = Run(tmp_path, {**SETTINGS, "learning_rate": 0.2}, resume="never")
    assert again.step == 0
    assert again.state() is None
    again.begin()
    assert again.states.steps() == []
    assert not (tmp_path / METRICS_NAME).exists()


def test_other_processes_write_nothing(tmp_path):
    beside = Run(tmp_path / "run", SETTINGS, main=False)
    beside.begin()
    beside.log(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_what_made_a_run_is_written_down(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/some/where/train.py", "--images", "my photos"])
    Run(tmp_path, SETTINGS).begin()
    described = json.loads((tmp_path / RUN_NAME).read_text())
    assert described["command"] == "train.py --images 'my photos'"
    assert described["settings"] == {**SETTINGS, "widths": [4, 6], "out": "here"}
    assert described["versions"]["torch"] == torch.__version__
    assert {"python", "smalti", "datasets"} <= described["versions"].keys()


def test_the_commit_is_that_of_this_checkout_only(tmp_path, monkeypatch):
    """A wheel in an environment inside somebody's repository must not take that one's commit for smalti's."""
    git = run_folder._git
    assert git("init", "-q", str(tmp_path)) is None  # prints nothing
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "runs.py"))
    (tmp_path / "runs.py").write_text("")
    assert run_folder.git_commit() is None
    assert git("add", "runs.py") is None
    assert git("-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "-m", "one") is None
    commit = run_folder.git_commit()
    assert len(commit) == 12
    (tmp_path / "runs.py").write_text("changed")
    assert run_folder.git_commit() == commit + "+"
    monkeypatch.setenv("PATH", "")
    assert run_folder.git_commit() is None


def test_flattening_gives_the_names_of_flags():
    @dataclass(frozen=True)
    class Inner:
        rate: float = 0.5

    @dataclass(frozen=True)
    class Outer:
        inner: Inner = field(default_factory=Inner)
        seed: int = 3

    assert flatten(Outer()) == {"rate": 0.5, "seed": 3}
