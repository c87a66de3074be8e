"""Tiny causal priors for tests, one for each combination of options."""

import pytest
import torch

from smalti.core import models
from smalti.priors.base import CausalPrior

OPTIONS = {
    "plain": {},
    "wide kernel": {"kernel": 5},
    "attention": {"attention_every": 2, "layers": 3},
    "classes": {"classes": 3},
    "vectors": {"condition_width": 3},
    "upper level": {"upper_radices": ((4,),), "upper_factors": (2,)},
    "everything": {
        "kernel": 5,
        "attention_every": 1,
        "classes": 3,
        "upper_radices": ((2, 2), (5,)),
        "upper_factors": (4, 2),
    },
    "transformer": {"kind": "transformer"},
    "transformer, classes": {"kind": "transformer", "classes": 3},
    "transformer, vectors": {
        "kind": "transformer",
        "condition_width": 3,
        "upper_radices": ((4,),),
        "upper_factors": (2,),
    },
    "transformer, upper level": {"kind": "transformer", "upper_radices": ((4,),), "upper_factors": (2,)},
    "transformer, everything": {
        "kind": "transformer",
        "feedforward_mult": 2,
        "classes": 3,
        "upper_radices": ((2, 2), (5,)),
        "upper_factors": (4, 2),
    },
}


def prior_of(height=4, width=8, *, kind="pixelcnn", **changes) -> CausalPrior:
    """Returns an untrained causal prior whose predictions are confident and depend on all of its context."""
    torch.manual_seed(1)
    config = dict(height=height, width=width, radices=(3, 2), model_width=16, layers=4, heads=2)
    cls = models.class_of_kind("prior", kind)
    prior = cls(cls.config_class(**{**config, **changes})).eval()
    assert isinstance(prior, CausalPrior)
    with torch.no_grad():
        prior.head.weight.mul_(4 / prior.head.weight.norm(dim=1, keepdim=True))
        if kind == "transformer":
            for layer in prior.layers:  # otherwise attention to earlier codes would hardly matter
                layer.attention.asked.weight.mul_(4)
                layer.attention.out.weight.mul_(4)
        if prior.of_class:
            prior.of_class.vectors.weight.normal_()
        if prior.of_vector:
            for weights in (prior.of_vector.out.weight, prior.of_vector.none):
                weights.normal_()
    return prior


def random_conditioning(prior: CausalPrior, b: int, h: int, w: int) -> dict:
    """Draws random labels or vectors and codes of coarser levels, if the prior is conditioned on them."""
    generator, config = torch.Generator().manual_seed(0), prior.config
    upper = tuple(
        torch.randint(torch.tensor(radices).prod(), (b, h // factor, w // factor), generator=generator)
        for radices, factor in zip(config.upper_radices, config.upper_factors, strict=True)
    )
    condition = torch.randint(-1, prior.classes, (b,), generator=generator) if prior.classes else None
    if prior.condition_width:
        condition = torch.randn(b, prior.condition_width, generator=generator)
        condition[0] = torch.nan  # no vector
    return {"condition": condition, "upper": upper}


def receptive_field(prior: CausalPrior, position: int, **conditioning) -> torch.Tensor:
    """Returns `(h, w)`: whether the features of a position have a gradient with respect to each embedded code."""
    h, w = prior.level.height, prior.level.width
    embedded = torch.randn(1, h * w, prior.config.model_width, requires_grad=True)
    prior.head.embed = lambda _: embedded
    prior.features(torch.zeros(1, h, w, dtype=torch.int64), **conditioning)[0, position].square().sum().backward()
    assert embedded.grad is not None
    return (embedded.grad[0] != 0).any(-1).view(h, w)


of_every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
