"""VQ-VAE, and the base classes that the VQ-VAE family shares: settings, checks of image sizes, one grid of codes.

Codebook search, losses and updates are in `quantizers/linked.py`, the convolutions in `layers/conv.py`.

Legend: b batch, c channels, h w image or grid, d code width.
"""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.core.codes import Codes, Digits, Layout, Level
from smalti.core.config import added, replacing
from smalti.core.errors import UserError
from smalti.core.models import register
from smalti.tokenizers.base import PartName, Tokenizer, TokenizerOutput, require_size
from smalti.tokenizers.layers import conv
from smalti.tokenizers.layers.strips import in_bounded_memory
from smalti.tokenizers.quantizers.linked import DECAY, REVIVE_BELOW, CodebookLearning, LinkedQuantizer, QuantizerOutput
from smalti.tokenizers.quantizers.registry import (
    QUANTIZERS,
    Quantizer,
    QuantizerName,
    build_quantizer,
    code_radices,
    unused_settings,
)
from smalti.tokenizers.quantizers.residual import ResidualQuantizer
from smalti.tokenizers.quantizers.tree import LayerWeights


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
    reconstruction_loss: Literal["mse", "l1"] = added("mse")
    """Reconstruction loss: `mse`, the mean squared error of the papers; or `l1`, the mean absolute error, for sharper
    edges at a higher squared error. `vqgan` has l1 by default, the others mse."""
    commitment_weight: LayerWeights = 0.25
    """Weight of the commitment loss, beta: one value, or a value for each layer of linked codebooks, the first one
    first. Raise it if encoder outputs drift away from the codewords."""
    combined_commitment_weight: float | None = added(None)
    """With several layers of codebooks: weight of the commitment to the sum of their codewords [default: that of the
    first layer]."""
    codebook_learning: CodebookLearning = "ema"
    """Update of codewords: `ema`, as exponential moving averages of the vectors that choose them, or `gradient`, by the
    codebook loss."""
    codebook_decay: float = DECAY
    """Decay of the moving averages of codewords and of their use. Raise it to 0.99 for long trainings."""
    revive_below: float = REVIVE_BELOW
    """Against codebook collapse: a codeword used less than this share of its codebook's mean is dead, and moves to an
    encoder output. 0 revives none."""
    codebook_init: Literal["kmeans", "uniform", "unit-variance", "scaled"] = replacing(
        "kmeans_start", on="kmeans", off="uniform", default="kmeans"
    )
    """Initialization of the codebooks: `kmeans` takes k-means centres of the untrained encoder's outputs. The others
    are uniform random numbers, for comparisons: `uniform` up to ±0.5**i in layer i, counted from 0, `unit-variance` up
    to ±sqrt(3/D) for codewords of length D, `scaled` up to ±1/K for K codewords in a codebook."""
    gradient: Literal["straight-through", "rotation"] = added("straight-through")
    """Gradient through the choice of a codeword: `straight-through` copies it to the encoder's output; `rotation` also
    applies to it the rotation and scaling that map the encoder output to the codeword (the rotation trick)."""


VQConfigT = TypeVar("VQConfigT", bound=VQConfig)


class VQFamily(Tokenizer[VQConfigT]):
    """Base class of tokenizers with convolutional networks: checks sizes, builds quantizers.

    Raises:
        UserError: if there is no stage, or the image size is not divisible by the downsampling.
    """

    training_settings: ClassVar[frozenset[str]] = frozenset(
        {
            *("commitment_weight", "combined_commitment_weight", "codebook_learning", "codebook_decay"),
            *("revive_below", "codebook_init", "gradient", "reconstruction_loss"),
        }
    )

    def __init__(self, config: VQConfigT, *, downsampling: int) -> None:
        super().__init__(config)
        if not config.widths or min(config.widths) < 1:
            raise UserError(f"widths must name the channels of at least one stage, got {config.widths}")
        self.image_channels, self.downsampling = config.image_channels, downsampling
        require_size(config.height, config.width, downsampling)

    def quantizer_of(self, name: str, radices: tuple[int, ...]) -> Quantizer:
        """Returns a quantizer with the config's settings."""
        return build_quantizer(name, code_width=self.config.code_width, radices=radices, config=self.config)

    def use_channels_last(self) -> None:
        """Stores the weights in channels-last layout, in which convolutions are 1.3-2 times faster, also on GPUs."""
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - torch's stub has no such overload

    def prepared(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Checks the size of images and returns them in channels-last layout, in which the convolutions are faster.

        Raises:
            UserError: if their size is not divisible by the downsampling.
        """
        require_size(images.shape[2], images.shape[3], self.downsampling)
        return images.contiguous(memory_format=torch.channels_last)

    def reconstruction_loss(
        self, reconstruction: Float[Tensor, "b c h w"], images: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, ""]:
        """Returns the mean squared error (HR-VQVAE, Eqs. 2 and 5) or the mean absolute error, as configured."""
        error = F.mse_loss if self.config.reconstruction_loss == "mse" else F.l1_loss
        return error(reconstruction, images)

    def freeze(self, parts: Sequence[PartName]) -> None:
        """See `Tokenizer.freeze`. Codebooks that are frozen have no moving averages either, and no revival."""
        super().freeze(parts)
        for module in self.modules():
            if isinstance(module, LinkedQuantizer):
                module.frozen = "codebook" in parts

    def starts_from_data(self, *, tuned: bool = False) -> bool:
        """See `Tokenizer.starts_from_data`. New codebooks of a trained encoder start from data however configured."""
        return tuned or self.config.codebook_init == "kmeans"

    def collapse_remedy(self) -> str:
        """Names the first remedy against codebook collapse that the config leaves off."""
        if self.config.codebook_init != "kmeans":
            return "--codebook-init kmeans, which initializes the codebooks from images"
        if not self.config.revive_below:
            return f"--revive-below {REVIVE_BELOW}, which revives dead codewords"
        return super().collapse_remedy()

    def recomputable(self) -> list[nn.Module]:
        """Returns every residual block."""
        return [module for module in self.modules() if isinstance(module, conv.ResidualBlock)]


@dataclass(frozen=True)
class OneGridConfig(VQConfig):
    """Settings that tokenizers with one grid of codes share."""

    quantizer: QuantizerName = "linked"
    """The quantizer; each kind of tokenizer has its own choice and default."""


@dataclass(frozen=True)
class OneCodebookConfig(OneGridConfig):
    """Settings of the quantizers without layers of codebooks."""

    levels: tuple[int, ...] = added(())
    """With `fsq`: levels of each dimension, such as `8 5 5 5`; their product is the number of codes [default: those of
    the paper for the number of codes]."""
    kl_weight: float = added(1e-8)
    """With `gumbel`: weight of the KL divergence of the codes' distribution from the uniform one. Raise it against
    codebook collapse."""
    temperature: float = added(1.0)
    """With `gumbel`: temperature of the Gumbel-softmax. Lower it for gradients of harder samples."""
    entropy_weight: float = added(0.05)
    """With `dot` and `lfq`: weight of the entropy loss. Raise it against codebook collapse."""


OneGridConfigT = TypeVar("OneGridConfigT", bound=OneGridConfig)


class OneGrid(VQFamily[OneGridConfigT]):
    """Base class of tokenizers with one grid of codes. Subclasses build `encoder`, `quantizer` and `decoder`.

    `encode` runs in bounded memory, whatever the size of the images; so does `decode` under `torch.no_grad`.
    """

    parts: ClassVar[Mapping[PartName, tuple[str, ...]]] = {
        "encoder": ("encoder",),
        "decoder": ("decoder",),
        "codebook": ("quantizer",),
    }

    training_settings: ClassVar[frozenset[str]] = VQFamily.training_settings | {
        *("kl_weight", "temperature", "entropy_weight"),
    }

    encoder: nn.Sequential
    quantizer: Quantizer
    decoder: nn.Sequential

    @classmethod
    def unused_settings(cls, config: OneGridConfigT) -> tuple[str, set[str]]:
        """Returns the settings that the quantizer does not use."""
        levels = getattr(config, "levels", ())  # HR-VQVAE has none
        return f"--quantizer {config.quantizer}", unused_settings(config.quantizer, levels)

    @property
    @abstractmethod
    def radices(self) -> tuple[int, ...]:
        """Radices of a code, those of the quantizer."""

    @property
    def layout(self) -> Layout:
        """One level, at 1 / `downsampling` of the image size."""
        height, width = self.config.height // self.downsampling, self.config.width // self.downsampling
        return Layout((Level(height, width, self.radices),))

    def quantize(self, z_e: Float[Tensor, "b d h w"], seeds: Int64[Tensor, " b"] | None) -> QuantizerOutput:
        """Quantizes the encoder's outputs; a quantizer that samples does so if there are seeds."""
        if seeds is None or not QUANTIZERS[self.config.quantizer].samples:
            return self.quantizer(z_e)
        return self.quantizer(z_e, seeds)

    def forward(self, images: Float[Tensor, "b c h w"], seeds: Int64[Tensor, " b"] | None = None) -> TokenizerOutput:
        """Computes the losses `reconstruction` (see `reconstruction_loss`) and those of the quantizer.

        VQ-GAN's perceptual and adversarial losses are computed in `vqgan/losses.py`.

        Args:
            images: images in [-1, 1].
            seeds: one per image, for a quantizer that samples; without seeds it takes the most probable codes.
        """
        quantized = self.quantize(self.encoder(self.prepared(images)), seeds)
        reconstruction = self.decoder(quantized.z_q).float()
        losses = {"reconstruction": self.reconstruction_loss(reconstruction, images), **quantized.losses}
        return TokenizerOutput(reconstruction, (quantized.codes,), losses)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c h w"]) -> Codes:
        """See `Tokenizer.encode`."""
        return (self.quantizer.encode(in_bounded_memory(self.encoder, self.prepared(images))),)

    def decode(self, codes: Codes, digits: Digits | None = None) -> Float[Tensor, "b c h w"]:
        """See `Tokenizer.decode`."""
        (grid,) = codes
        return in_bounded_memory(self.decoder, self.quantizer.lookup(grid, digits)).float().clamp(-1, 1)

    @torch.no_grad()
    def init_from_data(self, images: Float[Tensor, "b c h w"]) -> None:
        """Initializes the codebooks by k-means on the encoder's outputs for these images, if so configured."""
        if self.starts_from_data():
            self.quantizer.init_from_data(self.encoder(self.prepared(images)))

    @torch.no_grad()
    def init_new_from_data(self, images: Float[Tensor, "b c h w"], taken: Collection[str]) -> None:
        """Initializes codebooks from the first layer that was not taken; codewords of later layers build on it."""
        z_e = self.encoder(self.prepared(images))
        if isinstance(self.quantizer, LinkedQuantizer | ResidualQuantizer):
            layers = [name for name in self.state_dict() if name.rpartition(".")[2].startswith("codebook_")]
            self.quantizer.init_from_data(z_e, first=len(list(takewhile(lambda name: name in taken, layers))))
        else:
            self.quantizer.init_from_data(z_e)

    def starts_from_data(self, *, tuned: bool = False) -> bool:
        """See `Tokenizer.starts_from_data`. Some quantizers never do."""
        return super().starts_from_data(tuned=tuned) and QUANTIZERS[self.config.quantizer].starts_from_data

    def facts(self) -> dict[str, str]:
        """See `Tokenizer.facts`."""
        return {**super().facts(), "quantizer": self.config.quantizer}

    @torch.no_grad()
    def reconstructions(self, images: Float[Tensor, "b c h w"]) -> dict[str, Float[Tensor, "b c h w"]]:
        """See `Tokenizer.reconstructions`. First digits are decoded only if digits go from coarse to fine."""
        if QUANTIZERS[self.config.quantizer].coarse_to_fine:
            return super().reconstructions(images)
        return {f"from {str(self.layout).replace('×', 'x')}": self.decode(self.encode(images))}

    def collapse_remedy(self) -> str:
        """Names the quantizer's own remedy against codebook collapse, or that of `VQFamily` if it revives codewords."""
        registered = QUANTIZERS[self.config.quantizer]
        if "revive_below" in registered.settings:
            return super().collapse_remedy()
        return registered.remedy or Tokenizer.collapse_remedy(self)


class ConvolutionalVQ(OneGrid[OneGridConfigT]):
    """Base class of VQ-VAE and HR-VQVAE, which differ only in the `radices` of their codes.

    Raises:
        UserError: as `VQFamily` and the quantizers do.
    """

    def __init__(self, config: OneGridConfigT) -> None:
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
        self.quantizer = self.quantizer_of(config.quantizer, self.radices)
        self.use_channels_last()


@dataclass(frozen=True)
class VQVAEConfig(OneCodebookConfig):
    """Settings of a VQ-VAE."""

    codebook_size: int = 512
    """Number of codewords, or of codes for the quantizers without a codebook."""
    quantizer: Literal["flat", "cosine", "dot", "simvq", "gumbel", "fsq", "lfq"] = added("flat")
    """`flat` takes the nearest codeword, `cosine` that of largest cosine similarity, for a small --code-width such as
    8; `dot` that of largest inner product (IBQ), `simvq` the nearest of mapped frozen codewords, both for large
    codebooks; `gumbel` samples codes by the Gumbel-softmax; `fsq` rounds and `lfq` takes signs, without a codebook."""


@register
class VQVAE(ConvolutionalVQ[VQVAEConfig]):
    """VQ-VAE (arXiv 1711.00937; HR-VQVAE, Eqs. 1 and 2): one grid of codes, by default from a flat codebook.

    The HR-VQVAE paper calls the codebook size m, the VQ-VAE paper K.

    Raises:
        UserError: as `ConvolutionalVQ` does.
    """

    kind: ClassVar[str] = "vqvae"
    config_class: ClassVar[type] = VQVAEConfig
    uses: ClassVar[tuple[str, ...]] = ("seeds",)

    @property
    def radices(self) -> tuple[int, ...]:
        """Radices of a code: the codebook size alone, FSQ's levels, or LFQ's bits."""
        return code_radices(self.config.quantizer, (self.config.codebook_size,), self.config.levels)
