"""Pixel likelihoods: mixtures of discretized logistics (selfVAE, Eqs. 14, 16 and 19; arXiv 1701.05517).

Images are float in [-1, 1] with `bins` possible values: value v in 0..bins-1 is 2 v / (bins - 1) - 1. With 8 bits,
v = 127.5 (x + 1), as in `smalti.images.decoding`. Means and scales are in units of [-1, 1] too. No networks here.

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

SMALLEST_LOG_SCALE = -7.0  # an eighth of an 8-bit step: sharper logistics add nothing, and their gradients explode
FIRST_LOG_SCALE = -2.0  # log-scale for a network output of 0: about 17 of 256 values


def to_bins(images: Float[Tensor, "*shape"], bins: int) -> Float[Tensor, "*shape"]:
    """Rounds images to the nearest of `bins` possible values in [-1, 1]."""
    return ((images + 1) * ((bins - 1) / 2)).round().clamp(0, bins - 1) * (2 / (bins - 1)) - 1


def log_discretized_logistic(
    x: Float[Tensor, "*#shape"], mean: Float[Tensor, "*#shape"], log_scale: Float[Tensor, "*#shape"], bins: int
) -> Float[Tensor, "..."]:
    """Returns the log-probability ln of Eq. 19.

    The lowest and highest values also get the probability beyond them, so that probabilities sum to 1. Computed in
    the units of Eq. 19, where the bounds between values are exact. With a and b the arguments of its two sigmoids,
    sigm(a) - sigm(b) = sigm(a) sigm(-b) (1 - exp(b - a)): the logarithm of each factor is accurate at any mean and
    scale, whereas the difference itself would cancel.
    """
    unit = (bins - 1) / 2
    value, centre, inverse = ((x + 1) * unit).round(), (mean + 1) * unit, (-log_scale).exp() / unit
    upper, lower = (value + 0.5 - centre) * inverse, (value - 0.5 - centre) * inverse
    below, above = F.logsigmoid(upper), F.logsigmoid(-lower)
    between = below + above + (-torch.expm1(-inverse)).log()
    return torch.where(value == 0, below, torch.where(value == bins - 1, above, between))


def bits_per_number(numbers: int) -> float:
    """Returns the factor from nats per image to bits per dimension; `numbers` is pixels times channels."""
    return 1 / (math.log(2) * numbers)


def parameters_for(components: int, channels: int) -> int:
    """Returns the number of parameters of a pixel's mixture."""
    return components * (1 + 2 * channels + channels * (channels - 1) // 2)


@dataclass(frozen=True)
class LogisticMixture:
    """Likelihood p(image): a mixture of discretized logistics per pixel; all channels of a pixel share the component.

    The mean of a channel depends linearly on the channels before it (arXiv 1701.05517, Section 2.2). Eqs. 14 and 16
    leave the dependence between channels open.

    Attributes:
        log_weights: normalized log-weights of the components.
        means: mean of each channel if the channels before it are 0.
        log_scales: log-scales, in units of [-1, 1].
        slopes: coefficients of channel j < i in the mean of channel i, in the order 10, 20, 21.
        bins: number of possible values.
    """

    log_weights: Float[Tensor, "b k h w"]
    means: Float[Tensor, "b k c h w"]
    log_scales: Float[Tensor, "b k c h w"]
    slopes: Float[Tensor, "b k _e h w"]
    bins: int

    @classmethod
    def of(cls, parameters: Float[Tensor, "b p h w"], *, channels: int, bins: int) -> "LogisticMixture":
        """Builds the mixture from a network's output of `parameters_for` channels, in float32."""
        pairs = channels * (channels - 1) // 2
        split = rearrange(parameters.float(), "b (n k) h w -> b k n h w", n=1 + 2 * channels + pairs)
        weights, means, log_scales, slopes = split.split((1, channels, channels, pairs), 2)
        log_scales = (log_scales + FIRST_LOG_SCALE).clamp(min=SMALLEST_LOG_SCALE)
        return cls(weights.squeeze(2).log_softmax(1), means, log_scales, slopes.tanh(), bins)

    def log_prob(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """Returns the log-likelihood ln p of each image, in nats."""
        x = images.float().unsqueeze(1)
        means = torch.stack([self._mean(channel, x) for channel in range(x.shape[2])], 2)
        log_p = log_discretized_logistic(x, means, self.log_scales, self.bins).sum(2)
        return (self.log_weights + log_p).logsumexp(1).sum((1, 2))

    def mean(self) -> Float[Tensor, "b c h w"]:
        """Returns the expectation of the image, ignoring discretization, clamped to [-1, 1]."""
        means = torch.zeros_like(self.means[:, :, :0])
        for channel in range(self.means.shape[2]):
            means = torch.cat([means, self._mean(channel, means).unsqueeze(2)], 2)
        return (self.log_weights.exp().unsqueeze(2) * means).sum(1).clamp(-1, 1)

    def nearest_to_mean(self) -> Float[Tensor, "b c h w"]:
        """Returns the mean rounded to the nearest possible values."""
        return to_bins(self.mean(), self.bins)

    def sample(self, seeds: Int64[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """Samples one image per seed."""
        _, k, c, h, w = self.means.shape
        gumbel_noise = gumbel(derive(seeds, Stream.LOGISTIC_COMPONENT), k, h, w)
        component = (self.log_weights + gumbel_noise).argmax(1)[:, None, None]
        noise = uniform(derive(seeds, Stream.LOGISTIC_VALUE), c, h, w).clamp(min=2.0**-25).logit()
        sample = torch.zeros_like(self.means[:, :1, :0])
        for channel in range(c):
            means, scales = self._mean(channel, sample), self.log_scales[:, :, channel].exp()
            mean, scale = (values.gather(1, component[:, :, 0]) for values in (means, scales))
            sample = torch.cat([sample, to_bins(mean + scale * noise[:, channel, None], self.bins).unsqueeze(2)], 2)
        return sample.squeeze(1)

    def _mean(self, channel: int, before: Tensor) -> Tensor:
        """Returns each component's mean of a channel, `(b, k, h, w)`, given at least the channels before it."""
        first = channel * (channel - 1) // 2
        slopes = self.slopes[:, :, first : first + channel]
        return self.means[:, :, channel] + (slopes * before[:, :, :channel]).sum(2)
