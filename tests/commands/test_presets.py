"""The presets of `train_tokenizer`: the papers' grids of codes, and flags that override presets."""

import sys

import pytest

from smalti import UserError
from smalti.commands import train_tokenizer as training
from smalti.commands.presets import PRESETS, default_config
from smalti.core import models
from smalti.scripts import train_tokenizer


@pytest.mark.parametrize(("name", "grid"), [("paper32", 16), ("paper64", 16), ("paper128", 32), ("paper256", 32)])
@pytest.mark.parametrize("kind", ["hrvq", "vqvae", "vqvae2"])
def test_paper_presets_have_the_papers_grids(name, grid, kind):
    """The grid is the finest of VQ-VAE-2's three, each half the size of the next. Codebooks have 512 codes."""
    _, config = default_config(name, kind)
    levels = models.class_of_kind("tokenizer", kind)(config.model).layout.levels
    grids = [grid // 4, grid // 2, grid] if kind == "vqvae2" else [grid]
    assert [(level.height, level.width) for level in levels] == [(size, size) for size in grids]
    assert {level.codebook_size for level in levels} == {512}
    assert (config.tokenizer, config.preset) == (kind, name)


@pytest.mark.parametrize(("name", "kind"), [("paper32", "vqvae2"), ("f16-16384", "vqgan")])
def test_long_presets_have_the_papers_codebook_decay(name, kind):
    """It is slower than the default, which is for short runs."""
    (_, long), (_, short) = default_config(name, kind), default_config("small", kind)
    assert long.model.codebook_decay == 0.99 > short.model.codebook_decay
    assert 0 < long.model.revive_below < short.model.revive_below


def test_the_small_preset_equals_the_defaults():
    _, config = default_config("small", "hrvq")
    assert config == training.TrainTokenizer(model=models.class_of_kind("tokenizer", "hrvq").config_class())
    assert config.preset == next(iter(PRESETS)) == "small"
    _, config = default_config("small", "vqgan")
    assert config.model.discriminator_start < config.fit.steps


@pytest.mark.parametrize("kind", ["hrvq", "vqvae", "vqgan"])
def test_small64_has_a_grid_of_8x8_with_4096_codes(kind):
    _, config = default_config("small64", kind)
    (level,) = models.class_of_kind("tokenizer", kind)(config.model).layout.levels
    assert (level.height, level.width, level.codebook_size) == (8, 8, 4096)
    assert (config.tokenizer, config.preset) == (kind, "small64")
    with pytest.raises(UserError, match="for hrvq, vqvae and vqgan, not for hqa"):
        default_config("small64", "hqa")


def test_flags_override_a_preset(monkeypatch):
    configs = []
    monkeypatch.setattr(train_tokenizer, "train_tokenizer", configs.append)
    monkeypatch.setattr(train_tokenizer, "print_end_of_tokenizer", lambda folder: None)
    flags = "--tokenizer vqvae2 --preset=paper32 --image-channels 1 --levels 2 --steps 7"
    monkeypatch.setattr(sys, "argv", ["train_tokenizer.py", *flags.split()])
    train_tokenizer.main()
    (config,) = configs
    assert (config.model.widths, config.model.levels, config.model.image_channels) == ((128,), 2, 1)
    assert (config.fit.steps, config.fit.batch_size, config.preset) == (7, 128, "paper32")


def test_an_unknown_preset_is_refused():
    with pytest.raises(UserError, match="no preset 'paper16'; presets: small, small64, paper32"):
        default_config("paper16", "hrvq")
