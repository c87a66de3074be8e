"""One layer of HQA's stack: its networks, their initialization, and the settings of the stack.

The stack of layers is in `hqa.py`.

Legend: b batch, c channels, h w image or grid, d code width.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smalti.core.config import added, replacing
from smalti.tokenizers.hqa.pca_encoder import PCAEncoder, init_linear
from smalti.tokenizers.layers import conv
from smalti.tokenizers.quantizers.linked import LinkedQuantizer
from smalti.tokenizers.quantizers.stochastic import START_LENGTH, StochasticQuantizer

Posterior: TypeAlias = Literal["stochastic", "nearest"]
Target: TypeAlias = Literal["features", "codes"]


@dataclass(frozen=True)
class HQAConfig:
    """Settings of an HQA. The defaults compress a 32x32 image to one code of 8 bits, halving the size in each layer.

    The weight of Eq. 4's terms is twice the variance of p(x|z), which the paper leaves open, for images in [-1, 1]. The
    authors' code has 0.001 for images in [0, 1], which is 0.004 here, and for the normalized features of all layers.
    """

    height: int = 32
    """Height of the images in pixels. Other heights work too if the downsampling divides them."""
    width: int = 32
    """Width of the images in pixels."""
    image_channels: int = 3
    """3 for colour images, 1 for grey ones; 4 and 2 keep their alpha, other numbers are for images that have as many
    channels."""
    widths: tuple[int, ...] = (32, 32, 32, 80, 128)
    """Channels of each layer's networks, from the image upwards. Every layer halves height and width."""
    residual_blocks: int = 1
    """Residual blocks per encoder and per decoder."""
    code_width: int = 64
    """Length of a codeword."""
    codebook_size: int = 256
    """Codewords per layer."""
    posterior: Posterior = "stochastic"
    """Quantizer of every layer: `stochastic` samples from a posterior, by the Gumbel-softmax in training; `nearest`
    takes the nearest codeword."""
    target: Target = "features"
    """Target of layers above the first: the `features` of the layer below, by squared error, or its `codes`, by
    cross-entropy, as in HAMs."""
    probabilistic: bool = True
    """Train with the posterior's entropy and probabilistic commitment. If off, train with VQ-VAE's codebook and
    commitment losses. Applies to `stochastic` posteriors."""
    latent_weight: float = 0.001
    """Weight of these losses relative to the reconstruction loss. Applies to `stochastic` posteriors."""
    upper_latent_weight: float | None = None
    """The same weight for layers above the first [default: that of the first]."""
    temperature: float = 0.667
    """Temperature of the Gumbel-softmax at the start of training. It falls linearly to 0. Applies to `stochastic`
    posteriors."""
    reset_below: float = 0.03
    """Against codebook collapse: a codeword used less than this share of the most used one is dead, and moves next to
    one in use; of `nearest`, one used less than this share of the mean, which moves to an encoder output. 0 resets
    none."""
    codebook_init: Literal["kmeans", "random"] = replacing("kmeans_start", on="kmeans", off="random", default="kmeans")
    """Initialization of each layer's codebook: `kmeans` takes k-means centres of the outputs of the layer's untrained
    encoder, `random` random vectors."""
    linear_start: bool = True
    """Initialize the networks of a layer with one code per image as the principal component analysis (PCA) of its 2x2
    inputs, not at random. Applies to learned encoders."""
    principal_encoders: bool = added(off=False)
    """Encode every layer by the principal components (PCA) of 2x2 patches, fixed up to a learned factor. They preserve
    distances between images, which upper layers then reconstruct better; the paper's encoders are learned."""
    normalize: bool = False
    """Normalize the features that a layer reconstructs to mean 0 per channel and variance 1 over all channels together.
    Their distances keep their proportions."""


class HQALayer(nn.Module):
    """One layer of the stack: encoder, quantizer, decoder, and the mean and deviation of its inputs.

    Deviations: residual blocks and activations are those of smalti's VQ-VAE family, not the authors'. Codebooks start
    as k-means centres, and the networks of the top layer as principal components, unless the config says otherwise. A
    reset moves all dead codewords, where the authors' code moves one. With `normalize`, which is off by default, a
    layer has one deviation for all channels, computed once because the layer below no longer changes; the authors' code
    always normalizes, each channel by a running deviation of its own.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: HQAConfig, number: int) -> None:
        super().__init__()
        self.number, self.alone = number, max(config.height, config.width) >> (number + 1) == 1
        self.predicts_codes = number > 0 and config.target == "codes"
        input_channels = config.code_width if number else config.image_channels
        shape: dict[str, Any] = {
            "widths": (config.widths[number],),
            "residual_blocks": config.residual_blocks,
            "code_width": config.code_width,
            "alone": self.alone,
        }
        output_channels = config.codebook_size if self.predicts_codes else input_channels
        self.encoder: PCAEncoder | nn.Sequential = (
            PCAEncoder(input_channels, config.code_width)
            if config.principal_encoders
            else conv.encoder(image_channels=input_channels, **shape)
        )
        self.decoder = conv.decoder(image_channels=output_channels, **shape)
        upper = config.upper_latent_weight if number else None
        weight = config.latent_weight if upper is None else upper
        self.quantizer = _quantizer(config, weight=weight / (4 * (1 if self.predicts_codes else input_channels)))
        self.register_buffer("mean", torch.zeros(input_channels, 1, 1))
        self.register_buffer("deviation", torch.ones(1, 1, 1))

    def encode(self, inputs: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d _h _w"]:
        """Encodes images, or features of the layer below, to z_e at half their size."""
        return self.encoder(self.normalized(inputs))

    def normalized(self, inputs: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalizes the inputs to what the encoder receives and the decoder reconstructs."""
        return (inputs - self.mean) / self.deviation

    @torch.no_grad()
    def init_from_data(self, inputs: Float[Tensor, "b c h w"], config: HQAConfig) -> None:
        """Initializes normalization, networks and codewords from the layer's inputs, as `config` sets."""
        if config.normalize and self.number:
            self.mean.copy_(inputs.mean((0, 2, 3), keepdim=True)[0])
            self.deviation.fill_((inputs - self.mean).square().mean().sqrt().clamp_min(1e-6))
        inputs, encoder = self.normalized(inputs), self.encoder
        linear = config.linear_start and self.alone and not (self.predicts_codes or config.principal_encoders)
        if isinstance(encoder, PCAEncoder):
            encoder.init_from_data(inputs)
        elif linear:
            init_linear(encoder, self.decoder, inputs)
        if config.codebook_init == "random":
            return
        z_e = encoder(inputs)
        if isinstance(self.quantizer, StochasticQuantizer):
            # scaled so that encoder outputs are as widely spread as random codewords
            spread = z_e.var((0, 2, 3), correction=0).sum().sqrt()
            scale = torch.where(spread > 0, START_LENGTH / spread, 1.0)
            z_e = z_e * scale
            if isinstance(encoder, PCAEncoder):
                encoder.multiply(scale)
            else:
                last = cast(nn.Conv2d, encoder[-1])
                last.weight.mul_(scale)
                cast(Tensor, last.bias).mul_(scale)
            if linear:
                cast(nn.Conv2d, self.decoder[0]).weight.div_(scale)
        self.quantizer.init_from_data(z_e)


def _quantizer(config: HQAConfig, *, weight: float) -> LinkedQuantizer | StochasticQuantizer:
    """Builds a layer's quantizer.

    Args:
        config: settings of the stack.
        weight: weight of the stochastic quantizer's losses. The reconstruction loss is a mean over the decoder's output
            values, several per code, so the weight is per output value too.
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
