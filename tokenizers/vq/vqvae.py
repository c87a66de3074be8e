"""VQ-VAE: encoder, codebook, decoder; and what the whole family shares: its settings, the sizes it takes, and how one
grid of codes is made and read.

The codebook's search, losses and learning are in `linked.py`, the convolutions in `conv.py`.

Legend: b batch, c channels, h w image or grid, d code width.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smalti.core.codes import Codes, Layout, Level
from smalti.core.errors import UserError
from smalti.core.models import register
from smalti.tokenizers.base import Tokenizer, TokenizerOutput, require_size
from smalti.tokenizers.layers import conv
from smalti.tokenizers.layers.strips import in_bounded_memory
from smalti.tokenizers.quantizers.gumbel import GumbelQuantizer
from smalti.tokenizers.quantizers.linked import DECAY, REVIVE_BELOW, CodebookLearning, LinkedQuantizer


@dataclass(frozen=True)
class VQConfig:
    """What the family shares. The defaults are for 32x32 colour images on two CPU cores: 8x8 codes."""

    height: int = 32
    """Height of the images in pixels; others that divide by the downsampling work too."""
    width: int = 32
    """Width of the images in pixels."""
    image_channels: int = 3
    """3 for colour, 1 for grey."""
    widths: tuple[int, ...] = (64, 128)
    """Channels of each stage, from the image inwards; every stage halves the size."""
    residual_blocks: int = 2
    """Residual blocks of each stage, in encoder and decoder."""
    code_width: int = 64
    """Length of a codeword."""
    commitment_weight: float = 0.25
    """Weight of the commitment terms (beta in Eqs. 2, 5 and 6)."""
    codebook_learning: CodebookLearning = "ema"
    """How codewords learn: `ema`, as running means of what chooses them, or `gradient`, from the losses' codebook
    terms."""
    codebook_decay: float = DECAY
    """Decay of these means, and of the counts that say which codewords are dead; 0.99 for long trainings."""
    revive_below: float = REVIVE_BELOW
    """A codeword chosen less often than this share of its codebook's mean moves to where vectors are; 0 moves none."""
    kmeans_start: bool = True
    """Start the codebooks from what the untrained encoder makes of images, not from random codewords."""


class VQFamily(Tokenizer):
    """Sizes, and the start, of tokenizers made of convolutions and linked quantizers.

    Raises:
        UserError: if there is no stage, or the image size does not divide by the downsampling.
    """

    def __init__(self, config: VQConfig, *, downsampling: int) -> None:
        super().__init__(config)
        if not config.widths or min(config.widths) < 1:
            raise UserError(f"widths must name the channels of at least one stage, got {config.widths}")
        self.image_channels, self.downsampling = config.image_channels, downsampling
        require_size(config.height, config.width, downsampling)

    def quantizer_of(self, *, depth: int, branching: int, cosine: bool = False) -> LinkedQuantizer:
        """A quantizer that learns as the config says."""
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
        """The images as the convolutions are fastest with them.

        Raises:
            UserError: if their size does not divide by the downsampling.
        """
        require_size(images.shape[2], images.shape[3], self.downsampling)
        return images.contiguous(memory_format=torch.channels_last)

    def collapse_remedy(self) -> str:
        """Of what keeps codebooks in use, the first that the config does without."""
        if not self.config.kmeans_start:
            return "--kmeans-start, which starts the codebooks from the images"
        if not self.config.revive_below:
            return f"--revive-below {REVIVE_BELOW}, which moves dead codewords to where vectors are"
        return super().collapse_remedy()

    def recomputable(self) -> list[nn.Module]:
        """Every residual block."""
        return [module for module in self.modules() if isinstance(module, conv.ResidualBlock)]


class OneGrid(VQFamily):
    """A tokenizer of an encoder, a quantizer and a decoder, which the kinds make: one grid of codes.

    Both networks run in bounded memory, whatever the size of the images; `decode` under `torch.no_grad` only.
    """

    encoder: nn.Sequential
    quantizer: LinkedQuantizer | GumbelQuantizer
    decoder: nn.Sequential

    @property
    @abstractmethod
    def radices(self) -> tuple[int, ...]:
        """Of a code: a number for each layer of codebooks."""

    @property
    def layout(self) -> Layout:
        """One level, at 1 / `downsampling` of the image's size."""
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
        """Codebooks at the k-means centres of what an untrained encoder makes of these images, if so configured."""
        if self.config.kmeans_start:
            self.quantizer.init_from_data(self.encoder(self.prepared(images)))


@dataclass(frozen=True)
class VQVAEConfig(VQConfig):
    """Settings of a VQ-VAE."""

    codebook_size: int = 512
    """Codewords (m in the HR-VQVAE paper, K in VQ-VAE's)."""


@register
class VQVAE(OneGrid):
    """VQ-VAE (arXiv 1711.00937; Eqs. 1 and 2 of the HR-VQVAE paper): one grid of codes of one codebook.

    Raises:
        UserError: as `VQFamily` and `LinkedQuantizer` do.
    """

    kind: ClassVar[str] = "vqvae"
    config_class: ClassVar[type] = VQVAEConfig

    def __init__(self, config: VQConfig) -> None:
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
        # convolutions are 1.3-2x faster so, on CPUs and GPUs
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - torch's stub has no such overload

    @property
    def radices(self) -> tuple[int, ...]:
        """Of a code: a number for each layer of codebooks."""
        return (self.config.codebook_size,)

    def forward(self, images: Float[Tensor, "b c h w"]) -> TokenizerOutput:
        """See `TokenizerOutput`; the losses are `reconstruction`, `commitment` and, by gradients, `codebook`."""
        quantized = self.quantizer(self.encoder(self.prepared(images)))
        reconstruction = self.decoder(quantized.z_q).float()
        losses = {"reconstruction": F.mse_loss(reconstruction, images), **quantized.losses}  # Eqs. 2 and 5
        return TokenizerOutput(reconstruction, (quantized.codes,), losses)
