"""VQ-VAE-2: codes at several resolutions, each level conditioned on the coarser ones.

Codebook search, losses and updates are in `quantizers/linked.py`, the convolutions in `layers/conv.py`.

Legend: b batch, c channels, h w image or grid, d code width, l level, the coarsest first.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smalti.core.codes import Codes, Digits, Layout, Level
from smalti.core.errors import UserError
from smalti.core.models import register
from smalti.tokenizers.base import PartName, TokenizerOutput
from smalti.tokenizers.layers import conv
from smalti.tokenizers.layers.strips import in_bounded_memory
from smalti.tokenizers.quantizers.linked import LinkedQuantizer
from smalti.tokenizers.vq.vqvae import VQConfig, VQFamily


@dataclass(frozen=True)
class VQVAE2Config(VQConfig):
    """Settings of a VQ-VAE-2. The defaults give 4x4 coarse and 8x8 fine codes, with 512 codewords per level."""

    codebook_size: int = 512
    """Number of codewords per level."""
    levels: int = 2
    """Resolutions of codes, at least 2. The finest is at 1 / 2**stages of the image size, each coarser one at half the
    size of the next."""


@register
class VQVAE2(VQFamily[VQVAE2Config]):
    """VQ-VAE-2 (arXiv 1906.00446, Algorithm 1 and Fig. 2).

    The coarsest level is quantized first. Each finer level is conditioned on all coarser ones: their codewords are
    decoded to features of its resolution, concatenated with its own features, and quantized together. The image is
    decoded from the codewords of all levels, upsampled to the finest grid.

    Raises:
        UserError: if `levels` or `codebook_size` is below 2, or as `VQFamily` and `LinkedQuantizer` do.
    """

    kind: ClassVar[str] = "vqvae2"
    config_class: ClassVar[type] = VQVAE2Config
    parts: ClassVar[Mapping[PartName, tuple[str, ...]]] = {
        "encoder": ("encoder", "encoders", "to_code", "conditions", "upsamplings"),
        "decoder": ("decoder",),
        "codebook": ("quantizers",),
    }

    @classmethod
    def unused_settings(cls, config: VQVAE2Config) -> tuple[str, set[str]]:
        """Returns the setting of several layers of codebooks."""
        return "a flat codebook", {"combined_commitment_weight"}

    def __init__(self, config: VQVAE2Config) -> None:
        if config.levels < 2:
            raise UserError(f"--levels must be at least 2, not {config.levels}; --tokenizer vqvae has one")
        if config.codebook_size < 2:
            raise UserError(f"--codebook-size must be at least 2, not {config.codebook_size}")
        super().__init__(config, downsampling=2 ** (len(config.widths) + config.levels - 1))
        width, d, finer = config.widths[-1], config.code_width, range(config.levels - 1)
        shape = {"residual_blocks": config.residual_blocks}
        image = {"image_channels": config.image_channels, "widths": config.widths, **shape}
        half = {"image_channels": width, "widths": (width,), **shape}  # networks between two neighbouring levels
        self.encoder = conv.encoder(**image, code_width=width)
        self.encoders = nn.ModuleList(conv.encoder(**half, code_width=width) for _ in finer)  # finest first
        self.to_code = nn.ModuleList(
            nn.Conv2d(width if coarsest else 2 * width, d, 1) for coarsest in (True, *(False for _ in finer))
        )
        self.quantizers = nn.ModuleList(
            cast(LinkedQuantizer, self.quantizer_of("flat", (config.codebook_size,))) for _ in range(config.levels)
        )
        self.conditions = nn.ModuleList(conv.decoder(**half, code_width=(1 + level) * d) for level in finer)
        self.upsamplings = nn.ModuleList(
            nn.ConvTranspose2d((1 + level) * d, (1 + level) * d, 4, 2, 1) for level in finer
        )
        self.decoder = conv.decoder(**image, code_width=config.levels * d)
        self.use_channels_last()

    @property
    def layout(self) -> Layout:
        """Levels of `codebook_size` codes, coarsest first, each twice as high and wide as the one before."""
        height, width = self.config.height // self.downsampling, self.config.width // self.downsampling
        grids = ((height * 2**level, width * 2**level) for level in range(self.config.levels))
        return Layout(tuple(Level(h, w, radices=(self.config.codebook_size,)) for h, w in grids))

    def forward(self, images: Float[Tensor, "b c h w"]) -> TokenizerOutput:
        """Computes the losses `reconstruction` (see `reconstruction_loss`) and those of all levels' quantizers."""
        outputs = []

        def quantize(quantizer: LinkedQuantizer, z_e: Tensor) -> Tensor:
            outputs.append(quantizer(z_e))
            return outputs[-1].z_q

        reconstruction = self.decoder(self._quantize_levels(images, quantize)).float()
        losses = {"reconstruction": self.reconstruction_loss(reconstruction, images)}
        for name in outputs[0].losses:
            losses[name] = torch.stack([output.losses[name] for output in outputs]).sum()
        return TokenizerOutput(reconstruction, tuple(output.codes for output in outputs), losses)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c h w"]) -> Codes:
        """See `Tokenizer.encode`."""
        codes: list[Tensor] = []

        def quantize(quantizer: LinkedQuantizer, z_e: Tensor) -> Tensor:
            codes.append(quantizer.encode(z_e))
            return quantizer.lookup(codes[-1])

        self._quantize_levels(images, quantize)
        return tuple(codes)

    def decode(self, codes: Codes, digits: Digits | None = None) -> Float[Tensor, "b c h w"]:
        """See `Tokenizer.decode`.

        Raises:
            UserError: also if a grid is not twice as high and wide as that of the next coarser level.
        """
        for level, (coarser, finer) in enumerate(pairwise(grid.shape[1:] for grid in codes), 1):
            if finer != (twice := (2 * coarser[0], 2 * coarser[1])):
                raise UserError(f"level {level} has a grid of {tuple(finer)}, but the coarser level one for {twice}")
        codewords = [quantizer.lookup(grid, digits) for quantizer, grid in zip(self._quantizers, codes, strict=True)]
        combined = codewords[0]
        for upsampling, z_q in zip(self.upsamplings, codewords[1:], strict=True):
            combined = torch.cat([upsampling(combined), z_q], 1)
        return in_bounded_memory(self.decoder, combined).float().clamp(-1, 1)

    @torch.no_grad()
    def init_from_data(self, images: Float[Tensor, "b c h w"]) -> None:
        """Initializes the codebooks by k-means on the encoders' outputs for these images, if so configured."""
        if self.starts_from_data():
            self.init_new_from_data(images, ())

    @torch.no_grad()
    def init_new_from_data(self, images: Float[Tensor, "b c h w"], taken: Collection[str]) -> None:
        """Initializes all codebooks, whose size is one for all levels.

        The coarsest level comes first, since the finer ones are conditioned on its codewords.
        """

        def quantize(quantizer: LinkedQuantizer, z_e: Tensor) -> Tensor:
            quantizer.init_from_data(z_e)
            return quantizer.lookup(quantizer.encode(z_e))

        self._quantize_levels(images, quantize)

    @property
    def _quantizers(self) -> list[LinkedQuantizer]:
        """Quantizers of the levels, coarsest first."""
        return [cast(LinkedQuantizer, quantizer) for quantizer in self.quantizers]

    def _quantize_levels(self, images: Tensor, quantize: Callable[[LinkedQuantizer, Tensor], Tensor]) -> Tensor:
        """Applies `quantize` level by level, coarsest first; returns the decoder's input, (b, levels * d, h, w)."""
        features = [in_bounded_memory(self.encoder, self.prepared(images))]
        for encoder in self.encoders:
            features.insert(0, encoder(features[0]))
        combined = quantize(self._quantizers[0], self.to_code[0](features[0]))
        finer = zip(
            features[1:], self.conditions, self.upsamplings, self.to_code[1:], self._quantizers[1:], strict=True
        )
        for feature, condition, upsampling, to_code, quantizer in finer:
            z_q = quantize(quantizer, to_code(torch.cat([feature, condition(combined)], 1)))
            combined = torch.cat([upsampling(combined), z_q], 1)
        return combined
