"""The demonstration: every stage runs once, and the results are the promised files."""

import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tyro
from helpers.image_toys import write_patches
from PIL import Image

from smalti import demo as module
from smalti.core.errors import UserError
from smalti.demo import Demo, demo
from smalti.images.sheets import save_png
from smalti.priors.methods.sundae import SundaeSampling


def test_demonstration_writes_all_pictures_and_is_not_repeated(tmp_path, monkeypatch, capsys):
    for label in ("a", "b"):
        write_patches(tmp_path / "images" / label, 40)
    monkeypatch.setattr(module, "TOKENIZER", replace(module.TOKENIZER, widths=(8, 8), residual_blocks=1, branching=2))
    monkeypatch.setattr(module, "PRIOR", replace(module.PRIOR, model_width=16, heads=2, depth=(0, 1, 0)))
    monkeypatch.setattr(module, "ANIMATED_SAMPLES", 4)
    monkeypatch.setattr(module, "shipped_models", lambda _family: [])
    config = Demo(images=str(tmp_path / "images"), tokenizer_steps=2, prior_steps=2, samples=4, out=tmp_path / "demo")
    report = demo(config)
    assert "| tokenizer (2 steps) | held-out MSE" in report.read_text()
    for name in ("reconstructions.png", "samples.png", "inpainting.png", "denoising.gif"):
        with Image.open(tmp_path / "demo" / name) as picture:
            assert getattr(picture, "n_frames", 1) > 1 if name.endswith(".gif") else picture.width > 96
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*")}
    capsys.readouterr()
    assert demo(config) == report
    assert "The demonstration is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*")} == before
    monkeypatch.setattr(module, "PRIOR", replace(module.PRIOR, qk_norm=False))
    report.unlink()
    with pytest.raises(
        UserError, match=r"demo holds a demonstration with other settings.*; remove the folder, or give"
    ):
        demo(config)


def test_few_images_of_which_none_is_held_out_and_commands_that_fit(tmp_path, monkeypatch, capsys):
    images, out = tmp_path / "my images", tmp_path / "demo"
    write_patches(images, 4)
    monkeypatch.setattr(sys, "argv", ["smalti demo"])
    monkeypatch.setattr(module, "TOKENIZER", replace(module.TOKENIZER, widths=(8, 8), residual_blocks=1, branching=2))
    monkeypatch.setattr(module, "PRIOR", replace(module.PRIOR, model_width=16, heads=2, depth=(0, 1, 0)))
    monkeypatch.setattr(module, "ANIMATED_SAMPLES", 4)
    monkeypatch.setattr(module, "shipped_models", lambda _family: [])
    sampling = SundaeSampling(steps=3, temperature=(1.0, 0.5))
    config = Demo(str(images), tokenizer_steps=2, prior_steps=2, sampling=sampling, samples=4, seed=1, out=out)
    text = demo(config).read_text()
    assert "4 of `" in text
    assert "of which 0 are held out" in text
    assert "| tokenizer (2 steps) | training MSE" in text
    assert "| held-out loss | no image is held out |" in text
    assert f"no image of {images} is held out, so the pictures and errors are of training images" in (
        capsys.readouterr().err
    )
    assert f"smalti sample --prior {out}/prior --seed 2 " in text
    (longer,) = re.findall("`smalti demo (.*)`", text)
    again = replace(config, prior_steps=8, out=Path(f"{out}-longer"))
    assert tyro.cli(Demo, args=shlex.split(longer), config=(tyro.conf.OmitArgPrefixes,)) == again


def test_a_stop_after_the_shipped_models_pictures_is_resumed(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    def sheet(_prior, _tokenizer, _rows, path, *, settings, **_):
        save_png(path, Image.new("RGB", (4, 4)), settings)

    monkeypatch.setattr(module, "_sample", lambda *_: None)
    monkeypatch.setattr(module, "save_example_fills", sheet)
    monkeypatch.setattr(module, "_train", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            demo(Demo(out=tmp_path / "demo"))
    assert (tmp_path / "demo" / "inpainting-of-the-shipped-model.png").exists()


@pytest.mark.parametrize("setting", ["tokenizer_steps", "prior_steps", "samples"])
def test_numbers_below_one_are_refused_at_once_with_their_own_flag(setting):
    """The stages that they are passed to name flags of other commands, and the last ones run after the training."""
    with pytest.raises(UserError, match=f"^--{setting.replace('_', '-')} must be at least 1, not 0$"):
        Demo(**{setting: 0})
    with pytest.raises(UserError, match="--seed must be from"):
        Demo(seed=2**63)
