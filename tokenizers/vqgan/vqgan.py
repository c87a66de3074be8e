"""VQ-GAN: the tokenizer. Its layers are in `attention_blocks.py`, what trains it in `losses.py`.

Legend: b batch, c channels, h w image.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.core.models import register
from smalti.tokenizers.base import TokenizerOutput
from smalti.tokenizers.layers import attention_blocks
from smalti.tokenizers.quantizers.gumbel import GumbelQuantizer
from smalti.tokenizers.vq.vqvae import OneGrid, VQConfig
from smalti.tokenizers.vqgan import losses
from smalti.tokenizers.vqgan.perceptual import PerceptualName
from smalti.training.config import FitConfig, Phase


@dataclass(frozen=True)
class VQGANConfig(VQConfig):
    """Settings of a VQ-GAN. The defaults are for 32x32 colour images on two CPU cores: 8x8 codes."""

    widths: tuple[int, ...] = (32, 64, 64)
    """Channels of each stage, from the image inwards; every stage but the last halves the size."""
    residual_blocks: int = 1
    """Residual blocks of each stage of the encoder; the decoder has one more."""
    attention_stages: tuple[int, ...] = ()
    """Stages, counted from 0 at the image's size, whose residual blocks are each followed by attention. Between
    encoder and decoder there is attention anyway."""
    latent_width: int = 64
    """Channels between the networks and the 1x1 convolutions to and from codewords."""
    norm_groups: int = 32
    """Groups of every GroupNorm; each width divides by them."""
    quantizer: Literal["nearest", "cosine", "gumbel"] = "nearest"
    """`nearest`: the nearest codeword, or path through linked codebooks; `cosine`: the codeword nearest in direction,
    both scaled to length 1, for a small --code-width such as 8; `gumbel`: codes are drawn."""
    branching: int = 512
    """Codewords of each codebook."""
    depth: int = 1
    """Layers of linked codebooks, digits of a code; 1 is a flat codebook."""
    kl_weight: float = 1e-8
    """With `gumbel`: weight of the divergence of the codes' distribution from the uniform one."""
    temperature: float = 1.0
    """With `gumbel`: of the relaxed draws that gradients see."""
    perceptual: PerceptualName = "lite0"
    """Whose features' distance is part of the loss: `lite0`, EfficientNet-Lite0's, from the extra `metrics`;
    `lpips-vgg`, LPIPS as in the paper, from the extra `lpips`, which downloads VGG-16's weights once."""
    perceptual_weight: float = 1.0
    """Weight of that distance; 0 does without, and needs neither extra."""
    adversarial_weight: float = 0.8
    """Weight of what the discriminator says, times the adaptive one; 0 trains without a discriminator."""
    discriminator_start: int = 1_000
    """Steps before the discriminator begins to learn and to be heard."""
    discriminator_ramp: int = 500
    """Steps, from then on, over which what it says gets its full weight."""
    discriminator_width: int = 64
    """Channels of its first layer."""
    discriminator_layers: int = 3
    """Its layers that halve the size: the more, the larger the patches that it judges."""


@register
class VQGAN(OneGrid):
    """VQ-GAN (arXiv 2012.09841): one grid of codes of a network with attention, trained for looks besides error.

    The codebook is flat, of directions (ViT-VQGAN's), drawn from (Gumbel), or HR-VQVAE's linked codebooks.

    Raises:
        UserError: as `VQFamily` and `LinkedQuantizer` do; for attention at a stage that is not there, widths that do
            not divide into groups, or a drawn code of several digits.
    """

    kind: ClassVar[str] = "vqgan"
    config_class: ClassVar[type] = VQGANConfig

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(config, downsampling=2 ** (len(config.widths) - 1) if config.widths else 1)
        _check(config)
        self.encoder, self.decoder = attention_blocks.encoder_and_decoder(
            image_channels=config.image_channels,
            widths=config.widths,
            residual_blocks=config.residual_blocks,
            attention_stages=config.attention_stages,
            latent_width=config.latent_width,
            code_width=config.code_width,
            groups=config.norm_groups,
        )
        self.quantizer = (
            GumbelQuantizer(
                code_width=config.code_width,
                codebook_size=config.branching,
                temperature=config.temperature,
                kl_weight=config.kl_weight,
            )
            if config.quantizer == "gumbel"
            else self.quantizer_of(depth=config.depth, branching=config.branching, cosine=config.quantizer == "cosine")
        )
        # convolutions are 1.3-2x faster so, on CPUs and GPUs
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - torch's stub has no such overload

    @property
    def radices(self) -> tuple[int, ...]:
        """Of a code: `branching` for each of `depth` layers."""
        return (self.config.branching,) * self.config.depth

    def forward(self, images: Float[Tensor, "b c h w"], seeds: Int64[Tensor, " b"] | None = None) -> TokenizerOutput:
        """See `TokenizerOutput`; the losses are `reconstruction` (the absolute error) and those of the quantizer.

        Args:
            images: in [-1, 1].
            seeds: one for each image, from which a Gumbel quantizer draws; without, it takes the likeliest codes.
        """
        z_e = self.encoder(self.prepared(images))
        drawn = isinstance(self.quantizer, GumbelQuantizer)
        quantized = self.quantizer(z_e, seeds) if drawn else self.quantizer(z_e)
        reconstruction = self.decoder(quantized.z_q).float()
        losses = {"reconstruction": F.l1_loss(reconstruction, images), **quantized.losses}
        return TokenizerOutput(reconstruction, (quantized.codes,), losses)

    def phases(self, fit: FitConfig) -> list[Phase]:
        """The tokenizer's own, and with an `adversarial_weight` the discriminator's.

        Raises:
            UserError: if the extra of the perceptual loss or its weights are not there, images are too small for that
                loss or the discriminator, or the networks are to be compiled.
        """
        return losses.phases(self, fit)

    def collapse_remedy(self) -> str:
        """A Gumbel quantizer's own; else see `VQFamily`."""
        return "a higher --kl-weight" if self.config.quantizer == "gumbel" else super().collapse_remedy()

    def recomputable(self) -> list[nn.Module]:
        """Every residual block and every attention."""
        kinds = (attention_blocks.ResidualBlock, attention_blocks.Attention)
        return [module for module in self.modules() if isinstance(module, kinds)]


def _check(config: VQGANConfig) -> None:
    if odd := [width for width in config.widths if width % config.norm_groups]:
        raise UserError(f"widths of {odd[0]} do not divide into {config.norm_groups} groups; change --norm-groups")
    if absent := [stage for stage in config.attention_stages if not 0 <= stage < len(config.widths)]:
        raise UserError(f"there is no stage {absent[0]} for attention: stages are 0 to {len(config.widths) - 1}")
    if config.quantizer == "gumbel" and config.depth > 1:
        raise UserError(f"drawn codes have one digit; give --depth 1 with --quantizer gumbel, not {config.depth}")
