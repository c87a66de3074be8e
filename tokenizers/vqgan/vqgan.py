"""VQ-GAN: the tokenizer and its settings.

Its layers are in `layers/attention_blocks.py` and `layers/maskgit_blocks.py`, its perceptual and adversarial losses in
`losses.py`.

Legend: b batch, c channels, h w image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from smalti.core.config import added, renamed
from smalti.core.errors import UserError, require_at_least_one
from smalti.core.models import register
from smalti.tokenizers.base import PartName
from smalti.tokenizers.layers import attention_blocks, maskgit_blocks
from smalti.tokenizers.quantizers.registry import code_radices
from smalti.tokenizers.quantizers.tree import Branching, depth_of, radices_of
from smalti.tokenizers.vq.vqvae import OneCodebookConfig, OneGrid
from smalti.tokenizers.vqgan import losses
from smalti.tokenizers.vqgan.perceptual import PerceptualName
from smalti.training.config import FitConfig, Phase


@dataclass(frozen=True)
class VQGANConfig(OneCodebookConfig):
    """Settings of a VQ-GAN. The defaults are for 32x32 colour images on two CPU cores: 8x8 codes."""

    widths: tuple[int, ...] = (32, 64, 64)
    """Channels of each stage, from the image inwards. Every stage but the last halves height and width."""
    residual_blocks: int = 1
    """Residual blocks per stage of the encoder. The decoder has one more."""
    attention_stages: tuple[int, ...] = ()
    """Stages with attention after each residual block, counted from 0 at the image's size."""
    middle_attention: bool = added(True)
    """Attention between the two residual blocks in the middle of the network, on the coarsest grid. Its memory grows
    with the square of the grid's positions."""
    architecture: Literal["vqgan", "maskgit"] = added("vqgan")
    """`vqgan` is the network of the VQ-GAN paper. `maskgit` is MaskGIT's, without attention and 1x1 convolutions around
    the codes; it needs --no-middle-attention and a --latent-width equal to --code-width."""
    reconstruction_loss: Literal["mse", "l1"] = added("l1")
    """Reconstruction loss: `l1`, the mean absolute error of the authors' code, or `mse`, the mean squared error."""
    latent_width: int = 64
    """Channels between the networks and the 1x1 convolutions to and from codewords."""
    norm_groups: int = 32
    """Groups of every GroupNorm. Every width must be divisible by it."""
    quantizer: Literal["linked", "residual", "cosine", "dot", "simvq", "gumbel", "fsq", "lfq"] = renamed(
        "linked", {"nearest": "linked"}
    )
    """`linked` takes the nearest codeword, or the nearest path through --depth linked codebooks; `residual` adds
    codewords of --depth codebooks; `cosine` takes the codeword of largest cosine similarity, for a small --code-width
    such as 8; `dot` that of largest inner product (IBQ), `simvq` the nearest of mapped frozen codewords, both for large
    codebooks; `gumbel` samples codes by the Gumbel-softmax; `fsq` rounds and `lfq` takes signs, without a codebook."""
    branching: Branching = 512
    """Codewords per codebook, or number of codes for the quantizers without one: one number for every layer, or a
    number for each, the first layer's first."""
    depth: int = 1
    """With `linked` and `residual`: layers of codebooks, the number of digits of a code. 1 is a flat codebook. With a
    --branching for each layer it is their number."""
    shared_codebooks: bool = added(False)
    """With `residual`: all layers use one codebook (RQ-VAE)."""
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "depth", depth_of(self.branching, self.depth, default=1))


@register
class VQGAN(OneGrid[VQGANConfig]):
    """VQ-GAN (arXiv 2012.09841): one grid of codes, a network with attention, perceptual and adversarial losses.

    Raises:
        UserError: as `VQFamily` and the quantizers do; if there is no stage of a number in `attention_stages`, a width
            is not divisible by `norm_groups`, or MaskGIT's network is to have attention.
    """

    kind: ClassVar[str] = "vqgan"
    config_class: ClassVar[type] = VQGANConfig
    training_settings: ClassVar[frozenset[str]] = OneGrid.training_settings | {
        *("perceptual", "perceptual_weight", "adversarial_weight"),
        *("discriminator_start", "discriminator_ramp", "discriminator_width", "discriminator_layers"),
    }

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(config, downsampling=2 ** (len(config.widths) - 1) if config.widths else 1)
        _check(config)
        self.encoder, self.decoder = _networks(config)
        self.quantizer = self.quantizer_of(config.quantizer, self.radices)
        self.use_channels_last()

    @property
    def radices(self) -> tuple[int, ...]:
        """Radices of a code: the branching of each layer, FSQ's levels, or LFQ's bits."""
        config = self.config
        return code_radices(config.quantizer, radices_of(config.branching, config.depth), config.levels)

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

    def recomputable(self) -> list[nn.Module]:
        """Returns every residual block and every attention layer."""
        kinds = (attention_blocks.ResidualBlock, attention_blocks.Attention)
        return [module for module in self.modules() if isinstance(module, kinds)]


def _networks(config: VQGANConfig) -> tuple[nn.Sequential, nn.Sequential]:
    """Returns the encoder and the decoder."""
    if config.architecture == "maskgit":
        return maskgit_blocks.encoder_and_decoder(
            image_channels=config.image_channels,
            widths=config.widths,
            residual_blocks=config.residual_blocks,
            code_width=config.code_width,
            groups=config.norm_groups,
        )
    return attention_blocks.encoder_and_decoder(
        image_channels=config.image_channels,
        widths=config.widths,
        residual_blocks=config.residual_blocks,
        attention_stages=config.attention_stages,
        middle_attention=config.middle_attention,
        latent_width=config.latent_width,
        code_width=config.code_width,
        groups=config.norm_groups,
    )


def _check(config: VQGANConfig) -> None:
    require_at_least_one(config, "norm_groups")
    if odd := [width for width in config.widths if width % config.norm_groups]:
        raise UserError(f"a width of {odd[0]} is not divisible into {config.norm_groups} groups; change --norm-groups")
    if absent := [stage for stage in config.attention_stages if not 0 <= stage < len(config.widths)]:
        raise UserError(f"there is no stage {absent[0]} for attention; stages are 0 to {len(config.widths) - 1}")
    if config.architecture == "maskgit":
        if config.attention_stages or config.middle_attention:
            raise UserError("--architecture maskgit has no attention; use --no-middle-attention")
        if config.latent_width != config.code_width:
            widths = f"{config.latent_width} and {config.code_width}"
            raise UserError(f"--architecture maskgit needs a --latent-width equal to --code-width, not {widths}")
