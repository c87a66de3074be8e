"""A layer of HQA's stack: its settings, its networks, and what they start from. How layers are stacked is in `hqa.py`.

Legend: b batch, c channels, h w image or grid, d code width.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smalti.core.config import added
from smalti.tokenizers.hqa.pca_encoder import PrincipalEncoder, start_linear
from smalti.tokenizers.layers import conv
from smalti.tokenizers.quantizers.linked import LinkedQuantizer
from smalti.tokenizers.quantizers.stochastic import START_LENGTH, StochasticQuantizer

Posterior: TypeAlias = Literal["stochastic", "nearest"]
Target: TypeAlias = Literal["features", "codes"]


@dataclass(frozen=True)
class HQAConfig:
    """Settings of an HQA. The defaults bring 32x32 images to one code of 8 bits, through 16x16, 8x8, 4x4 and 2x2."""

    height: int = 32
    """Height of the images in pixels; others that divide by the downsampling work too."""
    width: int = 32
    """Width of the images in pixels."""
    image_channels: int = 3
    """3 for colour, 1 for grey."""
    widths: tuple[int, ...] = (32, 32, 32, 80, 128)
    """Channels of each layer's networks, from the image upwards; every layer halves the size."""
    residual_blocks: int = 1
    """Residual blocks of each encoder and of each decoder."""
    code_width: int = 64
    """Length of a codeword."""
    codebook_size: int = 256
    """Codewords of each layer."""
    posterior: Posterior = "stochastic"
    """How layers quantize: `stochastic` samples (Eq. 3), through a Gumbel softmax in training; `nearest` takes the
    nearest codeword."""
    target: Target = "features"
    """What layers above the first reconstruct: the `features` z_e of the layer below (Section 5.2.2), by squared error,
    or its `codes`, by cross-entropy, as HAMs do."""
    probabilistic: bool = True
    """Add Eq. 4's entropy and probabilistic commitment to the reconstruction; if not, Eq. 2's codebook and commitment
    terms. Of stochastic posteriors only."""
    latent_weight: float = 0.001
    """Weight of these terms: Eq. 4 in units of twice the variance of p(x|z), which the paper leaves open."""
    upper_latent_weight: float | None = None
    """That of layers above the first, whose variance is another one; as of the first unless given."""
    temperature: float = 0.667
    """Of the Gumbel softmax when training starts; it falls linearly to 0."""
    reset_below: float = 0.03
    """A codeword used less than this share of the most used one moves to beside one in use; 0 moves none."""
    kmeans_start: bool = True
    """Start a layer's codewords at the k-means centres of what its untrained encoder, scaled to their spread, makes of
    images; not from random codewords."""
    linear_start: bool = True
    """Start the networks of a layer with one code an image as the best linear code of the 2x2 features that it is
    given, their principal components; not from random weights. Of learned encoders."""
    principal_encoders: bool = added(off=False)
    """Encode by the principal components of 2x2 patches, fixed but for a factor that is learned, in every layer. Not
    the paper's, whose encoders are learned: those bend distances, and layers above, which reconstruct features by
    squared error, then no longer reconstruct what tells images apart."""
    normalize: bool = False
    """Bring the features that a layer reconstructs to mean 0, and to variance 1 over all channels together: distances,
    by which the layer below quantizes them, keep their proportions."""


class Stage(nn.Module):
    """One layer of the stack: encoder, quantizer, decoder, and the mean and deviation of what it is given.

    Deviations: residual blocks and activations are those of the rest of smalti's family, not the paper's; the mean and
    deviation, which the authors' code keeps running, are taken once, as the layer below no longer changes.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: HQAConfig, number: int) -> None:
        super().__init__()
        self.number, self.alone = number, max(config.height, config.width) >> (number + 1) == 1
        self.of_codes = number > 0 and config.target == "codes"
        given = config.code_width if number else config.image_channels
        shape: dict[str, Any] = {
            "widths": (config.widths[number],),
            "residual_blocks": config.residual_blocks,
            "code_width": config.code_width,
            "alone": self.alone,
        }
        made = config.codebook_size if self.of_codes else given
        self.encoder: PrincipalEncoder | nn.Sequential = (
            PrincipalEncoder(given, config.code_width)
            if config.principal_encoders
            else conv.encoder(image_channels=given, **shape)
        )
        self.decoder = conv.decoder(image_channels=made, **shape)
        upper = config.upper_latent_weight if number else None
        weight = config.latent_weight if upper is None else upper
        self.quantizer = _quantizer(config, weight=weight / (4 * (1 if self.of_codes else given)))
        self.register_buffer("mean", torch.zeros(given, 1, 1))
        self.register_buffer("deviation", torch.ones(1, 1, 1))

    def encode(self, given: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d _h _w"]:
        """z_e, at half the size."""
        return self.encoder(self.normalized(given))

    def normalized(self, given: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """What the networks see of it, and reconstruct."""
        return (given - self.mean) / self.deviation

    @torch.no_grad()
    def init_from_data(self, given: Float[Tensor, "b c h w"], config: HQAConfig) -> None:
        """What `config` says of the start, from what the layer is given: the mean and deviation that it is brought to 0
        and 1 by, the networks, and the codewords."""
        if config.normalize and self.number:
            self.mean.copy_(given.mean((0, 2, 3), keepdim=True)[0])
            self.deviation.fill_((given - self.mean).square().mean().sqrt().clamp_min(1e-6))
        given, encoder = self.normalized(given), self.encoder
        linear = config.linear_start and self.alone and not (self.of_codes or config.principal_encoders)
        if isinstance(encoder, PrincipalEncoder):
            encoder.init_from_data(given)
        elif linear:
            start_linear(encoder, self.decoder, given)
        if not config.kmeans_start:
            return
        z_e = encoder(given)
        if isinstance(self.quantizer, StochasticQuantizer):
            scale = START_LENGTH / z_e.var((0, 2, 3)).sum().sqrt().clamp_min(1e-6)
            z_e = z_e * scale
            if isinstance(encoder, PrincipalEncoder):
                encoder.multiply(scale)
            else:
                last = cast(nn.Conv2d, encoder[-1])
                last.weight.mul_(scale)
                cast(Tensor, last.bias).mul_(scale)
            if linear:
                cast(nn.Conv2d, self.decoder[0]).weight.div_(scale)
        self.quantizer.init_from_data(z_e)


def _quantizer(config: HQAConfig, *, weight: float) -> LinkedQuantizer | StochasticQuantizer:
    """A layer's.

    Args:
        config: of the stack.
        weight: of its terms: the loss is per value that the decoder makes, and it makes several for each code.
    """
    if config.posterior == "nearest":
        return LinkedQuantizer(
            code_width=config.code_width, branching=config.codebook_size, revive_below=config.reset_below
        )
    return StochasticQuantizer(
        code_width=config.code_width,
        codebook_size=config.codebook_size,
        probabilistic=config.probabilistic,
        weight=weight,
        temperature=config.temperature,
        reset_below=config.reset_below,
    )
