"""Tiny PixelCNNs for tests, one for each combination of options."""

import pytest
import torch

from smalti.priors.networks.pixelcnn import PixelCNN, PixelCNNConfig

OPTIONS = {
    "plain": {},
    "wide kernel": {"kernel": 5},
    "attention": {"attention_every": 2, "layers": 3},
    "classes": {"classes": 3},
    "upper level": {"upper_radices": ((4,),), "upper_factors": (2,)},
    "everything": {
        "kernel": 5,
        "attention_every": 1,
        "classes": 3,
        "upper_radices": ((2, 2), (5,)),
        "upper_factors": (4, 2),
    },
}


def prior_of(height=4, width=8, **changes) -> PixelCNN:
    """Returns an untrained PixelCNN whose predictions are confident and depend on all of its context."""
    torch.manual_seed(1)
    config = dict(height=height, width=width, radices=(3, 2), model_width=16, layers=4, heads=2)
    prior = PixelCNN(PixelCNNConfig(**{**config, **changes})).eval()
    with torch.no_grad():
        prior.head.weight.mul_(4 / prior.head.weight.norm(dim=1, keepdim=True))
        if prior.of_class:
            prior.of_class.vectors.weight.normal_()
    return prior


def told_of(prior: PixelCNN, b: int, h: int, w: int) -> dict:
    """Draws random labels and codes of coarser levels, if the prior is conditioned on them."""
    generator, config = torch.Generator().manual_seed(0), prior.config
    upper = tuple(
        torch.randint(torch.tensor(radices).prod(), (b, h // factor, w // factor), generator=generator)
        for radices, factor in zip(config.upper_radices, config.upper_factors, strict=True)
    )
    labels = torch.randint(-1, prior.classes, (b,), generator=generator) if prior.classes else None
    return {"labels": labels, "upper": upper}


of_every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
