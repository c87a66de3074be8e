"""Networks of selfVAE: encoders from an image to a Gaussian over latents, decoders from latents to pixel likelihoods.

The model that combines them is in `hierarchical_vae.py`, their building blocks are in `layers/dense.py`.

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

LOG_DEVIATIONS = (-7.0, 7.0)  # range to which log-deviations of latents are clamped, so that no density overflows
FIRST_LOG_DEVIATION = -1.0  # log-deviation for a network output of 0: latents are informative from the start
HEAD_GAIN = 0.5  # standard deviation of the last convolutions' outputs after initialization


@dataclass(frozen=True)
class Gaussian:
    """Diagonal Gaussian over a grid of latents (Eqs. 15, 17 and 18), in float32.

    Attributes:
        mean: mean of each latent value.
        log_deviation: logarithm of each value's standard deviation.
    """

    mean: Float[Tensor, "b d y x"]
    log_deviation: Float[Tensor, "b d y x"]

    def sample(self, seeds: Int64[Tensor, " b"]) -> Float[Tensor, "b d y x"]:
        """Samples one grid per seed by the reparameterization trick: gradients reach mean and deviation."""
        return self.mean + self.log_deviation.exp() * normal(seeds, *self.mean.shape[1:])

    def log_prob(self, z: Float[Tensor, "b d y x"]) -> Float[Tensor, " b"]:
        """Returns ln p(z) of each grid, in nats."""
        standardized = (z - self.mean) * (-self.log_deviation).exp()
        return -(0.5 * standardized.square() + self.log_deviation + 0.5 * math.log(2 * math.pi)).sum((1, 2, 3))


@dataclass(frozen=True)
class Shape:
    """Sizes that the networks of one model share.

    Attributes:
        channels: channels of features.
        growth: channels that each layer of a dense block adds.
        layers: layers of a dense block.
        latent_channels: values per position of a grid of latents.
        stages: how many times the image's size is halved to that of the grid of latents.
        mixtures: components of a pixel's likelihood.
    """

    channels: int
    growth: int
    layers: int
    latent_channels: int
    stages: int
    mixtures: int

    def block(self) -> DenseBlock:
        """Returns a new dense block of this shape."""
        return DenseBlock(self.channels, growth=self.growth, layers=self.layers)


class Encoder(nn.Module):
    """Network from an image to a Gaussian over latents: a posterior q(z|y), or a conditional prior p(z|y, u).

    Args:
        shape: sizes of the networks.
        form: form of the image.
        conditional: whether the coarser level's latents are an input too, for a conditional prior (Eq. 15).
    """

    def __init__(self, shape: Shape, form: Form, *, conditional: bool) -> None:
        super().__init__()
        halvings = shape.stages - form.halvings
        widths = [form.channels] + [shape.channels] * max(1, halvings)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [WeightNormConv(before, after, resize=-1 if halvings else 0), shape.block()]
        self.body = nn.Sequential(*layers)
        # checkpoints contain these attribute names
        self.above = WeightNormConv(shape.latent_channels, shape.channels) if conditional else None
        self.mixed = shape.block() if conditional else nn.Identity()
        self.head = WeightNormConv(shape.channels, 2 * shape.latent_channels, gain=HEAD_GAIN)

    def forward(self, image: Float[Tensor, "b c h w"], coarser: Float[Tensor, "b d y x"] | None = None) -> Gaussian:
        """Returns the Gaussian for an image and, if `conditional`, the latents of the coarser level."""
        features = self.body(image)
        if self.above is not None:
            features = features + self.above(coarser)
        mean, log_deviation = self.head(F.elu(self.mixed(features))).float().chunk(2, 1)
        return Gaussian(mean, (log_deviation + FIRST_LOG_DEVIATION).clamp(*LOG_DEVIATIONS))


class Decoder(nn.Module):
    """Network from latents to an image's likelihood: p(x|y, z), conditioned on its representation, or p(y|u).

    The representation is added where the features have its size; a dense block follows.

    Args:
        shape: sizes of the networks.
        form: form of the image.
        condition: form of the representation that the image is conditioned on; None for the coarsest level.
    """

    def __init__(self, shape: Shape, form: Form, condition: Form | None) -> None:
        super().__init__()
        self.form = form
        doublings = shape.stages - form.halvings
        self.joins_at = shape.stages - condition.halvings if condition else None
        self.start = WeightNormConv(shape.latent_channels, shape.channels)
        # checkpoints contain this attribute name
        self.given = WeightNormConv(condition.channels, shape.channels) if condition else None
        self.ups = nn.ModuleList(WeightNormConv(shape.channels, shape.channels, resize=1) for _ in range(doublings))
        # no block at the full size, where it costs most, unless it is the only one or follows the representation
        self.blocks = nn.ModuleList(
            shape.block() if size < max(1, doublings) or size == self.joins_at else nn.Identity()
            for size in range(doublings + 1)
        )
        parameters = parameters_for(shape.mixtures, form.channels)
        self.head = WeightNormConv(shape.channels, parameters, kernel=1, gain=HEAD_GAIN)

    def forward(
        self, z: Float[Tensor, "b d y x"], representation: Float[Tensor, "b _c _h _w"] | None = None
    ) -> LogisticMixture:
        """Returns the likelihood given latents and, except at the coarsest level, the image's representation."""
        features = self.start(z)
        for size, block in enumerate(self.blocks):
            if size:
                features = self.ups[size - 1](F.elu(features))
            if size == self.joins_at and self.given is not None:
                features = features + self.given(representation)
            features = block(features)
        return LogisticMixture.of(self.head(F.elu(features)), channels=self.form.channels, bins=self.form.bins)
