"""Dropout of the priors' networks: off in evaluation, drawn from torch's seeded generator in training."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from smalti.core.errors import UserError
from smalti.core.models import class_of_kind
from smalti.priors.networks.hourglass import HourglassConfig
from smalti.priors.networks.pixelcnn import PixelCNNConfig
from smalti.priors.networks.transformer import TransformerConfig

HOURGLASS = HourglassConfig(height=4, width=6, radices=(3, 4), model_width=32, heads=2, depth=(1, 1, 1))
PIXELCNN = PixelCNNConfig(height=4, width=6, radices=(3, 4), model_width=32, layers=3)
TRANSFORMER = TransformerConfig(height=4, width=6, radices=(3, 4), model_width=32, heads=2, layers=3)
KINDS: list[tuple[str, Any]] = [
    ("hourglass", HOURGLASS),
    ("maskgit", HOURGLASS),
    ("pixelcnn", PIXELCNN),
    ("transformer", TRANSFORMER),
]


def features_of(kind: str, config: Any, *, training: bool, dropout: float, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(0)
    model = class_of_kind("prior", kind)(replace(config, dropout=dropout)).train(training)
    codes = torch.arange(48).view(2, 4, 6) % 12
    torch.manual_seed(seed)
    return model.features(codes)


@pytest.mark.parametrize(("kind", "config"), KINDS)
def test_dropout_changes_features_in_training_only(kind, config):
    plain = features_of(kind, config, training=False, dropout=0.0)
    assert features_of(kind, config, training=True, dropout=0.0).equal(plain)
    assert features_of(kind, config, training=False, dropout=0.5).equal(plain)
    first, again, other = (features_of(kind, config, training=True, dropout=0.5, seed=seed) for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)


@pytest.mark.parametrize(("kind", "config"), KINDS)
def test_every_layer_drops_the_given_share_of_its_outputs(kind, config):
    model = class_of_kind("prior", kind)(replace(config, dropout=0.25)).train()
    shares = []
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p:
            module.register_forward_hook(lambda _module, inputs, out: shares.append((out == 0) & (inputs[0] != 0)))
    model.features(torch.arange(960).view(40, 4, 6) % 12)
    sublayers = 2 * (config.layers if kind in ("pixelcnn", "transformer") else sum(config.depth))
    assert len(shares) == sublayers
    assert all(0.2 < share.float().mean() < 0.3 for share in shares)


@pytest.mark.parametrize(("kind", "config"), KINDS)
def test_gradient_checkpointing_recomputes_the_same_dropout(kind, config):
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = class_of_kind("prior", kind)(replace(config, dropout=0.3)).train()
        for block in model.recomputable() if recompute else []:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        torch.manual_seed(1)
        model.features(torch.arange(48).view(2, 4, 6) % 12).square().sum().backward()
        gradients.append([each.grad for each in model.parameters() if each.grad is not None])
    assert all(a.allclose(b, rtol=1e-4, atol=1e-6) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_dropout_outside_its_range_is_refused(dropout):
    for config in (HOURGLASS, PIXELCNN, TRANSFORMER):
        with pytest.raises(UserError, match="dropout must be at least 0 and less than 1"):
            replace(config, dropout=dropout)
