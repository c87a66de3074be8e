"""HQA: a stack of vector-quantized autoencoders, each trained on the features of the one below.

A single layer is in `layer.py`, its stochastic quantizer in `quantizers/stochastic.py`. Training is layer by layer,
bottom first: `Tokenizer.stages` names a tokenizer of one layer, then one of two layers on top of it, and so on.

Legend: b batch, c channels, h w image or grid, d code width, k codebook size. Layers are numbered from 1, at the image.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Self, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.core.codes import Codes, Digits, Layout, Level
from smalti.core.errors import UserError
from smalti.core.models import register
from smalti.core.randomness import Stream, derive, row_seeds
from smalti.tokenizers.base import Tokenizer, TokenizerOutput, require_size
from smalti.tokenizers.hqa.layer import HQAConfig, HQALayer
from smalti.tokenizers.layers.conv import ResidualBlock
from smalti.tokenizers.quantizers.stochastic import StochasticQuantizer, sample_codes

_INIT_BATCH_SIZE = 512  # images encoded at a time to initialize codebooks


@register
class HQA(Tokenizer[HQAConfig]):
    """Hierarchical Quantized Autoencoders (arXiv 2002.08111): an image is stored as the top layer's codes only.

    Only the top layer is trained; the layers below are frozen and stay in evaluation mode. Decoding runs from the top
    layer down: each decoder's output is quantized again before the next decoder (Algorithm 1). With seeds these codes
    are sampled, so one code decodes to many images. The codes of a lower layer represent the image at a higher rate;
    the argument `layer` of several methods selects them.

    Deviation: without seeds, encoding and decoding take the most probable codes, so that equal images have equal codes.
    The paper samples at test time (Section 5.1).

    Raises:
        UserError: if there is no layer, or the image size is not divisible by the downsampling.
    """

    kind: ClassVar[str] = "hqa"
    config_class: ClassVar[type] = HQAConfig
    uses: ClassVar[tuple[str, ...]] = ("seeds", "progress")

    def __init__(self, config: HQAConfig) -> None:
        super().__init__(config)
        if not config.widths or min(config.widths) < 1:
            raise UserError(f"widths must name the channels of at least one layer, got {config.widths}")
        self.image_channels, self.downsampling = config.image_channels, 2 ** len(config.widths)
        self._check(config.height, config.width, len(config.widths))
        self.layers = nn.ModuleList(HQALayer(config, number) for number in range(len(config.widths)))
        self.layers[:-1].requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of the top layer; the layers below stay in evaluation mode."""
        super().train(mode)
        self.layers[:-1].train(False)
        return self

    def collapse_remedy(self) -> str:
        """Names the reset of dead codewords if the config leaves it off."""
        return (
            super().collapse_remedy() if self.config.reset_below else "--reset-below 0.03, which revives dead codewords"
        )

    def recomputable(self) -> list[nn.Module]:
        """Returns every residual block of the top layer."""
        return [module for module in self.layers[-1].modules() if isinstance(module, ResidualBlock)]

    @classmethod
    def stages(cls, config: HQAConfig) -> Sequence[HQAConfig]:
        """Returns the configs of the first layer alone, the first two layers, and so on; see `Tokenizer.stages`."""
        return [replace(config, widths=config.widths[: number + 1]) for number in range(len(config.widths))]

    @classmethod
    def unused_settings(cls, config: HQAConfig) -> tuple[str, set[str]]:
        """Returns the settings of the stochastic posterior if the codewords are the nearest."""
        of_stochastic = {"probabilistic", "latent_weight", "upper_latent_weight", "temperature"}
        return f"--posterior {config.posterior}", of_stochastic if config.posterior == "nearest" else set()

    def build_on(self, below: Tokenizer) -> None:
        """Copies the trained layers of `below` into all layers but the top one; see `Tokenizer.build_on`."""
        for layer, trained in zip(self.layers[:-1], cast(HQA, below).layers, strict=True):
            layer.load_state_dict(trained.state_dict())

    @property
    def layout(self) -> Layout:
        """One level: the top layer's codes, at 1 / 2**layers of the image size."""
        return self.layout_of(len(self.layers))

    def layout_of(self, layer: int) -> Layout:
        """Returns the layout of one image's codes at a layer.

        Raises:
            UserError: if there is no such layer.
        """
        scale = 2 ** self._number(layer)
        return Layout((Level(self.config.height // scale, self.config.width // scale, (self.config.codebook_size,)),))

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        seeds: Int64[Tensor, " b"] | None = None,
        progress: Float[Tensor, " b"] | None = None,
        features: Float[Tensor, "b c2 _h _w"] | None = None,
    ) -> TokenizerOutput:
        """Computes the top layer's losses: `reconstruction`, and those of its quantizer.

        In training of layers above the first, the output has no reconstruction of the images: no loss needs it.

        Args:
            images: images in [-1, 1].
            seeds: one per image, for the samples in training; without seeds every call samples the same.
            progress: training progress from 0 to 1, for the temperature; 0 if not given.
            features: cached features of the layer below, which is frozen; computed from the images if not given.
        """
        *_, top = self._layers
        seeds = row_seeds(0, torch.arange(len(images), device=images.device)) if seeds is None else seeds
        progress = torch.zeros(len(images), device=images.device) if progress is None else progress
        features = self._top_input(images) if features is None else features
        z_e = top.encode(features)
        sampling = (seeds, progress) if isinstance(top.quantizer, StochasticQuantizer) else ()
        quantized = top.quantizer(z_e, *sampling)
        decoded = top.decoder(quantized.z_q).float()
        if len(self.layers) > 1 and self.config.target == "codes":
            reconstruction_loss = F.cross_entropy(decoded, self._layers[-2].quantizer.encode(features))
        else:
            reconstruction_loss = F.mse_loss(decoded, top.normalized(features))
        reconstruction = None
        if len(self.layers) == 1:
            reconstruction = decoded
        elif not self.training:
            reconstruction = self.decode((quantized.codes,))
        return TokenizerOutput(
            reconstruction, (quantized.codes,), {"reconstruction": reconstruction_loss, **quantized.losses}
        )

    def features(self, images: Float[Tensor, "b c h w"], layer: int | None = None) -> Float[Tensor, "b d _h _w"]:
        """Returns z_e, the encoder output of a layer (default: the top layer), before quantization.

        Raises:
            UserError: if there is no such layer, or the images' size is not divisible by its downsampling.
        """
        number = self._number(layer)
        self._check(images.shape[2], images.shape[3], number)
        features = images
        for each in self._layers[:number]:
            features = each.encode(features).float()
        return features

    def quantize(
        self, z_e: Float[Tensor, "b d h w"], layer: int | None = None, seeds: Int64[Tensor, " b"] | None = None
    ) -> Int64[Tensor, "b h w"]:
        """Quantizes a layer's features: to the most probable codes, or to samples (Eq. 3) if seeds are given.

        Raises:
            UserError: if there is no such layer.
        """
        quantizer = self._layers[self._number(layer) - 1].quantizer
        return quantizer.encode(z_e, seeds) if isinstance(quantizer, StochasticQuantizer) else quantizer.encode(z_e)

    @torch.no_grad()
    def encode(
        self, images: Float[Tensor, "b c h w"], layer: int | None = None, seeds: Int64[Tensor, " b"] | None = None
    ) -> Codes:
        """Encodes images to the codes of a layer (default: the top layer); see `Tokenizer.encode`.

        With seeds, one per image, the codes are sampled from the posterior (Eq. 3).

        Raises:
            UserError: as `features` does.
        """
        seeds = None if seeds is None else derive(seeds, Stream.HQA_ENCODE)
        return (self.quantize(self.features(images, layer), layer, seeds),)

    def decode(
        self,
        codes: Codes,
        digits: Digits | None = None,
        layer: int | None = None,
        seeds: Int64[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Decodes the codes of a layer (default: the top layer) by Algorithm 1; see `Tokenizer.decode`.

        With seeds, one per image, the codes of each lower layer are sampled, from its posterior (HQA) or from the
        prediction of the decoder above it (HAMs). Without seeds they are the most probable ones.

        Raises:
            UserError: if there is no such layer, or the codes do not have these digits.
        """
        (grid,) = codes
        number = self._number(layer)
        for lower in range(number - 1, 0, -1):  # layer whose codes are decoded next
            upper = self._layers[lower]  # the layer above it, since layers are numbered from 1
            decoded = upper.decoder(upper.quantizer.lookup(grid, digits)).float()
            layer_seeds = None if seeds is None else derive(seeds, Stream.HQA_DECODE, lower)
            if self.config.target == "codes":
                grid = sample_codes(rearrange(decoded, "b k h w -> b h w k"), layer_seeds)
            else:
                grid = self.quantize(decoded * upper.deviation + upper.mean, lower, layer_seeds)
        lowest = self._layers[0]
        return lowest.decoder(lowest.quantizer.lookup(grid, digits)).float().clamp(-1, 1)

    @torch.no_grad()
    def init_from_data(self, images: Float[Tensor, "b c h w"]) -> None:
        """Initializes the top layer from images; see `HQALayer.init_from_data`."""
        inputs = torch.cat([self._top_input(batch) for batch in images.split(_INIT_BATCH_SIZE)])
        self._layers[-1].init_from_data(inputs, self.config)

    @torch.no_grad()
    def reconstructions(self, images: Float[Tensor, "b c h w"]) -> dict[str, Float[Tensor, "b c h w"]]:
        """Decodes the codes of each layer, coarsest first; see `Tokenizer.reconstructions`."""
        return {
            f"layer {layer}, {str(self.layout_of(layer)).replace('×', 'x')}": self.decode(
                self.encode(images, layer), layer=layer
            )
            for layer in range(len(self.layers), 0, -1)
        }

    @property
    def _layers(self) -> list[HQALayer]:
        """Layers from the image upwards, typed."""
        return [cast(HQALayer, layer) for layer in self.layers]

    @torch.no_grad()
    def _top_input(self, images: Tensor) -> Tensor:
        """Returns the top layer's input: the features of the layer below, or the images if there is none."""
        return self.features(images, len(self.layers) - 1) if len(self.layers) > 1 else images

    def _number(self, layer: int | None) -> int:
        number = len(self.layers) if layer is None else layer
        if not 1 <= number <= len(self.layers):
            raise UserError(f"this tokenizer has layers 1 to {len(self.layers)}; there is no layer {layer}")
        return number

    @staticmethod
    def _check(height: int, width: int, layers: int) -> None:
        require_size(height, width, 2**layers, f"the downsampling of {layers} layers")
