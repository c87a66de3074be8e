"""VQ-GAN: the tokenizer and its settings.

Its layers are in `layers/attention_blocks.py`, its perceptual and adversarial losses in `losses.py`.

Legend: b batch, c channels, h w image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.core.models import register
from smalti.tokenizers.base import PartName, TokenizerOutput
from smalti.tokenizers.layers import attention_blocks
from smalti.tokenizers.quantizers.gumbel import GumbelQuantizer
from smalti.tokenizers.vq.vqvae import OneGrid, VQConfig, VQFamily
from smalti.tokenizers.vqgan import losses
from smalti.tokenizers.vqgan.perceptual import PerceptualName
from smalti.training.config import FitConfig, Phase


@dataclass(frozen=True)
class VQGANConfig(VQConfig):
    """Settings of a VQ-GAN. The defaults are for 32x32 colour images on two CPU cores: 8x8 codes."""

    widths: tuple[int, ...] = (32, 64, 64)
    """Channels of each stage, from the image inwards. Every stage but the last halves height and width."""
    residual_blocks: int = 1
    """Residual blocks per stage of the encoder. The decoder has one more."""
    attention_stages: tuple[int, ...] = ()
    """Stages with attention after each residual block, counted from 0 at the image's size. The middle of the network
    always has attention."""
    latent_width: int = 64
    """Channels between the networks and the 1x1 convolutions to and from codewords."""
    norm_groups: int = 32
    """Groups of every GroupNorm. Every width must be divisible by it."""
    quantizer: Literal["nearest", "cosine", "gumbel"] = "nearest"
    """`nearest` takes the nearest codeword, or the nearest path through linked codebooks. `cosine` takes the codeword
    of largest cosine similarity; use it with a small --code-width such as 8. `gumbel` samples codes by the
    Gumbel-softmax."""
    branching: int = 512
    """Codewords per codebook."""
    depth: int = 1
    """Layers of linked codebooks: the number of digits of a code. 1 is a flat codebook."""
    kl_weight: float = 1e-8
    """With `gumbel`: weight of the KL divergence of the codes' distribution from the uniform one. Raise it against
    codebook collapse."""
    temperature: float = 1.0
    """With `gumbel`: temperature of the Gumbel-softmax. Lower it for gradients of harder samples."""
    perceptual: PerceptualName = "lite0"
    """Network of the perceptual loss: `lite0` is EfficientNet-Lite0, from the extra `metrics`; `lpips-vgg` is LPIPS as
    in the paper, from the extra `lpips`, which downloads VGG-16's weights once."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual loss. 0 turns it off; then neither extra is needed."""
    adversarial_weight: float = 0.8
    """Weight of the adversarial loss, before the adaptive weight. 0 trains without a discriminator."""
    discriminator_start: int = 1_000
    """Steps before the discriminator starts to train and the adversarial loss sets in."""
    discriminator_ramp: int = 500
    """Steps, from that start, over which the adversarial loss rises to its full weight."""
    discriminator_width: int = 64
    """Channels of the discriminator's first layer."""
    discriminator_layers: int = 3
    """Layers of the discriminator that halve the size. More layers compare larger patches."""


@register
class VQGAN(OneGrid[VQGANConfig]):
    """VQ-GAN (arXiv 2012.09841): one grid of codes, a network with attention, perceptual and adversarial losses.

    The codebook is flat, or compared by cosine similarity (ViT-VQGAN), or sampled from (Gumbel-softmax), or linked as
    in HR-VQVAE.

    Raises:
        UserError: as `VQFamily` and `LinkedQuantizer` do; if there is no stage of a number in `attention_stages`, a
            width is not divisible by `norm_groups`, or `gumbel` codes have several digits.
    """

    kind: ClassVar[str] = "vqgan"
    config_class: ClassVar[type] = VQGANConfig
    training_settings: ClassVar[frozenset[str]] = VQFamily.training_settings | {
        *("kl_weight", "temperature", "perceptual", "perceptual_weight", "adversarial_weight"),
        *("discriminator_start", "discriminator_ramp", "discriminator_width", "discriminator_layers"),
    }

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
        # convolutions are 1.3-2 times faster in this layout, on CPUs and GPUs
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - torch's stub has no such overload

    @property
    def radices(self) -> tuple[int, ...]:
        """Radices of a code: `branching` in each of `depth` layers."""
        return (self.config.branching,) * self.config.depth

    def forward(self, images: Float[Tensor, "b c h w"], seeds: Int64[Tensor, " b"] | None = None) -> TokenizerOutput:
        """Computes the losses `reconstruction` (absolute error) and those of the quantizer.

        The perceptual and adversarial losses are computed in `losses.py`.

        Args:
            images: images in [-1, 1].
            seeds: one per image, for the samples of a Gumbel quantizer; without seeds it takes the most probable codes.
        """
        z_e = self.encoder(self.prepared(images))
        samples = isinstance(self.quantizer, GumbelQuantizer)
        quantized = self.quantizer(z_e, seeds) if samples else self.quantizer(z_e)
        reconstruction = self.decoder(quantized.z_q).float()
        losses = {"reconstruction": F.l1_loss(reconstruction, images), **quantized.losses}
        return TokenizerOutput(reconstruction, (quantized.codes,), losses)

    def phases(self, fit: FitConfig) -> list[Phase]:
        """Returns the generator's phase and, with an `adversarial_weight`, the discriminator's.

        Raises:
            UserError: if the perceptual loss's extra or weights are missing, images are too small for that loss or for
                the discriminator, or `fit` asks to compile the networks.
        """
        return losses.phases(self, fit)

    def freeze(self, parts: Sequence[PartName]) -> None:
        """See `Tokenizer.freeze`.

        Raises:
            UserError: also for a frozen decoder with an adversarial loss, whose weight follows the decoder's gradients.
        """
        if "decoder" in parts and self.config.adversarial_weight:
            raise UserError("--freeze decoder needs --adversarial-weight 0: the discriminator trains the decoder")
        super().freeze(parts)

    def collapse_remedy(self) -> str:
        """Advice against codebook collapse, for a Gumbel quantizer or as in `VQFamily`."""
        return "a higher --kl-weight" if self.config.quantizer == "gumbel" else super().collapse_remedy()

    def recomputable(self) -> list[nn.Module]:
        """Returns every residual block and every attention layer."""
        kinds = (attention_blocks.ResidualBlock, attention_blocks.Attention)
        return [module for module in self.modules() if isinstance(module, kinds)]


def _check(config: VQGANConfig) -> None:
    if config.norm_groups < 1:
        raise UserError(f"--norm-groups must be at least 1, not {config.norm_groups}")
    if odd := [width for width in config.widths if width % config.norm_groups]:
        raise UserError(f"a width of {odd[0]} is not divisible into {config.norm_groups} groups; change --norm-groups")
    if absent := [stage for stage in config.attention_stages if not 0 <= stage < len(config.widths)]:
        raise UserError(f"there is no stage {absent[0]} for attention; stages are 0 to {len(config.widths) - 1}")
    if config.quantizer == "gumbel" and config.depth > 1:
        raise UserError(f"--quantizer gumbel needs codes of one digit; use --depth 1, not {config.depth}")
