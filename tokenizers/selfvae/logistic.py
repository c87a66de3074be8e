"""Likelihoods of pixels: mixtures of discretised logistics (selfVAE, Eqs. 14, 16 and 19; arXiv 1701.05517).

Images are float in [-1, 1], of which `bins` values are possible: value v of 0..bins-1 is at 2 v / (bins - 1) - 1, so
for 8 bits v = 127.5 (x + 1), as `smalti.images.decoding` has it. Means and scales are in units of [-1, 1] too. No network
here.

Legend: b batch, k components, c channels, h w pixels, p parameters.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor

from smalti.core.randomness import Stream, derive, gumbel, uniform

SMALLEST_LOG_SCALE = -7.0  # an eighth of a value of 8 bits: sharper ones add nothing, and their gradients explode
FIRST_LOG_SCALE = -2.0  # what parameters of zero mean: some 17 of 256 values


def to_bins(images: Float[Tensor, "*shape"], bins: int) -> Float[Tensor, "*shape"]:
    """The nearest possible values, [-1, 1]."""
    return ((images + 1) * ((bins - 1) / 2)).round().clamp(0, bins - 1) * (2 / (bins - 1)) - 1


def log_discretized_logistic(
    x: Float[Tensor, "*#shape"], mean: Float[Tensor, "*#shape"], log_scale: Float[Tensor, "*#shape"], bins: int
) -> Float[Tensor, "..."]:
    """ln of Eq. 19; the lowest and the highest value have all the probability beyond them too, so that it sums to 1.

    In the units of Eq. 19, where bounds between values are exact. With a and b the arguments of its two sigmoids,
    sigm(a) - sigm(b) = sigm(a) sigm(-b) (1 - exp(b - a)): each factor's logarithm is exact at any mean and scale, where
    the difference itself would cancel.
    """
    unit = (bins - 1) / 2
    value, centre, inverse = ((x + 1) * unit).round(), (mean + 1) * unit, (-log_scale).exp() / unit
    upper, lower = (value + 0.5 - centre) * inverse, (value - 0.5 - centre) * inverse
    below, above = F.logsigmoid(upper), F.logsigmoid(-lower)
    between = below + above + (-torch.expm1(-inverse)).log()
    return torch.where(value == 0, below, torch.where(value == bins - 1, above, between))


def bits_per_number(numbers: int) -> float:
    """What nats of an image of so many numbers (pixels times channels) are multiplied by, for bits for each."""
    return 1 / (math.log(2) * numbers)


def parameters_for(components: int, channels: int) -> int:
    """How many numbers a pixel's mixture has."""
    return components * (1 + 2 * channels + channels * (channels - 1) // 2)


@dataclass(frozen=True)
class LogisticMixture:
    """p(image), a mixture for each pixel, whose component all of its channels share.

    The mean of a channel depends linearly on the channels before it (arXiv 1701.05517, Section 2.2), where Eqs. 14 and
    16 leave open how channels go together.

    Attributes:
        log_weights: of the components, normalised.
        means: of the first channel; of the others, at zero in those before them.
        log_scales: in units of [-1, 1].
        slopes: of channel i in channel j < i, in the order 10, 20, 21.
        bins: how many values there are.
    """

    log_weights: Float[Tensor, "b k h w"]
    means: Float[Tensor, "b k c h w"]
    log_scales: Float[Tensor, "b k c h w"]
    slopes: Float[Tensor, "b k _e h w"]
    bins: int

    @classmethod
    def of(cls, parameters: Float[Tensor, "b p h w"], *, channels: int, bins: int) -> "LogisticMixture":
        """From what a network makes, in float32; as many as `parameters_for` says."""
        pairs = channels * (channels - 1) // 2
        split = rearrange(parameters.float(), "b (n k) h w -> b k n h w", n=1 + 2 * channels + pairs)
        weights, means, log_scales, slopes = split.split((1, channels, channels, pairs), 2)
        log_scales = (log_scales + FIRST_LOG_SCALE).clamp(min=SMALLEST_LOG_SCALE)
        return cls(weights.squeeze(2).log_softmax(1), means, log_scales, slopes.tanh(), bins)

    def log_prob(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """ln p, nats, of each image."""
        x = images.float().unsqueeze(1)
        means = torch.stack([self._mean(channel, x) for channel in range(x.shape[2])], 2)
        of_channels = log_discretized_logistic(x, means, self.log_scales, self.bins).sum(2)
        return (self.log_weights + of_channels).logsumexp(1).sum((1, 2))

    def mean(self) -> Float[Tensor, "b c h w"]:
        """The expectation, of logistics that are not discretised; [-1, 1]."""
        found = torch.zeros_like(self.means[:, :, :0])
        for channel in range(self.means.shape[2]):
            found = torch.cat([found, self._mean(channel, found).unsqueeze(2)], 2)
        return (self.log_weights.exp().unsqueeze(2) * found).sum(1).clamp(-1, 1)

    def nearest_to_mean(self) -> Float[Tensor, "b c h w"]:
        """The possible values nearest to the mean."""
        return to_bins(self.mean(), self.bins)

    def sample(self, seeds: Int64[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """One image for each seed, of possible values."""
        _, k, c, h, w = self.means.shape
        chosen = (self.log_weights + gumbel(derive(seeds, Stream.LOGISTIC_COMPONENT), k, h, w)).argmax(1)[:, None, None]
        noise = uniform(derive(seeds, Stream.LOGISTIC_VALUE), c, h, w).clamp(min=2.0**-25).logit()
        found = torch.zeros_like(self.means[:, :1, :0])
        for channel in range(c):
            means, scales = self._mean(channel, found), self.log_scales[:, :, channel].exp()
            mean, scale = (of.gather(1, chosen[:, :, 0]) for of in (means, scales))
            found = torch.cat([found, to_bins(mean + scale * noise[:, channel, None], self.bins).unsqueeze(2)], 2)
        return found.squeeze(1)

    def _mean(self, channel: int, before: Tensor) -> Tensor:
        """Of each component `(b, k, h, w)`, the channels before being at least `before`."""
        first = channel * (channel - 1) // 2
        slopes = self.slopes[:, :, first : first + channel]
        return self.means[:, :, channel] + (slopes * before[:, :, :channel]).sum(2)
