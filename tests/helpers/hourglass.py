"""Tiny hourglasses for tests, and a stage's down- and upsampling without its blocks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from smalti.priors.networks.hourglass import Hourglass, HourglassConfig, Stage
from smalti.priors.networks.positions import AxialRotary

TINY = HourglassConfig(
    height=4,
    width=6,
    radices=(3, 4),
    model_width=32,
    heads=2,
    depth=(1, 1, 1),
    shorten=(2,),
    absolute_positions=False,
)


def model_of(cls: type[Hourglass] = Hourglass, **changes: Any) -> Hourglass:
    torch.manual_seed(0)
    return cls(replace(TINY, **changes)).eval()


def codes_of(model: Hourglass, *shape: int) -> Tensor:
    return torch.randint(model.head.codebook_size, shape)


class Identity(nn.Module):
    """Replaces blocks; what remains of a stage is its resampling."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x


def without_blocks(stage: Stage) -> Stage:
    for part in ("before", "valley", "after"):
        stage.set_submodule(part, Identity())
    return stage


def stage_of(shorten: int = 2, **changes: Any) -> Stage:
    torch.manual_seed(0)
    return Stage(replace(TINY, **changes), (1, 1, 1), (shorten,))


def resampling_of(stage: Stage, h: int, w: int) -> Callable[[Tensor], Tensor]:
    """Returns the down- and upsampling of a stage as a function of features `(b, n, d)` on a grid."""
    without_blocks(stage)
    return lambda x: stage(x, (h, w), AxialRotary(16)(h, w))


def jacobian_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    jacobian = torch.autograd.functional.jacobian(function, x)
    assert isinstance(jacobian, Tensor)
    return jacobian


def positions_share_patches(stage: Stage, shorten: int, h: int, w: int) -> bool:
    """Returns whether, between blocks, each position depends on exactly the positions of its own patch."""
    resample = resampling_of(stage, h, w)
    jacobian = jacobian_of(lambda x: (resample(x) ** 2).sum((0, 2)), torch.randn(1, h * w, 32))
    depends = jacobian[:, 0].abs().sum(-1) > 1e-6
    patches = [(i // w // shorten, i % w // shorten) for i in range(h * w)]
    return torch.equal(depends, torch.tensor([[ours == theirs for theirs in patches] for ours in patches]))


def every_position_sees_every_other(model: Hourglass, h: int, w: int) -> bool:
    embedded = model.head.embed(codes_of(model, 1, h, w)).detach()
    probe, some = torch.randn(32), [0, h * w // 2, h * w - 1]
    jacobian = jacobian_of(lambda x: model.body(x, (h, w), model.rotary(h, w))[0, some] @ probe, embedded)
    return bool((jacobian[:, 0].abs().sum(-1) > 0).all())


SHAPES = [
    ((2,), ()),
    ((1, 1, 1), (2,)),
    ((1, 1, 1), (3,)),
    ((1, 1, 2, 1, 1), (2, 2)),
    ((0, 1, 0), (2,)),
    ((0, 0, 1, 1, 0), (2, 2)),
]
"""Depths with sides of patches."""
