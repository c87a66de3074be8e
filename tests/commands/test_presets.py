"""The presets of train_tokenizer: the papers' grids, and flags that override them."""

import sys

import pytest

from smalti import UserError
from smalti.commands import train_tokenizer as training
from smalti.commands.presets import PRESETS, default_config
from smalti.core import models
from smalti.scripts import train_tokenizer


@pytest.mark.parametrize(("name", "grid"), [("paper32", 16), ("paper64", 16), ("paper128", 32), ("paper256", 32)])
@pytest.mark.parametrize("kind", ["hrvq", "vqvae", "vqvae2"])
def test_a_preset_has_the_paper_s_grid(name, grid, kind):
    """The finest of VQ-VAE-2's three, which halve towards the top; 512 codes everywhere."""
    _, config = default_config(name, kind)
    levels = models.class_of_kind("tokenizer", kind)(config.model).layout.levels
    grids = [grid // 4, grid // 2, grid] if kind == "vqvae2" else [grid]
    assert [(level.height, level.width) for level in levels] == [(size, size) for size in grids]
    assert {level.codebook_size for level in levels} == {512}
    assert (config.tokenizer, config.preset) == (kind, name)


@pytest.mark.parametrize(("name", "kind"), [("paper32", "vqvae2"), ("f16-16384", "vqgan")])
def test_the_codebooks_of_long_trainings_learn_by_the_papers_decay(name, kind):
    """Slower than the defaults, which are for short ones."""
    (_, long), (_, short) = default_config(name, kind), default_config("small", kind)
    assert long.model.codebook_decay == 0.99 > short.model.codebook_decay
    assert 0 < long.model.revive_below < short.model.revive_below


def test_the_default_preset_is_the_defaults():
    _, config = default_config("small", "hrvq")
    assert config == training.TrainTokenizer(model=models.class_of_kind("tokenizer", "hrvq").config_class())
    assert config.preset == next(iter(PRESETS)) == "small"
    _, config = default_config("small", "vqgan")
    assert config.model.discriminator_start < config.fit.steps


def test_flags_override_a_preset(monkeypatch):
    seen = []
    monkeypatch.setattr(train_tokenizer, "train_tokenizer", seen.append)
    flags = "--tokenizer vqvae2 --preset=paper32 --image-channels 1 --levels 2 --steps 7"
    monkeypatch.setattr(sys, "argv", ["train_tokenizer.py", *flags.split()])
    train_tokenizer.main()
    (config,) = seen
    assert (config.model.widths, config.model.levels, config.model.image_channels) == ((128,), 2, 1)
    assert (config.fit.steps, config.fit.batch_size, config.preset) == (7, 128, "paper32")


def test_an_unknown_preset_is_refused():
    with pytest.raises(UserError, match="no preset 'paper16'; presets: small, paper32"):
        default_config("paper16", "hrvq")
