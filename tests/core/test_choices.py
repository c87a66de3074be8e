"""Mistyped choices from Python, which no command line has checked: one line instead of another choice."""

from dataclasses import fields, replace
from typing import Literal, get_origin, get_type_hints

import jaxtyping
import pytest
import torch
from helpers.toys import KINDS, TINY

from smalti import LinkedQuantizer, MaskedSampling, SundaeSampling, UserError, open_images
from smalti.core.devices import device
from smalti.core.models import class_of_kind
from smalti.images.reading import Reading
from smalti.metrics.extractors import find_extractor
from smalti.tokenizers.vqgan.perceptual import find_perceptual
from smalti.training.config import FitConfig


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which checks types in tests alone


def choices(config: object) -> list[str]:
    hints = get_type_hints(type(config))
    return [field.name for field in fields(config) if get_origin(hints[field.name]) is Literal]


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_networks_refuse_choices_that_they_do_not_have(family, kind):
    config = TINY[kind]
    for name in choices(config):
        with pytest.raises(UserError, match=f"{name} must be one of .*, not 'mistyped'"):
            class_of_kind(family, kind)(replace(config, **{name: "mistyped"}))


@pytest.mark.parametrize("config", [FitConfig(steps=1), SundaeSampling(), MaskedSampling(), Reading()])
def test_settings_refuse_choices_that_they_do_not_have(config):
    names = choices(config)
    assert names
    for name in names:
        with pytest.raises(UserError, match=f"{name} must be one of .*, not 'mistyped'"):
            replace(config, **{name: "mistyped"})


@pytest.mark.parametrize("name", ["start", "learning", "gradient"])
def test_quantizers_refuse_choices_that_they_do_not_have(name):
    with pytest.raises(UserError, match=f"{name} must be one of .*, not 'mistyped'"):
        LinkedQuantizer(code_width=2, branching=2, **{name: "mistyped"})


def test_pixels_of_a_likelihood_are_the_mean_or_samples():
    model = class_of_kind("tokenizer", "selfvae")(TINY["selfvae"])
    with pytest.raises(UserError, match="pixels must be one of mean, sample, not 'mode'"):
        model.generation(torch.arange(1), pixels="mode")


def test_images_refuse_choices_that_they_do_not_have():
    with pytest.raises(UserError, match="fit must be one of crop, pad, squash, not 'mistyped'"):
        open_images(fit="mistyped")
    with pytest.raises(UserError, match="depth must be one of 8, 16, not 12"):
        open_images(depth=12)


def test_devices_scores_and_frozen_parts_are_those_there_are():
    with pytest.raises(UserError, match="device must be one of auto, cpu, cuda, mps, not 'gpu'"):
        device("gpu")
    with pytest.raises(UserError, match="extractor must be one of lite0, inception, not 'mistyped'"):
        find_extractor("mistyped", torch.device("cpu"))
    with pytest.raises(UserError, match=r"perceptual must be one of .*, not 'mistyped'"):
        find_perceptual("mistyped")
    with pytest.raises(UserError, match=r"freeze must be one of .*, not 'mistyped'"):
        class_of_kind("tokenizer", "vqgan")(TINY["vqgan"]).freeze(["encoder", "mistyped"])
