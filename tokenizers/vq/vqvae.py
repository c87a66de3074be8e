"""VQ-VAE, and the base classes that the VQ-VAE family shares: settings, checks of image sizes, one grid of codes.

Codebook search, losses and updates are in `quantizers/linked.py`, the convolutions in `layers/conv.py`.

Legend: b batch, c channels, h w image or grid, d code width.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smalti.core.codes import Codes, Layout, Level
from smalti.core.errors import UserError
from smalti.core.models import register
from smalti.tokenizers.base import PartName, Tokenizer, TokenizerOutput, require_size
from smalti.tokenizers.layers import conv
from smalti.tokenizers.layers.strips import in_bounded_memory
from smalti.tokenizers.quantizers.gumbel import GumbelQuantizer
from smalti.tokenizers.quantizers.inner_product import InnerProductQuantizer
from smalti.tokenizers.quantizers.linked import DECAY, REVIVE_BELOW, CodebookLearning, LinkedQuantizer


@dataclass(frozen=True)
class VQConfig:
    """Settings that the family shares. The defaults are for 32x32 colour images on two CPU cores: 8x8 codes."""

    height: int = 32
    """Height of the images in pixels. Other heights work too if the downsampling divides them."""
    width: int = 32
    """Width of the images in pixels."""
    image_channels: int = 3
    """3 for colour images, 1 for grey ones; 4 and 2 keep their alpha, other numbers are for images that have as many
    channels."""
    widths: tuple[int, ...] = (64, 128)
    """Channels of each stage, from the image inwards. Every stage halves height and width."""
    residual_blocks: int = 2
    """Residual blocks per stage, in encoder and decoder."""
    code_width: int = 64
    """Length of a codeword."""
    commitment_weight: float = 0.25
    """Weight of the commitment loss, beta. Raise it if encoder outputs drift away from the codewords."""
    codebook_learning: CodebookLearning = "ema"
    """Update of codewords: `ema`, as exponential moving averages of the vectors that choose them, or `gradient`, by the
    codebook loss."""
    codebook_decay: float = DECAY
    """Decay of the moving averages of codewords and of their use. Raise it to 0.99 for long trainings."""
    revive_below: float = REVIVE_BELOW
    """Against codebook collapse: a codeword used less than this share of its codebook's mean is dead, and moves to an
    encoder output. 0 revives none."""
    kmeans_start: bool = True
    """Initialize the codebooks by k-means on the untrained encoder's outputs, not at random."""


VQConfigT = TypeVar("VQConfigT", bound=VQConfig)


class VQFamily(Tokenizer[VQConfigT]):
    """Base class of tokenizers with convolutional networks: checks sizes, builds quantizers.

    Raises:
        UserError: if there is no stage, or the image size is not divisible by the downsampling.
    """

    training_settings: ClassVar[frozenset[str]] = frozenset(
        {"commitment_weight", "codebook_learning", "codebook_decay", "revive_below", "kmeans_start"}
    )

    def __init__(self, config: VQConfigT, *, downsampling: int) -> None:
        super().__init__(config)
        if not config.widths or min(config.widths) < 1:
            raise UserError(f"widths must name the channels of at least one stage, got {config.widths}")
        self.image_channels, self.downsampling = config.image_channels, downsampling
        require_size(config.height, config.width, downsampling)

    def quantizer_of(self, *, depth: int, branching: int, cosine: bool = False) -> LinkedQuantizer:
        """Returns a quantizer with the config's settings for codebook learning."""
        return LinkedQuantizer(
            code_width=self.config.code_width,
            depth=depth,
            branching=branching,
            commitment_weight=self.config.commitment_weight,
            learning=self.config.codebook_learning,
            decay=self.config.codebook_decay,
            revive_below=self.config.revive_below,
            cosine=cosine,
        )

    def prepared(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Checks the size of images and returns them in channels-last layout, in which the convolutions are faster.

        Raises:
            UserError: if their size is not divisible by the downsampling.
        """
        require_size(images.shape[2], images.shape[3], self.downsampling)
        return images.contiguous(memory_format=torch.channels_last)

    def freeze(self, parts: Sequence[PartName]) -> None:
        """See `Tokenizer.freeze`. Codebooks that are frozen have no moving averages either, and no revival."""
        super().freeze(parts)
        for module in self.modules():
            if isinstance(module, LinkedQuantizer):
                module.frozen = "codebook" in parts

    def collapse_remedy(self) -> str:
        """Names the first remedy against codebook collapse that the config leaves off."""
        if not self.config.kmeans_start:
            return "--kmeans-start, which initializes the codebooks from images"
        if not self.config.revive_below:
            return f"--revive-below {REVIVE_BELOW}, which revives dead codewords"
        return super().collapse_remedy()

    def recomputable(self) -> list[nn.Module]:
        """Returns every residual block."""
        return [module for module in self.modules() if isinstance(module, conv.ResidualBlock)]


class OneGrid(VQFamily[VQConfigT]):
    """Base class of tokenizers with one grid of codes. Subclasses build `encoder`, `quantizer` and `decoder`.

    `encode` runs in bounded memory, whatever the size of the images; so does `decode` under `torch.no_grad`.
    """

    parts: ClassVar[Mapping[PartName, tuple[str, ...]]] = {
        "encoder": ("encoder",),
        "decoder": ("decoder",),
        "codebook": ("quantizer",),
    }

    encoder: nn.Sequential
    quantizer: LinkedQuantizer | GumbelQuantizer | InnerProductQuantizer
    decoder: nn.Sequential

    @property
    @abstractmethod
    def radices(self) -> tuple[int, ...]:
        """Radices of a code: the codewords per codebook in each layer of codebooks."""

    @property
    def layout(self) -> Layout:
        """One level, at 1 / `downsampling` of the image size."""
        height, width = self.config.height // self.downsampling, self.config.width // self.downsampling
        return Layout((Level(height, width, self.radices),))

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c h w"]) -> Codes:
        """See `Tokenizer.encode`."""
        return (self.quantizer.encode(in_bounded_memory(self.encoder, self.prepared(images))),)

    def decode(self, codes: Codes, digits: int | None = None) -> Float[Tensor, "b c h w"]:
        """See `Tokenizer.decode`."""
        (grid,) = codes
        return in_bounded_memory(self.decoder, self.quantizer.lookup(grid, digits)).float().clamp(-1, 1)

    @torch.no_grad()
    def init_from_data(self, images: Float[Tensor, "b c h w"]) -> None:
        """Initializes the codebooks by k-means on the encoder's outputs for these images, if so configured."""
        if self.config.kmeans_start:
            self.quantizer.init_from_data(self.encoder(self.prepared(images)))


class ConvolutionalVQ(OneGrid[VQConfigT]):
    """Base class of VQ-VAE and HR-VQVAE, which differ only in the `radices` of their codes.

    Raises:
        UserError: as `VQFamily` and `LinkedQuantizer` do.
    """

    def __init__(self, config: VQConfigT) -> None:
        super().__init__(config, downsampling=2 ** len(config.widths))
        encoder, decoder = (
            make(
                image_channels=config.image_channels,
                widths=config.widths,
                residual_blocks=config.residual_blocks,
                code_width=config.code_width,
            )
            for make in (conv.encoder, conv.decoder)
        )
        self.encoder, self.decoder = encoder, decoder
        self.quantizer = self.quantizer_of(depth=len(self.radices), branching=self.radices[0])
        # convolutions are 1.3-2 times faster in this layout, on CPUs and GPUs
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - torch's stub has no such overload

    def forward(self, images: Float[Tensor, "b c h w"]) -> TokenizerOutput:
        """Computes the losses `reconstruction` (squared error), `commitment` and, without EMA, `codebook`."""
        quantized = self.quantizer(self.encoder(self.prepared(images)))
        reconstruction = self.decoder(quantized.z_q).float()
        losses = {"reconstruction": F.mse_loss(reconstruction, images), **quantized.losses}  # Eqs. 2 and 5
        return TokenizerOutput(reconstruction, (quantized.codes,), losses)


@dataclass(frozen=True)
class VQVAEConfig(VQConfig):
    """Settings of a VQ-VAE."""

    codebook_size: int = 512
    """Number of codewords."""


@register
class VQVAE(ConvolutionalVQ[VQVAEConfig]):
    """VQ-VAE (arXiv 1711.00937; HR-VQVAE, Eqs. 1 and 2): one grid of codes with a flat codebook.

    The HR-VQVAE paper calls the codebook size m, the VQ-VAE paper K.

    Raises:
        UserError: as `ConvolutionalVQ` does.
    """

    kind: ClassVar[str] = "vqvae"
    config_class: ClassVar[type] = VQVAEConfig

    @property
    def radices(self) -> tuple[int, ...]:
        """Radices of a code: the codebook size alone."""
        return (self.config.codebook_size,)
