"""The commands end to end on tiny images: training, Ctrl-C, resuming, sampling and inpainting.

Some commands run in a process of their own, as a user would start them. That is slow, so the others
call the same `main` in this process. Both must agree to the bit.
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
from helpers.command_toys import run
from helpers.latents import small_set
from helpers.toys import log_probs
from PIL import Image

from smalti.commands import train_prior as prior_training
from smalti.commands.model_paths import load_prior_with_tokenizer
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows, open_images
from smalti.priors.methods.autoregressive import LikelihoodConfig
from smalti.priors.networks.pixelcnn import PixelCNNConfig
from smalti.scripts import build_latents, evaluate, inpaint, sample, train_prior, train_tokenizer
from smalti.training.run_folder import METRICS_NAME
from smalti.training.snapshots import STATES_NAME, Snapshots

SCRIPTS = Path(__file__).parents[2] / "scripts"
# Saves only when it is stopped or finished, so a stopped run resumes from the snapshot that the signal caused.
STEPS = "--batch-size 8 --log-steps 1 --report-steps 1000 --save-steps 1000 --precision fp32"
SMALL = "--height 8 --width 8 --widths 6 8 --residual-blocks 1 --code-width 6 --branching 4 2 3"
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
    """Runs a command and presses Ctrl-C after its first metrics; returns its exit status and output."""
    process = subprocess.Popen(
        command, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    while not (run_folder / METRICS_NAME).exists() or not (run_folder / METRICS_NAME).read_text().count("\n") > 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # a terminal signals the whole group: the launcher too
    output = process.communicate(timeout=60)[0]
    while not Snapshots(run_folder).steps():  # the launcher may exit before the script has saved
        time.sleep(0.02)
    return process.returncode, output


def checkpoint_config(folder):
    return json.loads((folder / "config.json").read_text())


def file_contents(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A working folder with forty images of 8x8 pixels."""
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
def tokenizer(workspace):
    """A tokenizer trained without interruption."""
    train = [*TOKENIZER.split(), *STEPS.split(), "--out", "whole"]
    sys.argv = ["train_tokenizer.py", *train]
    train_tokenizer.main()
    return workspace / "whole"


@pytest.fixture(scope="module")
def latents(tokenizer, workspace):
    sys.argv = ["build_latents.py", "--tokenizer", "whole", "--out", "latents.h5"]
    build_latents.main()
    return workspace / "latents.h5"


@pytest.fixture(scope="module")
def prior(latents, workspace):
    sys.argv = ["train_prior.py", *PRIOR.split(), *STEPS.split(), "--out", "prior"]
    train_prior.main()
    return workspace / "prior"


def test_a_resumed_tokenizer_equals_the_uninterrupted_one(tokenizer, workspace, capfd):
    arguments = [*TOKENIZER.split(), *STEPS.split(), "--out", "stopped"]
    status, output = interrupt([sys.executable, str(SCRIPTS / "train_tokenizer.py"), *arguments], workspace / "stopped")
    assert status == 130
    assert "stopped after step" in output
    assert "Traceback" not in output
    steps = checkpoint_config(workspace / "stopped")["provenance"]["steps"]
    assert 0 < steps < 150
    assert run(capfd, train_tokenizer.main, *arguments)[0] == 0
    assert checkpoint_config(workspace / "stopped")["digest"] == checkpoint_config(tokenizer)["digest"]
    assert checkpoint_config(workspace / "stopped")["provenance"] == checkpoint_config(tokenizer)["provenance"]


def test_a_finished_run_is_not_changed(tokenizer, capfd):
    before = file_contents(tokenizer)
    status, out, _ = run(capfd, train_tokenizer.main, *TOKENIZER.split(), *STEPS.split(), "--out", "whole")
    assert status == 0
    assert "whole is finished: 150 steps" in out
    assert file_contents(tokenizer) == before


def test_changed_settings_are_refused_and_resume_never_starts_over(tokenizer, workspace, capfd):
    changed = [*TOKENIZER.split(), *STEPS.split(), "--learning-rate", "0.01", "--out", "whole"]
    status, _, err = run(capfd, train_tokenizer.main, *changed)
    assert status == 2
    assert err.splitlines()[-1].startswith(
        "error: whole holds a run with --learning-rate 0.001, not --learning-rate 0.01; give"
    )
    small = [*TOKENIZER.split(), "--batch-size", "4", "--precision", "fp32", "--out", "again"]
    assert run(capfd, train_tokenizer.main, *small, "--steps", "2")[0] == 0
    first = checkpoint_config(workspace / "again")["digest"]
    assert run(capfd, train_tokenizer.main, *small, "--steps", "1", "--resume", "never")[0] == 0
    assert checkpoint_config(workspace / "again")["provenance"]["steps"] == 1
    assert checkpoint_config(workspace / "again")["digest"] != first
    assert len((workspace / "again" / METRICS_NAME).read_text().splitlines()) <= 2


def test_a_rollback_to_a_snapshot_gives_the_same_result(tokenizer, workspace, capfd):
    """The later snapshots are discarded, and training ends with the same weights."""
    flags = [*TOKENIZER.split(), *STEPS.split(), "--save-steps", "40", "--keep-states", "9", "--out", "back"]
    assert run(capfd, train_tokenizer.main, *flags)[0] == 0
    assert Snapshots(workspace / "back").steps() == [40, 80, 120, 150]
    status, _, err = run(capfd, train_tokenizer.main, *flags, "--resume", "30")
    assert status == 2
    assert "keeps no state of step 30; --resume one of these: 40, 80, 120, 150" in err
    before = Snapshots(workspace / "back").path(40).stat().st_mtime_ns
    assert run(capfd, train_tokenizer.main, *flags, "--resume", "40")[0] == 0
    assert Snapshots(workspace / "back").path(40).stat().st_mtime_ns == before
    assert checkpoint_config(workspace / "back")["digest"] == checkpoint_config(tokenizer)["digest"]


def test_a_full_disk_ends_a_run_with_one_message_and_keeps_its_snapshots(tokenizer, workspace, capfd):
    """The kernel's limit on file size stands for a full disk; small files still fit."""
    shutil.copytree(tokenizer, workspace / "full")
    (workspace / "full" / METRICS_NAME).unlink()  # larger than the model
    before = file_contents(workspace / "full" / STATES_NAME)
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
    assert file_contents(workspace / "full" / STATES_NAME) == before
    assert run(capfd, train_tokenizer.main, *flags)[0] == 0
    assert checkpoint_config(workspace / "full")["provenance"]["steps"] == 152


def test_a_read_only_folder_gives_one_message_before_training(tokenizer, workspace, capfd, monkeypatch):
    """The error is injected into the first write, since permissions do not stop root."""

    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    status, _, err = run(capfd, train_tokenizer.main, *TOKENIZER.split(), *STEPS.split(), "--out", "read-only")
    assert status == 2
    assert "read-only/.run.json.partial cannot be written: permission denied; give another --out" in err
    assert "Traceback" not in err
    assert not (workspace / "read-only").exists()


def test_codebook_usage_is_measured(tokenizer):
    """The codebook has 4 x 4 codes, so shares are sixteenths."""
    lines = [json.loads(line) for line in (tokenizer / METRICS_NAME).read_text().splitlines()]
    (line,) = [line for line in lines if "codes_used" in line]
    codes_used = line["codes_used"] * 24
    assert 0 < codes_used == pytest.approx(round(codes_used), rel=1e-4)
    assert 1 <= line["code_perplexity"] <= codes_used + 1e-3
    assert all(line["memory_gib"] > 0 for line in lines if "loss" in line)


def test_a_snapshot_of_a_prior_samples_the_same_images(prior, workspace, capfd):
    flags = ["--num", "2", "--precision", "fp32", "--steps", "2"]
    newest = str(Snapshots(prior).path(40))
    for source, name in [("prior", "x.png"), (newest, "y.png")]:
        assert run(capfd, sample.main, "--prior", source, *flags, "--out", name)[0] == 0
    assert np.array_equal(np.array(Image.open(workspace / "x.png")), np.array(Image.open(workspace / "y.png")))


def test_an_existing_latent_set_is_not_built_again(latents, capfd):
    before = latents.read_bytes()
    status, out, _ = run(capfd, build_latents.main, "--tokenizer", "whole", "--out", "latents.h5")
    assert status == 0
    assert "latents.h5 already holds these codes." in out
    assert "80, 2×2 of 4·2·3" in out
    assert latents.read_bytes() == before
    assert run(capfd, build_latents.main, "--tokenizer", "whole", "--out", "latents.h5", "--no-flips")[0] == 0
    assert latents.read_bytes() != before
    assert run(capfd, build_latents.main, "--tokenizer", "whole", "--out", "latents.h5")[0] == 0


def test_a_launched_and_resumed_prior_equals_the_uninterrupted_one(prior, workspace, capfd):
    """The launcher prints a traceback of its own `wait`; the script must print none."""
    arguments = [*PRIOR.split(), *STEPS.split(), "--out", "launched"]
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    _, output = interrupt([*launcher, str(SCRIPTS / "train_prior.py"), *arguments], workspace / "launched")
    assert "stopped after step" in output
    assert output.count("Traceback") <= 1
    assert 'train_prior.py", line' not in output  # no stack frame of the script
    assert 0 < checkpoint_config(workspace / "launched")["provenance"]["steps"] < 40
    assert run(capfd, train_prior.main, *arguments)[0] == 0
    assert checkpoint_config(workspace / "launched")["digest"] == checkpoint_config(prior)["digest"]
    assert checkpoint_config(workspace / "launched")["provenance"] == checkpoint_config(prior)["provenance"]


def test_a_tokenizer_that_did_not_make_the_codes_is_refused(prior, workspace, capfd):
    assert run(capfd, train_tokenizer.main, *TOKENIZER.split(), "--steps", "1", "--out", "other")[0] == 0
    for main, arguments in [
        (train_prior.main, [*PRIOR.split(), *STEPS.split(), "--tokenizer", "other", "--out", "never"]),
        (sample.main, ["--prior", "prior", "--tokenizer", "other", "--out", "never.png"]),
    ]:
        status, _, err = run(capfd, main, *arguments)
        assert status == 2
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert checkpoint_config(workspace / "other")["digest"][:12] in line
        assert checkpoint_config(workspace / "whole")["digest"][:12] in line
    assert not (workspace / "never").exists()
    assert not (workspace / "never.png").exists()


def test_the_latent_set_decides_the_grid(latents, workspace, capfd):
    status, _, err = run(capfd, train_prior.main, *PRIOR.split(), "--steps", "1", "--height", "5", "--out", "never")
    assert status == 2
    assert "--height" in err  # no such flag
    arguments = [*PRIOR.split(), "--steps", "1", "--workers", "1", "--out", "by-workers"]
    assert run(capfd, train_prior.main, *arguments)[0] == 0
    config = checkpoint_config(workspace / "by-workers")["config"]
    assert (config["height"], config["width"], config["radices"]) == (2, 2, [4, 2, 3])


def test_samples_depend_on_the_seed(prior, workspace, capfd):
    flags = ["--prior", "prior", "--num", "5", "--batch-size", "2", "--precision", "fp32", "--steps", "3"]
    for name, seed in [("a.png", 1), ("b.png", 1), ("c.png", 2)]:
        status, out, _ = run(capfd, sample.main, *flags, "--seed", seed, "--out", name)
        assert (status, out) == (0, f"{name}\n")
    a, b, c = (Image.open(workspace / name) for name in ("a.png", "b.png", "c.png"))
    assert np.array_equal(np.array(a), np.array(b))
    assert not np.array_equal(np.array(a), np.array(c))
    settings = json.loads(c.text["smalti"])
    assert settings["seed"] == 2
    assert settings["prior_digests"] == [checkpoint_config(prior)["digest"]]


def test_only_masked_pixels_change(prior, workspace, capfd):
    random = np.random.default_rng(1)
    pixels = random.integers(0, 256, (12, 16, 3)).astype(np.uint8)  # not the size of training
    mask = np.zeros((12, 16), np.uint8)
    mask[2:6, 3:9] = 255
    Image.fromarray(pixels).save(workspace / "in.png")
    Image.fromarray(mask).save(workspace / "mask.png")
    flags = ["--prior", "prior", "--image", "in.png", "--mask", "mask.png", "--num", "2", "--steps", "3"]
    status, out, _ = run(capfd, inpaint.main, *flags, "--out", "filled/out.png")
    assert (status, out) == (0, "filled/out.png\n")
    assert sorted(path.name for path in (workspace / "filled").iterdir()) == ["out-2.png", "out-sheet.png", "out.png"]
    for name in ("out.png", "out-2.png"):
        filled = np.array(Image.open(workspace / "filled" / name))
        assert np.array_equal(filled[mask == 0], pixels[mask == 0])
        assert not np.array_equal(filled[mask > 0], pixels[mask > 0])


def test_a_transformer_is_trained_sampled_inpainted_and_evaluated(latents, workspace, capfd):
    """Also on canvases larger than in training. The likelihood equals the enumerated one."""
    train = "--prior transformer --steps 40 --latents latents.h5 --model-width 16 --heads 2 --layers 2"
    assert run(capfd, train_prior.main, *train.split(), *STEPS.split(), "--out", "causal")[0] == 0
    flags = ["--prior", "causal", "--precision", "fp32", "--temperature", "0.9", "--top-p", "0.95"]
    for name in ("one.png", "same.png"):
        wide = ["--num", "3", "--width", "20", "--out", name]
        assert run(capfd, sample.main, *flags, *wide)[0] == 0
    one, same = (np.array(Image.open(workspace / name)) for name in ("one.png", "same.png"))
    assert np.array_equal(one, same)
    pixels, mask = np.random.default_rng(1).integers(0, 256, (12, 16, 3)).astype(np.uint8), np.zeros((12, 16), np.uint8)
    mask[2:6, 3:9] = 255
    Image.fromarray(pixels).save(workspace / "large.png")
    Image.fromarray(mask).save(workspace / "large-mask.png")
    fill = ["--image", "large.png", "--mask", "large-mask.png", "--num", "1", "--particles", "2", "--candidates", "2"]
    assert run(capfd, inpaint.main, *flags, *fill, "--out", "large-filled.png")[0] == 0
    filled = np.array(Image.open(workspace / "large-filled.png"))
    assert np.array_equal(filled[mask == 0], pixels[mask == 0])
    assert not np.array_equal(filled[mask > 0], pixels[mask > 0])
    (workspace / "more").mkdir()
    for index, image in enumerate(np.random.default_rng(2).integers(0, 256, (100, 8, 8, 3)).astype(np.uint8)):
        Image.fromarray(image).save(workspace / "more" / f"{index}.png")
    score = ["--of", "prior", "--prior", "causal", "--images", "more", "--num", "50", "--reference", "12"]
    assert run(capfd, evaluate.main, *score, "--precision", "fp32", "--out", "scores.json")[0] == 0
    (scored,) = json.loads((workspace / "scores.json").read_text())["scores"]["bits_per_code"].values()
    rows = ImageRows(open_images("more", height=8, width=8), split="held_out", flips=False)
    trained, encoder = load_prior_with_tokenizer("causal", None)
    (codes,) = encoder.encode(to_float(rows.__getitems__(range(len(rows)))["images"]))
    log_p_table = log_probs(trained.head, trained.features(codes)).detach()
    log_p = log_p_table.gather(-1, codes.flatten(1)[..., None])
    assert scored == pytest.approx(-float(log_p.mean()) / np.log(2), abs=1e-3)


def test_last_lines_of_a_training_do_not_need_its_latent_set(tmp_path, monkeypatch):
    """It is memory-mapped, so the training is finished even if its file was deleted meanwhile."""
    small_set(tmp_path / "set.h5")
    lines = []

    def trained(config, _latents):
        config.latents.unlink()
        return tmp_path / "prior"

    monkeypatch.setattr(prior_training, "train_prior", trained)
    monkeypatch.setattr(prior_training, "print_end", lambda _folder, **printed: lines.append(printed["following"]))
    config = prior_training.TrainPrior(PixelCNNConfig(), LikelihoodConfig(), latents=tmp_path / "set.h5")
    prior_training.train_prior_with_ending(config)
    assert lines == [f"python scripts/sample.py --prior {tmp_path / 'prior'}"]
