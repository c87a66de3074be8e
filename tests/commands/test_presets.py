"""The presets of `train_tokenizer` and `train_prior`: grids and sizes, and flags that override presets."""

import sys
from dataclasses import replace
from typing import get_args

import pytest
import torch

from smalti import PixelCNNConfig, UserError, VQVAEConfig
from smalti.commands import train_prior as prior_training
from smalti.commands import train_tokenizer as training
from smalti.commands.presets import PRESETS, PRIOR_PRESETS, default_config, default_prior_config
from smalti.commands.train_prior import TrainPrior
from smalti.core import models
from smalti.priors.methods.autoregressive import LikelihoodConfig
from smalti.priors.methods.sundae import SundaeConfig
from smalti.priors.networks.hourglass import Hourglass, HourglassConfig
from smalti.scripts import train_prior, train_tokenizer


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


def test_pixelcnn_has_a_learning_rate_of_its_own():
    """It diverges at that of the others."""
    rates = {kind: default_prior_config("small", kind)[1].fit.learning_rate for kind in ("hourglass", "pixelcnn")}
    assert rates == {"hourglass": 0.005, "pixelcnn": 0.001}


def test_the_small_preset_equals_the_defaults():
    _, config = default_config("small", "hrvq")
    assert config == training.TrainTokenizer(model=models.class_of_kind("tokenizer", "hrvq").config_class())
    assert config.preset == next(iter(PRESETS)) == "small"
    assert get_args(training.Preset) == tuple(PRESETS)
    _, config = default_config("small", "vqgan")
    assert config.model.discriminator_start < config.fit.steps
    assert config.fit.optimizer == "muon"
    _, paper = default_config("f16-1024", "vqgan")
    assert paper.fit.optimizer == "adamw"


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


def test_the_small_preset_of_priors_equals_the_defaults():
    _, config = default_prior_config("small", None)
    assert config == TrainPrior(model=HourglassConfig(), objective=SundaeConfig())
    assert config.preset == next(iter(PRIOR_PRESETS)) == "small"
    assert get_args(prior_training.PriorPreset) == tuple(PRIOR_PRESETS)


@pytest.mark.parametrize(
    ("name", "codes", "side", "depth", "millions"),
    [("ffhq256", 1024, 16, (2, 10, 2), 187), ("ffhq1024", 8192, 32, (2, 12, 2), 227)],
)
def test_presets_for_ffhq_have_the_authors_networks(name, codes, side, depth, millions):
    _, config = default_prior_config(name, None)
    assert (config.model.model_width, config.model.heads, config.model.depth) == (1024, 8, depth)
    assert (config.fit.optimizer, config.fit.ema_decay, config.fit.clip_norm) == ("adamw", 0, 0)
    assert {config.fit.rate(step) for step in range(0, config.fit.steps, 50_000)} == {1.0}
    with torch.device("meta"):
        prior = Hourglass(replace(config.model, height=side, width=side, radices=(codes,)))
    assert round(sum(weights.numel() for weights in prior.parameters()) / 1e6) == millions


def test_presets_of_priors_are_refused_for_other_kinds_and_names():
    with pytest.raises(UserError, match="the preset ffhq256 is for hourglass, not for pixelcnn"):
        default_prior_config("ffhq256", "pixelcnn")
    with pytest.raises(UserError, match="no preset 'paper'; presets: small, ffhq256, ffhq1024"):
        default_prior_config("paper", None)


def test_flags_override_a_preset_of_priors(monkeypatch):
    configs = []
    monkeypatch.setattr(train_prior, "train_prior_with_ending", configs.append)
    monkeypatch.setattr(sys, "argv", ["train_prior.py", "--preset", "ffhq1024", "--model-width", "64", "--steps", "7"])
    train_prior.main()
    (config,) = configs
    assert (config.model.model_width, config.model.depth, config.fit.steps) == (64, (2, 12, 2), 7)
    assert (config.preset, config.objective.unrolled_steps, config.fit.batch_size) == ("ffhq1024", 3, 10)


def test_networks_of_another_kind_are_refused(tmp_path):
    """Command lines cannot mix them, but programs can."""
    message = "the tokenizer is hrvq, but its model is a VQVAEConfig; give a HRVQConfig, or the kind of this one"
    with pytest.raises(UserError, match=message):
        training.train_tokenizer(training.TrainTokenizer(VQVAEConfig(), out=tmp_path / "run"))
    with pytest.raises(UserError, match="the prior is hourglass, but its model is a PixelCNNConfig; give a Hourglass"):
        prior_training.train_prior(TrainPrior(PixelCNNConfig(), LikelihoodConfig(), out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
