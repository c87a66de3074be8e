"""The commands end to end, on a folder of tiny images: trained, stopped by Ctrl-C, gone on with, sampled, filled.

What must be typed is run as typed, in a process of its own: it starts slowly, so the rest calls the same `main` in this
one. Both must then agree to the bit.
"""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.command_toys import run
from PIL import Image

from smalti.scripts import build_latents, inpaint, sample, train_prior, train_tokenizer
from smalti.training.run_folder import METRICS_NAME
from smalti.training.snapshots import STATES_NAME, States

SCRIPTS = Path(__file__).parents[2] / "scripts"
# Saves only when it is stopped or done: whatever a stopped run goes on from, the signal made it save.
STEPS = "--batch-size 8 --log-steps 1 --report-steps 1000 --save-steps 1000 --precision fp32"
SMALL = "--height 8 --width 8 --widths 6 8 --residual-blocks 1 --code-width 6 --depth 2 --branching 4"
TOKENIZER = f"--steps 150 --images img {SMALL}"
PRIOR = "--steps 40 --latents latents.h5 --model-width 16 --heads 2 --depth 1 1 1 --feedforward-mult 2 --ema-decay 0.9"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # like this process, so that both round alike


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def interrupt(command, run_folder):
    """Types a command, and Ctrl-C once it has measured something: (exit status, all it printed)."""
    process = subprocess.Popen(
        command, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    while not (run_folder / METRICS_NAME).exists() or not (run_folder / METRICS_NAME).read_text().count("\n") > 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # a terminal signals the whole group: the launcher too
    shown = process.communicate(timeout=60)[0]
    while not States(run_folder).steps():  # the launcher may leave before the script has saved
        time.sleep(0.02)
    return process.returncode, shown


def described(folder):
    return json.loads((folder / "config.json").read_text())


def snapshot(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to work in, with forty images of 8x8 pixels."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "img").mkdir()
    random = np.random.default_rng(0)
    for index in range(40):
        image = np.broadcast_to(random.integers(0, 256, 3), (8, 8, 3)).astype(np.uint8)
        image[:4] = random.integers(0, 256, 3)
        Image.fromarray(image).save(folder / "img" / f"{index:03}.png")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def tokenizer(place):
    """As `train_tokenizer` leaves it, uninterrupted."""
    train = [*TOKENIZER.split(), *STEPS.split(), "--out", "whole"]
    AcceleratorState._reset_state(reset_partial_state=True)
    sys.argv = ["train_tokenizer.py", *train]
    train_tokenizer.main()
    return place / "whole"


@pytest.fixture(scope="module")
def latents(tokenizer, place):
    sys.argv = ["build_latents.py", "--tokenizer", "whole", "--out", "latents.h5"]
    build_latents.main()
    return place / "latents.h5"


@pytest.fixture(scope="module")
def prior(latents, place):
    AcceleratorState._reset_state(reset_partial_state=True)
    sys.argv = ["train_prior.py", *PRIOR.split(), *STEPS.split(), "--out", "prior"]
    train_prior.main()
    return place / "prior"


def test_a_tokenizer_stopped_by_ctrl_c_ends_as_if_it_had_not_been(tokenizer, place, capfd):
    arguments = [*TOKENIZER.split(), *STEPS.split(), "--out", "stopped"]
    status, shown = interrupt([sys.executable, str(SCRIPTS / "train_tokenizer.py"), *arguments], place / "stopped")
    assert status == 130
    assert "stopped after step" in shown
    assert "Traceback" not in shown
    steps = described(place / "stopped")["provenance"]["steps"]
    assert 0 < steps < 150
    assert run(capfd, train_tokenizer.main, *arguments)[0] == 0
    assert described(place / "stopped")["digest"] == described(tokenizer)["digest"]
    assert described(place / "stopped")["provenance"] == described(tokenizer)["provenance"]


def test_a_finished_run_is_left_alone(tokenizer, capfd):
    before = snapshot(tokenizer)
    status, out, _ = run(capfd, train_tokenizer.main, *TOKENIZER.split(), *STEPS.split(), "--out", "whole")
    assert status == 0
    assert "whole is finished: 150 steps" in out
    assert snapshot(tokenizer) == before


def test_other_settings_are_refused_and_never_resuming_begins_anew(tokenizer, place, capfd):
    changed = [*TOKENIZER.split(), *STEPS.split(), "--learning-rate", "0.01", "--out", "whole"]
    status, _, err = run(capfd, train_tokenizer.main, *changed)
    assert status == 2
    assert err.splitlines()[-1].startswith("error: whole holds a run with learning_rate=0.001, not 0.01; give")
    small = [*TOKENIZER.split(), "--batch-size", "4", "--precision", "fp32", "--out", "again"]
    assert run(capfd, train_tokenizer.main, *small, "--steps", "2")[0] == 0
    first = described(place / "again")["digest"]
    assert run(capfd, train_tokenizer.main, *small, "--steps", "1", "--resume", "never")[0] == 0
    assert described(place / "again")["provenance"]["steps"] == 1
    assert described(place / "again")["digest"] != first
    assert len((place / "again" / METRICS_NAME).read_text().splitlines()) <= 2


def test_a_run_goes_back_to_a_kept_state(tokenizer, place, capfd):
    """Nothing of what came after it is left, and it comes to the same end."""
    flags = [*TOKENIZER.split(), *STEPS.split(), "--save-steps", "40", "--keep-states", "9", "--out", "back"]
    assert run(capfd, train_tokenizer.main, *flags)[0] == 0
    assert States(place / "back").steps() == [40, 80, 120, 150]
    status, _, err = run(capfd, train_tokenizer.main, *flags, "--resume", "30")
    assert status == 2
    assert "keeps no state of step 30; --resume one of these: 40, 80, 120, 150" in err
    before = States(place / "back").path(40).stat().st_mtime_ns
    assert run(capfd, train_tokenizer.main, *flags, "--resume", "40")[0] == 0
    assert States(place / "back").path(40).stat().st_mtime_ns == before
    assert described(place / "back")["digest"] == described(tokenizer)["digest"]


def test_a_disk_that_fills_ends_a_run_in_one_line_and_costs_no_state(tokenizer, place, capfd):
    """The kernel's limit on the size of files stands for the disk: it lets the small files through."""
    shutil.copytree(tokenizer, place / "full")
    (place / "full" / METRICS_NAME).unlink()  # larger than the model
    before = snapshot(place / "full" / STATES_NAME)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))
    flags = [*TOKENIZER.split(), "--steps", "152", *STEPS.split(), "--save-steps", "1", "--log-steps", "1000"]
    flags += ["--out", "full"]
    try:
        status, _, err = run(capfd, train_tokenizer.main, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    assert err.splitlines()[-1].startswith("error: full/model.safetensors cannot be written: it is larger than")
    assert "Traceback" not in err
    assert snapshot(place / "full" / STATES_NAME) == before
    assert run(capfd, train_tokenizer.main, *flags)[0] == 0
    assert described(place / "full")["provenance"]["steps"] == 152


def test_a_read_only_folder_is_one_line_before_anything_is_trained(tokenizer, place, capfd, monkeypatch):
    """As for root, whom no permissions stop: the error is put in where the first file is written."""

    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    status, _, err = run(capfd, train_tokenizer.main, *TOKENIZER.split(), *STEPS.split(), "--out", "read-only")
    assert status == 2
    assert "read-only/.run.json.partial cannot be written: permission denied; give another --out" in err
    assert "Traceback" not in err
    assert not list((place / "read-only").iterdir())


def test_codebook_usage_is_measured(tokenizer):
    """Of a codebook of 4 x 4: shares of sixteenths."""
    lines = [json.loads(line) for line in (tokenizer / METRICS_NAME).read_text().splitlines()]
    (line,) = [line for line in lines if "codes_used" in line]
    assert line["codes_used"] * 16 == int(line["codes_used"] * 16) > 0
    assert 1 <= line["code_perplexity"] <= line["codes_used"] * 16
    assert all(line["memory_gib"] > 0 for line in lines if "loss" in line)


def test_a_state_of_a_prior_samples_as_the_prior_does(prior, place, capfd):
    flags = ["--num", "2", "--precision", "fp32", "--steps", "2"]
    newest = str(States(prior).path(40))
    for source, name in [("prior", "x.png"), (newest, "y.png")]:
        assert run(capfd, sample.main, "--prior", source, *flags, "--out", name)[0] == 0
    assert np.array_equal(np.array(Image.open(place / "x.png")), np.array(Image.open(place / "y.png")))


def test_a_latent_set_that_is_there_is_not_built_again(latents, capfd):
    before = latents.read_bytes()
    status, out, _ = run(capfd, build_latents.main, "--tokenizer", "whole", "--out", "latents.h5")
    assert status == 0
    assert "latents.h5 holds these codes already." in out
    assert "80, 2×2 of 4·4" in out
    assert latents.read_bytes() == before
    assert run(capfd, build_latents.main, "--tokenizer", "whole", "--out", "latents.h5", "--no-flips")[0] == 0
    assert latents.read_bytes() != before
    assert run(capfd, build_latents.main, "--tokenizer", "whole", "--out", "latents.h5")[0] == 0


def test_a_prior_launched_and_stopped_by_ctrl_c_ends_as_if_it_had_not_been(prior, place, capfd):
    """As typed. The launcher adds a traceback of its own waiting (Python's, at `wait`); the script's is none."""
    arguments = [*PRIOR.split(), *STEPS.split(), "--out", "launched"]
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    _, shown = interrupt([*launcher, str(SCRIPTS / "train_prior.py"), *arguments], place / "launched")
    assert "stopped after step" in shown
    assert shown.count("Traceback") <= 1
    assert 'train_prior.py", line' not in shown  # no frame of ours
    assert 0 < described(place / "launched")["provenance"]["steps"] < 40
    assert run(capfd, train_prior.main, *arguments)[0] == 0
    assert described(place / "launched")["digest"] == described(prior)["digest"]
    assert described(place / "launched")["provenance"] == described(prior)["provenance"]


def test_a_tokenizer_that_did_not_make_the_codes_is_refused(prior, place, capfd):
    assert run(capfd, train_tokenizer.main, *TOKENIZER.split(), "--steps", "1", "--out", "other")[0] == 0
    for main, arguments in [
        (train_prior.main, [*PRIOR.split(), *STEPS.split(), "--tokenizer", "other", "--out", "never"]),
        (sample.main, ["--prior", "prior", "--tokenizer", "other", "--out", "never.png"]),
    ]:
        status, _, err = run(capfd, main, *arguments)
        assert status == 2
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert described(place / "other")["digest"][:12] in line
        assert described(place / "whole")["digest"][:12] in line
    assert not (place / "never").exists()
    assert not (place / "never.png").exists()


def test_the_grid_is_the_latent_sets(latents, place, capfd):
    status, _, err = run(capfd, train_prior.main, *PRIOR.split(), "--steps", "1", "--height", "5", "--out", "never")
    assert status == 2
    assert "--height" in err  # no such flag
    arguments = [*PRIOR.split(), "--steps", "1", "--workers", "1", "--out", "by-workers"]
    assert run(capfd, train_prior.main, *arguments)[0] == 0
    config = described(place / "by-workers")["config"]
    assert (config["height"], config["width"], config["radices"]) == (2, 2, [4, 4])


def test_samples_are_the_seeds(prior, place, capfd):
    flags = ["--prior", "prior", "--num", "5", "--batch-size", "2", "--precision", "fp32", "--steps", "3"]
    for name, seed in [("a.png", 1), ("b.png", 1), ("c.png", 2)]:
        status, out, _ = run(capfd, sample.main, *flags, "--seed", seed, "--out", name)
        assert (status, out) == (0, f"{name}\n")
    a, b, c = (Image.open(place / name) for name in ("a.png", "b.png", "c.png"))
    assert np.array_equal(np.array(a), np.array(b))
    assert not np.array_equal(np.array(a), np.array(c))
    settings = json.loads(c.text["smalti"])
    assert settings["seed"] == 2
    assert settings["prior_digests"] == [described(prior)["digest"]]


def test_a_hole_is_filled_and_nothing_else(prior, place, capfd):
    random = np.random.default_rng(1)
    pixels = random.integers(0, 256, (12, 16, 3)).astype(np.uint8)  # another size than it was trained on
    hole = np.zeros((12, 16), np.uint8)
    hole[2:6, 3:9] = 255
    Image.fromarray(pixels).save(place / "in.png")
    Image.fromarray(hole).save(place / "mask.png")
    flags = ["--prior", "prior", "--image", "in.png", "--mask", "mask.png", "--num", "2", "--steps", "3"]
    status, out, _ = run(capfd, inpaint.main, *flags, "--out", "filled/out.png")
    assert (status, out) == (0, "filled/out.png\n")
    assert sorted(path.name for path in (place / "filled").iterdir()) == ["out-2.png", "out-sheet.png", "out.png"]
    for name in ("out.png", "out-2.png"):
        filled = np.array(Image.open(place / "filled" / name))
        assert np.array_equal(filled[hole == 0], pixels[hole == 0])
        assert not np.array_equal(filled[hole > 0], pixels[hole > 0])
