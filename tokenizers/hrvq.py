"""HR-VQVAE: encoder, linked codebooks, decoder. The search and the codebooks' losses are in `linked.py`.

Legend: b batch, c channels, h w image or grid, d code width.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smalti.codes import Codes, Layout, Level
from smalti.errors import UserError
from smalti.interfaces import Tokenizer, TokenizerOutput
from smalti.registry import register
from smalti.tokenizers import blocks
from smalti.tokenizers.linked import LinkedQuantizer


@dataclass(frozen=True)
class HRVQConfig:
    """Settings of an HR-VQVAE. The defaults are for 32x32 colour images on two CPU cores: 8x8 codes of 8*8*8."""

    height: int = 32
    """Height of the images in pixels; others that divide by 2**stages work too."""
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
    depth: int = 3
    """Layers of linked codebooks (n in the paper): digits of a code."""
    branching: int = 8
    """Codewords of each codebook (m in the paper): values of a digit."""
    commitment_weight: float = 0.25
    """Weight of the commitment terms (beta in Eqs. 5 and 6)."""


@register
class HRVQ(Tokenizer):
    """Hierarchical residual learning VQ-VAE (HR-VQVAE, Eqs. 3-6 and Fig. 2).

    Raises:
        UserError: if there is no stage, the image size does not divide by 2**stages, or as `LinkedQuantizer` does.
    """

    kind: ClassVar[str] = "hrvq"
    config_class: ClassVar[type] = HRVQConfig

    def __init__(self, config: HRVQConfig) -> None:
        super().__init__(config)
        if not config.widths or min(config.widths) < 1:
            raise UserError(f"widths must name the channels of at least one stage, got {config.widths}")
        self.image_channels, self.downsampling = config.image_channels, 2 ** len(config.widths)
        self._check(config.height, config.width)
        encoder, decoder = (
            make(
                image_channels=config.image_channels,
                widths=config.widths,
                residual_blocks=config.residual_blocks,
                code_width=config.code_width,
            )
            for make in (blocks.encoder, blocks.decoder)
        )
        self.encoder, self.decoder = encoder, decoder
        self.quantizer = LinkedQuantizer(
            code_width=config.code_width,
            depth=config.depth,
            branching=config.branching,
            commitment_weight=config.commitment_weight,
        )
        # convolutions are 1.3-2x faster so, on CPUs and GPUs
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - torch's stub has no such overload

    @property
    def layout(self) -> Layout:
        """One level of `branching**depth` codes at 1 / 2**stages of the image's size."""
        height, width = self.config.height // self.downsampling, self.config.width // self.downsampling
        return Layout((Level(height, width, radices=(self.config.branching,) * self.config.depth),))

    def forward(self, images: Float[Tensor, "b c h w"]) -> TokenizerOutput:
        """See `TokenizerOutput`; the losses are `reconstruction` (Eq. 5), `codebook` and `commitment`."""
        quantized = self.quantizer(self._embed(images))
        reconstruction = self.decoder(quantized.z_q).float()
        losses = {"reconstruction": F.mse_loss(reconstruction, images), **quantized.losses}  # Eq. 5
        return TokenizerOutput(reconstruction, (quantized.codes,), losses)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c h w"]) -> Codes:
        """See `Tokenizer.encode`."""
        return (self.quantizer.encode(self._embed(images)),)

    def decode(self, codes: Codes, digits: int | None = None) -> Float[Tensor, "b c h w"]:
        """See `Tokenizer.decode`."""
        (grid,) = codes
        return self.decoder(self.quantizer.lookup(grid, digits)).float().clamp(-1, 1)

    def start_from(self, images: Float[Tensor, "b c h w"]) -> None:
        """Codebooks at the k-means centres of what an untrained encoder makes of these images."""
        with torch.no_grad():
            self.quantizer.start_from(self._embed(images))

    def recomputable(self) -> list[nn.Module]:
        """Every residual block."""
        return [module for module in self.modules() if isinstance(module, blocks.ResidualBlock)]

    def _embed(self, images: Tensor) -> Tensor:
        """z_e, (b, d, h, w): xi^0 = E(x)."""
        self._check(*images.shape[2:])
        return self.encoder(images.contiguous(memory_format=torch.channels_last))

    def _check(self, height: int, width: int) -> None:
        if height % self.downsampling or width % self.downsampling:
            raise UserError(
                f"images of {height}x{width} do not divide by {self.downsampling}, this tokenizer's downsampling; "
                "crop or resize them"
            )
