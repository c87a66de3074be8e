"""Tests that smalti works on the fake device as on the CPU. `test_fake_device.py` runs them in a separate process."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_device import current_device, on_fake_device, synchronizations, synchronizing_refused
from helpers import toys
from helpers.command_toys import run
from PIL import Image
from safetensors.torch import load_file

import smalti.training.loop
import smalti.training.optimizers
from smalti.core.models import WEIGHTS_NAME
from smalti.core.randomness import row_seeds
from smalti.latentsets.reader import LatentSet
from smalti.scripts import build_latents, inpaint, sample, train_prior, train_tokenizer
from smalti.tokenizers.base import Tokenizer
from smalti.training.accelerator import accelerator
from smalti.training.signals import Interrupted

SMALL = "--height 8 --width 8 --widths 6 8 --residual-blocks 1 --code-width 6 --depth 2 --branching 4 --precision fp32"
CAUSAL = ("pixelcnn", "transformer")
STEPS = "--steps 6 --batch-size 8 --precision fp32"


def on_both(work):
    """Calls `work` with a name on the CPU, then on the fake device. Returns both results."""
    assert accelerator("fp32").device.type == "cpu"
    cpu_result = work("cpu")
    with on_fake_device():
        assert accelerator("fp32").device.type == "fake_device"
        return cpu_result, work("fake_device")


@pytest.fixture(autouse=True)
def _muon_in_float32(monkeypatch):
    """Some CPUs would compute Muon's steps in bf16, the fake device never."""
    monkeypatch.setattr(smalti.training.optimizers, "has_native_bf16", lambda kind: False)


@pytest.fixture
def steps_must_not_synchronize(monkeypatch):
    """Makes training steps fail if they wait for the fake device."""
    step = smalti.training.loop._step

    def step_without_synchronizing(*arguments):
        if current_device().type == "cpu":
            return step(*arguments)
        with synchronizing_refused():
            return step(*arguments)

    monkeypatch.setattr(smalti.training.loop, "_step", step_without_synchronizing)


def test_fake_device_refuses_mixed_devices_and_synchronizing():
    """The other tests would pass on a fake device that behaves like the CPU."""
    with on_fake_device() as device:
        fake, cpu = torch.ones(3, device=device), torch.ones(3)
        for mixed in (lambda: fake + cpu, lambda: torch.cat([fake, cpu]), lambda: torch.equal(fake, cpu)):
            with pytest.raises(RuntimeError, match=r"two devices|same device"):
                mixed()
        with synchronizing_refused():
            fake.mul_(2).sum()
            for synchronizing in (fake.tolist, fake.sum().item, fake.cpu, lambda: fake[fake > 0], fake.nonzero):
                with pytest.raises(RuntimeError, match="waits for the device"):
                    synchronizing()
        assert fake.tolist() == [2.0] * 3


@pytest.mark.parametrize(("family", "kind"), toys.KINDS)
def test_training_equals_the_cpus_without_synchronizing(family, kind, tmp_path, request):
    """VQ-GAN is excepted: it synchronizes while the weight of its discriminator rises."""
    if kind != "vqgan":
        request.getfixturevalue("steps_must_not_synchronize")

    def train(name):
        toys.train(tmp_path / name, lambda: toys.make(family, kind))
        return load_file(tmp_path / name / WEIGHTS_NAME), toys.measured(tmp_path / name)

    (weights, lines), (others, other_lines) = on_both(train)
    # attention and gradients of convolutions are summed in another order, which adversarial training amplifies
    factor = 20 if kind == "vqgan" else 1
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=factor * 1e-3, atol=factor * 1e-4)
    assert [line.keys() for line in lines] == [line.keys() for line in other_lines]


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamax"])
def test_bad_batch_changes_nothing(optimizer, tmp_path, steps_must_not_synchronize):
    """AdaMax is excepted: it counts the step."""

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
def test_resumed_run_equals_uninterrupted_run(optimizer, tmp_path, steps_must_not_synchronize):
    config = replace(toys.CONFIG, optimizer=optimizer)
    with on_fake_device():
        toys.train(tmp_path / "whole", config=config)
        with pytest.raises(Interrupted):
            toys.train(tmp_path / "stopped", config=config, wrap=lambda rows: toys.Signalling(rows, 6))
        toys.train(tmp_path / "stopped", config=config)
    assert toys.outcome(tmp_path / "stopped") == toys.outcome(tmp_path / "whole")


@pytest.mark.parametrize("kind", [kind for family, kind in toys.KINDS if family == "tokenizer"])
def test_reconstructions_equal_the_cpus(kind):
    model, _, rows, _ = toys.make("tokenizer", kind)
    assert isinstance(model, Tokenizer)
    images = rows.columns["images"].float() / 127.5 - 1

    @torch.no_grad()
    def work(_):
        model.eval().to(current_device())
        codes = model.encode(images.to(current_device()))
        return [tensor.cpu() for tensor in (*codes, model.decode(codes))]

    for one, other in zip(*on_both(work), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for family, kind in toys.KINDS if family == "prior" and kind != "realnvp"])
def test_sampling_synchronizes_equally_often_for_many_and_few_steps(kind):
    """It also draws what it does on the CPU, with known codes and class conditioning."""
    model, _, rows, _ = toys.make("prior", kind)
    columns = {name: column[:4] for name, column in rows.columns.items()}
    upper = tuple(column for name, column in columns.items() if name.startswith("upper"))
    codes, condition = columns["codes"], columns["conditions" if model.condition_width else "labels"]
    first_two = torch.arange(codes[0].numel()).view(model.level.shape) < 2
    known = {"known": codes, "known_mask": first_two.expand_as(codes)}
    samplings = [model.method.sampling()] if kind in CAUSAL else [model.method.sampling(steps=n) for n in (3, 9)]
    if kind == "hourglass":
        samplings = [replace(sampling, min_steps=sampling.steps) for sampling in samplings]

    def work(_):
        device, counts = current_device(), []
        model.eval().to(device)
        for sampling in samplings:
            before = synchronizations()
            codes = model.method.sampler(
                model,
                **{name: tensor.to(device) for name, tensor in known.items()},
                seeds=row_seeds(0, torch.arange(4)).to(device),
                condition=condition.to(device),
                upper=tuple(level.to(device) for level in upper),
                sampling=sampling,
            )
            counts.append(synchronizations() - before)
        return codes.cpu(), counts

    (one, _), (other, counts) = on_both(work)
    assert one.equal(other)
    assert len(set(counts)) == 1
    assert 0 < counts[0] < 9  # the inputs are checked before sampling and the result after it


def test_commands_give_the_results_of_the_cpu(tmp_path, monkeypatch, capfd):
    (tmp_path / "img").mkdir()
    random = np.random.default_rng(0)
    for index in range(24):
        Image.fromarray(random.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(tmp_path / f"img/{index}.png")
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(tmp_path / "mask.png")
    commands = [
        (train_tokenizer, f"--images img {SMALL} {STEPS} --out tokenizer"),
        (build_latents, "--tokenizer tokenizer --precision fp32 --out latents.h5"),
    ]
    kinds = ("hourglass", "pixelcnn")  # the cases above train and sample all kinds
    for prior in kinds:
        width = "--model-width 8" if prior == "pixelcnn" else "--model-width 16 --heads 2"
        use = f"{'' if prior in CAUSAL else '--steps 4'} --prior prior-{prior} --precision fp32 --out {prior}"
        commands += [
            (
                train_prior,
                f"--prior {prior} --latents latents.h5 {width} {STEPS} --out prior-{prior} --sheet-samples 0",
            ),
            (sample, f"{use}-samples.png --num 4"),
            (inpaint, f"{use}-fills.png --image ../img/0.png --mask ../mask.png"),
        ]

    def work(name):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        Path("img").symlink_to("../img")
        for command, flags in commands:
            status, _, shown = run(capfd, command.main, *flags.split())
            assert status == 0, shown
        pictures = {path.name: np.array(Image.open(path)).tolist() for path in Path().glob("*-*s.png")}
        assert len(pictures) == 2 * len(kinds)
        latents = LatentSet("latents.h5")
        return [level.tolist() for level in latents.batch(range(len(latents)))], pictures

    one, other = on_both(work)
    assert one == other
