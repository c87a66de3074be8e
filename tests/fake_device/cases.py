"""What is held of smalti on a device that is not the CPU; `test_fake_device.py` runs this, in a process of its own."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from fake_device import not_waiting, there, waited, where
from helpers import toys
from helpers.command_toys import run
from PIL import Image
from safetensors.torch import load_file

import smalti.training.loop
from smalti.core.models import WEIGHTS_NAME
from smalti.core.randomness import row_seeds
from smalti.latentsets.reader import LatentSet
from smalti.scripts import build_latents, inpaint, sample, train_prior, train_tokenizer
from smalti.tokenizers.base import Tokenizer
from smalti.training.signals import Interrupted

SMALL = "--height 8 --width 8 --widths 6 8 --residual-blocks 1 --code-width 6 --depth 2 --branching 4 --precision fp32"
STEPS = "--steps 6 --batch-size 8 --precision fp32"


def on_both(work):
    """What `work` makes of a name, on the CPU and fake_device."""
    AcceleratorState._reset_state(reset_partial_state=True)
    on_the_cpu = work("cpu")
    AcceleratorState._reset_state(reset_partial_state=True)
    with there():
        return on_the_cpu, work("fake_device")


@pytest.fixture
def impatient(monkeypatch):
    """Steps fake_device are not to wait for it."""
    step = smalti.training.loop._step

    def alone(*given):
        if where().type == "cpu":
            return step(*given)
        with not_waiting():
            return step(*given)

    monkeypatch.setattr(smalti.training.loop, "_step", alone)


def test_devices_do_not_mix_and_waiting_is_refused():
    """Of the device itself: what would pass all that follows if it were the CPU."""
    with there() as device:
        ours, theirs = torch.ones(3, device=device), torch.ones(3)
        for mixed in (lambda: ours + theirs, lambda: torch.cat([ours, theirs]), lambda: torch.equal(ours, theirs)):
            with pytest.raises(RuntimeError, match=r"two devices|same device"):
                mixed()
        with not_waiting():
            ours.mul_(2).sum()
            for waiting in (ours.tolist, ours.sum().item, ours.cpu, lambda: ours[ours > 0], ours.nonzero):
                with pytest.raises(RuntimeError, match="waits for the device"):
                    waiting()
        assert ours.tolist() == [2.0] * 3


@pytest.mark.parametrize(("family", "kind"), toys.KINDS)
def test_training_learns_what_it_does_on_the_cpu_and_waits_for_nothing(family, kind, tmp_path, request):
    """But VQ-GAN waits while its discriminator comes in."""
    if kind != "vqgan":
        request.getfixturevalue("impatient")

    def train(name):
        toys.train(tmp_path / name, lambda: toys.make(family, kind))
        return load_file(tmp_path / name / WEIGHTS_NAME), toys.measured(tmp_path / name)

    (weights, lines), (others, other_lines) = on_both(train)
    for name, tensor in weights.items():  # attention, and gradients of convolutions, are summed otherwise
        torch.testing.assert_close(others[name], tensor, rtol=1e-3, atol=1e-4)
    assert [line.keys() for line in lines] == [line.keys() for line in other_lines]


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamax"])
def test_a_bad_batch_leaves_no_trace(optimizer, tmp_path, impatient):
    """But in AdaMax, which counts it."""

    def train(name):
        config = replace(toys.CONFIG, optimizer=optimizer)
        toys.train(tmp_path / name, config=config, wrap=lambda rows: toys.BadRows(rows, {3}))
        return load_file(tmp_path / name / WEIGHTS_NAME), toys.measured(tmp_path / name)[-2]["skipped_steps"]

    (one, skipped), (other, also_skipped) = on_both(train)
    assert skipped == also_skipped == 1
    for name, weights in one.items():
        tolerance = 0.05 if optimizer == "adamax" else 0.0
        torch.testing.assert_close(other[name], weights, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamax"])
def test_a_run_that_was_stopped_ends_there_as_if_it_had_not_been(optimizer, tmp_path, impatient):
    config = replace(toys.CONFIG, optimizer=optimizer)
    AcceleratorState._reset_state(reset_partial_state=True)
    with there():
        toys.train(tmp_path / "whole", config=config)
        with pytest.raises(Interrupted):
            toys.train(tmp_path / "stopped", config=config, wrap=lambda rows: toys.Signalling(rows, 6))
        toys.train(tmp_path / "stopped", config=config)
    assert toys.outcome(tmp_path / "stopped") == toys.outcome(tmp_path / "whole")


@pytest.mark.parametrize("kind", [kind for family, kind in toys.KINDS if family == "tokenizer"])
def test_images_come_back_as_they_do_on_the_cpu(kind):
    model, _, rows, _ = toys.make("tokenizer", kind)
    assert isinstance(model, Tokenizer)
    images = rows.columns["images"].float() / 127.5 - 1

    @torch.no_grad()
    def work(_):
        model.eval().to(where())
        codes = model.encode(images.to(where()))
        return [tensor.cpu() for tensor in (*codes, model.decode(codes))]

    for one, other in zip(*on_both(work), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for family, kind in toys.KINDS if family == "prior" and kind != "realnvp"])
def test_drawing_waits_as_often_for_many_steps_as_for_few(kind):
    """And draws what it does on the CPU, some codes given and a class named."""
    model, _, rows, _ = toys.make("prior", kind)
    given = {name: column[:4] for name, column in rows.columns.items()}
    upper = tuple(column for name, column in given.items() if name.startswith("upper"))
    known = {"known": given["codes"], "known_mask": torch.arange(given["codes"][0].numel()).view(model.level.shape) < 2}
    known["known_mask"] = known["known_mask"].expand_as(given["codes"])
    samplings = [model.method.sampling()] if kind == "pixelcnn" else [model.method.sampling(steps=n) for n in (3, 9)]
    if kind == "hourglass":
        samplings = [replace(sampling, min_steps=sampling.steps) for sampling in samplings]

    def work(_):
        device, counted = where(), []
        model.eval().to(device)
        for sampling in samplings:
            before = waited()
            codes = model.method.sampler(
                model,
                **{name: tensor.to(device) for name, tensor in known.items()},
                seeds=row_seeds(0, torch.arange(4)).to(device),
                labels=(torch.arange(4) % 3 - 1).to(device),
                upper=tuple(level.to(device) for level in upper),
                sampling=sampling,
            )
            counted.append(waited() - before)
        return codes.cpu(), counted

    (one, _), (other, waits) = on_both(work)
    assert one.equal(other)
    assert len(set(waits)) == 1
    assert 0 < waits[0] < 9  # what is given is looked at before, what came out after


@pytest.mark.parametrize("prior", ["hourglass", "maskgit", "pixelcnn"])
def test_every_command_makes_the_same(prior, tmp_path, monkeypatch, capfd):
    (tmp_path / "img").mkdir()
    random = np.random.default_rng(0)
    for index in range(24):
        Image.fromarray(random.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(tmp_path / f"img/{index}.png")
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(tmp_path / "mask.png")
    width = "--model-width 8" if prior == "pixelcnn" else "--model-width 16 --heads 2"
    commands = [
        (train_tokenizer, f"--images img {SMALL} {STEPS} --out tokenizer"),
        (build_latents, "--tokenizer tokenizer --precision fp32 --out latents.h5"),
        (train_prior, f"--prior {prior} --latents latents.h5 {width} {STEPS} --out prior"),
        (sample, "--prior prior --num 4 --precision fp32 --out samples.png"),
        (inpaint, "--prior prior --image ../img/0.png --mask ../mask.png --precision fp32 --out fills.png"),
    ]

    def work(name):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        Path("img").symlink_to("../img")
        for command, flags in commands:
            status, _, shown = run(capfd, command.main, *flags.split())
            assert status == 0, shown
        pictures = [np.array(Image.open(path)).tolist() for path in ("samples.png", "fills.png")]
        latents = LatentSet("latents.h5")
        return [level.tolist() for level in latents.batch(range(len(latents)))], pictures

    one, other = on_both(work)
    assert one == other
