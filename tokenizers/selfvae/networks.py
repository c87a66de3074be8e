"""The networks of selfVAE: from an image to a Gaussian on the grid of latents, and from there to pixels' likelihoods.

What is multiplied into one model is in `selfvae.py`; what these are built of, in `dense.py`.

Legend: b batch, c channels of an image, d latent channels, h w pixels, y x grid of latents.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.core.randomness import normal
from smalti.tokenizers.layers.dense import DenseBlock, WeightNormConv
from smalti.tokenizers.selfvae.logistic import LogisticMixture, parameters_for
from smalti.tokenizers.selfvae.transformations import Form

LOG_DEVIATIONS = (-7.0, 7.0)  # that of latents is kept within, so that no density overflows
FIRST_LOG_DEVIATION = -1.0  # what a network's zero means: latents begin by saying something
HEAD_GAIN = 0.5  # deviation of what the last convolutions make at the start


@dataclass(frozen=True)
class Gaussian:
    """A diagonal one (Eqs. 15, 17 and 18), in float32.

    Attributes:
        mean: of each number.
        log_deviation: the logarithm of each one's standard deviation.
    """

    mean: Float[Tensor, "b d y x"]
    log_deviation: Float[Tensor, "b d y x"]

    def sample(self, seeds: Int64[Tensor, " b"]) -> Float[Tensor, "b d y x"]:
        """One draw for each seed, with gradients to mean and deviation."""
        return self.mean + self.log_deviation.exp() * normal(seeds, *self.mean.shape[1:])

    def log_prob(self, z: Float[Tensor, "b d y x"]) -> Float[Tensor, " b"]:
        """ln p(z), nats, of each grid."""
        away = (z - self.mean) * (-self.log_deviation).exp()
        return -(0.5 * away.square() + self.log_deviation + 0.5 * math.log(2 * math.pi)).sum((1, 2, 3))


@dataclass(frozen=True)
class Shape:
    """What the networks of one model share.

    Attributes:
        channels: of features.
        growth, layers: of dense blocks.
        latent_channels: numbers at each position of a grid of latents.
        stages: how often that grid halves the image's size.
        mixtures: components of a likelihood.
    """

    channels: int
    growth: int
    layers: int
    latent_channels: int
    stages: int
    mixtures: int

    def block(self) -> DenseBlock:
        """A dense block of this width."""
        return DenseBlock(self.channels, growth=self.growth, layers=self.layers)


class Encoder(nn.Module):
    """An image of any form to a Gaussian on the grid of latents: q(z|y), or with latents from above p(z|y, u).

    Args:
        shape: of the networks.
        form: of the image.
        told: whether latents of the level above are an input too (Eq. 15).
    """

    def __init__(self, shape: Shape, form: Form, *, told: bool) -> None:
        super().__init__()
        halvings = shape.stages - form.halvings
        widths = [form.channels] + [shape.channels] * max(1, halvings)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [WeightNormConv(before, after, resize=-1 if halvings else 0), shape.block()]
        self.body = nn.Sequential(*layers)
        self.above = WeightNormConv(shape.latent_channels, shape.channels) if told else None
        self.mixed = shape.block() if told else nn.Identity()
        self.head = WeightNormConv(shape.channels, 2 * shape.latent_channels, gain=HEAD_GAIN)

    def forward(self, image: Float[Tensor, "b c h w"], above: Float[Tensor, "b d y x"] | None = None) -> Gaussian:
        """The Gaussian, given the image and perhaps latents of the level above."""
        features = self.body(image)
        if self.above is not None:
            features = features + self.above(above)
        mean, log_deviation = self.head(F.elu(self.mixed(features))).float().chunk(2, 1)
        return Gaussian(mean, (log_deviation + FIRST_LOG_DEVIATION).clamp(*LOG_DEVIATIONS))


class Decoder(nn.Module):
    """Latents, and perhaps the image's representation, to the image's likelihood: p(x|y, z), or p(y|u) of the last.

    The representation joins where the features have its size, and a dense block follows.

    Args:
        shape: of the networks.
        form: of the image.
        given: of its representation; None for the last, which has none.
    """

    def __init__(self, shape: Shape, form: Form, given: Form | None) -> None:
        super().__init__()
        self.form = form
        doublings = shape.stages - form.halvings
        self.joins_at = shape.stages - given.halvings if given else None
        self.start = WeightNormConv(shape.latent_channels, shape.channels)
        self.given = WeightNormConv(given.channels, shape.channels) if given else None
        self.ups = nn.ModuleList(WeightNormConv(shape.channels, shape.channels, resize=1) for _ in range(doublings))
        self.blocks = nn.ModuleList(  # none at the full size, where it costs most, unless it is the first or joined
            shape.block() if size < max(1, doublings) or size == self.joins_at else nn.Identity()
            for size in range(doublings + 1)
        )
        parameters = parameters_for(shape.mixtures, form.channels)
        self.head = WeightNormConv(shape.channels, parameters, kernel=1, gain=HEAD_GAIN)

    def forward(self, z: Float[Tensor, "b d y x"], given: Float[Tensor, "b _c _h _w"] | None = None) -> LogisticMixture:
        """The likelihood, given latents and perhaps the representation."""
        features = self.start(z)
        for size, block in enumerate(self.blocks):
            if size:
                features = self.ups[size - 1](F.elu(features))
            if size == self.joins_at and self.given is not None:
                features = features + self.given(given)
            features = block(features)
        return LogisticMixture.of(self.head(F.elu(features)), channels=self.form.channels, bins=self.form.bins)
