"""Tests of a run's folder: what it records, which changed settings it refuses, and what `resume` keeps or deletes."""

import gc
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smalti.core.config import former_switches
from smalti.core.errors import UserError
from smalti.core.models import CONFIG_NAME, WEIGHTS_NAME
from smalti.core.provenance import last_metrics
from smalti.tokenizers.vq.hrvq import HRVQConfig
from smalti.training.run_folder import METRICS_NAME, RUN_NAME, Run, forget
from smalti.training.snapshots import STATE_NAME

SETTINGS = {"learning_rate": 0.1, "widths": (4, 6), "steps": 10, "out": Path("here"), "tokenizer": None}


def started(folder, step=5, **settings):
    """Returns a run with snapshots after two and after `step` steps, and metrics of two further steps."""
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


def test_run_resumes_from_its_snapshot_and_deletes_later_metrics(tmp_path):
    started(tmp_path)
    again = Run(tmp_path, SETTINGS)
    assert again.step == 5
    assert last_metrics(tmp_path) == {"step": 7, "loss": 0.142857}
    assert torch.equal(again.state()["weights"], torch.arange(5))
    again.begin()
    assert last_metrics(tmp_path) == {"step": 5, "loss": 0.2}


def test_metrics_are_read_without_a_line_that_a_kill_truncated(tmp_path):
    started(tmp_path)
    with (tmp_path / METRICS_NAME).open("a") as metrics:
        metrics.write('{"step": 8, "lo')
    assert last_metrics(tmp_path) == {"step": 7, "loss": 0.142857}


def test_rolling_back_to_the_last_step_of_all_discards_what_came_after(tmp_path):
    started(tmp_path)
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        (tmp_path / name).write_text("the model of step 5")
    assert Run(tmp_path, SETTINGS).end(2, 0) == "5 steps"  # only a rollback deletes anything
    assert Run(tmp_path, SETTINGS).states.steps() == [2, 5]
    back = Run(tmp_path, SETTINGS, resume=2)
    assert back.end(2, 0) == "2 steps"
    assert back.states.steps() == [2]
    assert last_metrics(tmp_path)["step"] == 2
    assert (tmp_path / WEIGHTS_NAME).read_text() == "a model"


def test_run_resumes_from_the_requested_snapshot(tmp_path):
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


def test_run_of_an_older_version_resumes_under_the_present_names(tmp_path):
    """Older runs have a switch where there is a choice now; other choices than the switch's are other settings."""
    names = former_switches(HRVQConfig())
    started(tmp_path, kmeans_start=False)
    assert Run(tmp_path, {**SETTINGS, "codebook_init": "uniform"}, switches=names).step == 5
    gc.collect()
    with pytest.raises(UserError, match="holds a run with --codebook-init uniform, not --codebook-init kmeans"):
        Run(tmp_path, {**SETTINGS, "codebook_init": "kmeans"}, switches=names)


def test_damaged_snapshot_is_skipped_with_one_line(tmp_path, capsys):
    run = started(tmp_path)
    file = run.states.path(5) / STATE_NAME
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert Run(tmp_path, SETTINGS, main=False).step == 2
    assert capsys.readouterr().err == ""  # only the main process warns
    again = Run(tmp_path, SETTINGS)
    assert again.step == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("resuming from the one before it")
    assert "step_00000005 is damaged (the bytes of state.pt are not those that were saved)" in line
    with pytest.raises(UserError, match=r"step_00000005 is damaged .*--resume auto"):
        Run(tmp_path, SETTINGS, resume=5)
    again.begin()
    assert again.states.steps() == [2]


def test_incomplete_snapshots_that_a_kill_left_are_deleted(tmp_path):
    run = started(tmp_path)
    for name in (".step_00000007.partial", ".step_00000001.removed"):
        (run.states.folder / name).mkdir()
        (run.states.folder / name / STATE_NAME).write_text("half")
    again = Run(tmp_path, SETTINGS)
    assert len(list(again.states.folder.iterdir())) == 4  # until it begins
    again.begin()
    assert sorted(path.name for path in again.states.folder.iterdir()) == ["step_00000002", "step_00000005"]


def test_metrics_without_a_snapshot_are_deleted(tmp_path):
    run = Run(tmp_path, SETTINGS)
    run.begin()
    run.log(1, {"loss": 1.0})
    again = Run(tmp_path, {**SETTINGS, "learning_rate": 0.2})  # no snapshot to lose, so no refusal
    assert again.step == 0
    again.begin()
    assert (tmp_path / METRICS_NAME).read_text() == ""
    assert json.loads((tmp_path / RUN_NAME).read_text())["settings"]["learning_rate"] == 0.2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 0.2}, "--learning-rate 0.1, not --learning-rate 0.2"),
        ({"widths": (4, 8)}, "--widths 4 6, not --widths 4 8"),
        ({"tokenizer": "x"}, "no --tokenizer, not --tokenizer x"),
        ({"flips": True}, "no --flips, not --flips"),
        (
            {"image_fingerprint": "b" * 64},
            "images .* None, not images with the fingerprint bbbbbbbbbbbb;",
        ),
        ({"fresh": 1}, "no --fresh, not --fresh 1"),
        ({"grid_height": 4, "level": 1}, "no --level, not --level 1"),
        ({"codes": 1, "latents": "c" * 64}, "no --latents, not latents with the digest cccccccccccc"),
    ],
)
def test_changed_settings_are_refused_by_the_flags_that_set_them(tmp_path, changed, message):
    started(tmp_path)
    before = (tmp_path / RUN_NAME).read_text()
    with pytest.raises(UserError, match=f"holds a run with {message}.*--out.*--resume never") as caught:
        Run(tmp_path, {**SETTINGS, **changed})
    assert "\n" not in str(caught.value)
    assert (tmp_path / RUN_NAME).read_text() == before


def test_settings_that_do_not_change_the_result_may_change(tmp_path):
    started(tmp_path, steps=10, log_steps=1, workers=0)
    more = {"steps": 20, "log_steps": 3, "workers": 2, "out": Path("there"), "save_steps": 7, "report_steps": 8}
    more |= {"accumulation": 4, "compile": True, "gradient_checkpointing": True, "resume": "auto", "keep_states": 9}
    assert Run(tmp_path, {**SETTINGS, **more}).step == 5


@pytest.mark.parametrize("off", [None, False, 0, "", ()])
def test_setting_that_the_old_run_lacks_counts_as_off(tmp_path, off):
    started(tmp_path)
    assert Run(tmp_path, {**SETTINGS, "new": off}).step == 5
    fewer = {name: value for name, value in SETTINGS.items() if name != "learning_rate"}
    with pytest.raises(UserError, match=r"holds a run with --learning-rate 0\.1, not no --learning-rate"):
        Run(tmp_path, fewer)


def test_setting_that_the_old_run_lacks_has_its_off_value(tmp_path):
    """The off value may be a word or a number, which alone would not count as off."""
    started(tmp_path)
    off = {"gradient": "copied", "weights": (1, 2)}
    assert Run(tmp_path, {**SETTINGS, **off}, off=off).step == 5
    with pytest.raises(UserError, match="not --gradient turned"):
        Run(tmp_path, {**SETTINGS, **off, "gradient": "turned"}, off=off)


def test_older_run_is_refused_by_the_flag_that_resumes_it(tmp_path):
    """A setting that is on by default now was off then, and the message names the flag for it."""
    started(tmp_path)
    with pytest.raises(UserError, match="holds a run with --no-absolute-positions, not --absolute-positions; give"):
        Run(tmp_path, {**SETTINGS, "absolute_positions": True}, off={"absolute_positions": False})
    assert Run(tmp_path, {**SETTINGS, "absolute_positions": False}, off={"absolute_positions": False}).step == 5


def test_resume_never_deletes_the_run(tmp_path):
    started(tmp_path)
    other = Run(tmp_path, SETTINGS, main=False, resume="never")
    assert other.step == 5  # only the main process deletes
    again = Run(tmp_path, {**SETTINGS, "learning_rate": 0.2}, resume="never")
    assert again.step == 0
    assert again.state() is None
    again.begin()
    assert again.states.steps() == []
    assert not (tmp_path / METRICS_NAME).exists()


@pytest.mark.parametrize(
    ("saved", "logged", "kept"),
    [
        (10, 10, True),  # after the last step
        (4, 8, True),  # after early stopping
        (8, 8, True),  # stopped by a signal
        (5, 5, False),  # the disk was full when the first snapshot was to be saved
        (3, 2, False),
    ],
)
@pytest.mark.parametrize("damaged", [False, True])
def test_a_trained_model_without_an_intact_snapshot_is_kept(tmp_path, saved, logged, kept, damaged):
    settings = {**SETTINGS, "save_steps": 5}
    run = Run(tmp_path, settings)
    run.begin()
    for step in range(1, logged + 1):
        run.log(step, {"loss": 1.0})
    (tmp_path / WEIGHTS_NAME).write_text("a model")
    model = {"family": "prior", "kind": "hourglass", "config": {}, "digest": "", "provenance": {"steps": saved}}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(model))
    if damaged:
        (run.states.path(saved)).mkdir(parents=True)
    del run
    gc.collect()
    for main in (True, False):
        if kept:
            with pytest.raises(UserError, match="has a trained model, but no intact snapshot"):
                Run(tmp_path, {**settings, "learning_rate": 0.2}, main=main)
        else:
            assert Run(tmp_path, settings, main=main).step == 0
        gc.collect()
    assert (tmp_path / WEIGHTS_NAME).exists()
    Run(tmp_path, settings, resume="never")
    gc.collect()
    assert Run(tmp_path, settings).step == 0  # killed before its first snapshot
    assert not (tmp_path / WEIGHTS_NAME).exists()


def test_other_processes_write_nothing(tmp_path):
    other = Run(tmp_path / "run", SETTINGS, main=False)
    other.begin()
    other.log(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_run_json_records_command_settings_and_versions(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/some/where/train.py", "--images", "my photos"])
    Run(tmp_path, SETTINGS).begin()
    described = json.loads((tmp_path / RUN_NAME).read_text())
    assert described["command"] == "train.py --images 'my photos'"
    assert described["settings"] == {**SETTINGS, "widths": [4, 6], "out": "here"}
    assert described["versions"]["torch"] == torch.__version__
    assert {"python", "smalti", "datasets"} <= described["versions"].keys()


def test_second_training_in_one_folder_is_refused_but_not_the_ranks_of_the_first(tmp_path):
    source = (
        "import sys; from pathlib import Path; from smalti.training.run_folder import Run; Run(Path(sys.argv[1]), {})"
    )
    run = Run(tmp_path / "run", SETTINGS)
    second = subprocess.run(
        [sys.executable, "-c", source, tmp_path / "run"], capture_output=True, text=True, check=False
    )
    assert "is being written by another process" in second.stderr.splitlines()[-1]
    assert Run(tmp_path / "run", SETTINGS, main=False).step == 0
    del run
    gc.collect()
    subprocess.run([sys.executable, "-c", source, tmp_path / "run"], check=True)


def test_model_that_was_not_trained_in_the_folder_is_kept(tmp_path):
    (tmp_path / "model.safetensors").touch()
    for resume in ("auto", "never"):
        with pytest.raises(UserError, match="has a model that was not trained there"):
            Run(tmp_path, SETTINGS, resume=resume)
    with pytest.raises(UserError, match="has a model that was not trained there"):
        forget(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        (METRICS_NAME, '{"epoch": 1, "loss": 2.0}\n'),
        (METRICS_NAME, '{"step": 1, "loss": 2.0}\n'),
        (RUN_NAME, "not JSON"),
        (RUN_NAME, '{"id": "of another program"}'),
        (RUN_NAME, "[]"),
    ],
)
def test_files_of_another_program_are_kept(tmp_path, resume, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"{name} was not written by a training, or is damaged; give another --out"):
        Run(tmp_path, SETTINGS, resume=resume)
    assert (tmp_path / name).read_text() == text


def test_snapshots_without_the_record_of_their_settings_are_not_resumed(tmp_path):
    started(tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "states", tmp_path / "copy" / "states")
    with pytest.raises(UserError, match="copy has snapshots, but no run"):
        Run(tmp_path / "copy", SETTINGS)
    assert Run(tmp_path / "copy", SETTINGS, resume="never").step == 0
