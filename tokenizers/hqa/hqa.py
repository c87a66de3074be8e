"""HQA: a stack of quantized autoencoders, each trained on what the one below makes of an image, one by one.

The layers, and how images go up and down through them. How codes are drawn is in `stochastic.py`; the order of
training, bottom first, is the pipeline's: it trains a tokenizer of one layer, then one of two on top of it, and so on.

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

from smalti.core.codes import Codes, Layout, Level
from smalti.core.errors import UserError
from smalti.core.models import register
from smalti.core.randomness import Stream, derive, row_seeds
from smalti.tokenizers.base import Tokenizer, TokenizerOutput, require_size
from smalti.tokenizers.hqa.layer import HQAConfig, Stage
from smalti.tokenizers.layers.conv import ResidualBlock
from smalti.tokenizers.quantizers.stochastic import StochasticQuantizer, draw

_AT_ONCE = 512  # images, of the many that codebooks start from


@register
class HQA(Tokenizer):
    """Hierarchical Quantized Autoencoders (arXiv 2002.08111): only the top layer's codes are kept.

    Training trains the top layer alone; those below are frozen, whatever `train()` is told. Decoding goes down layer by
    layer: what a layer's decoder makes is quantized anew before the next one decodes it (Algorithm 1), by sampling if
    seeds are given, so that a code has many decodes. The codes of each lower layer are codes of the image too, at
    a higher rate: `layer` takes them.

    Raises:
        UserError: if there is no layer, or the image size does not divide by the downsampling.
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
        self.layers = nn.ModuleList(Stage(config, number) for number in range(len(config.widths)))
        self.layers[:-1].requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """The top layer's mode; those below stay in evaluation."""
        super().train(mode)
        self.layers[:-1].train(False)
        return self

    def collapse_remedy(self) -> str:
        """Resets, where the config does without."""
        return (
            super().collapse_remedy() if self.config.reset_below else "--reset-below 0.03, which moves dead codewords"
        )

    def recomputable(self) -> list[nn.Module]:
        """Every residual block of the top layer."""
        return [module for module in self.layers[-1].modules() if isinstance(module, ResidualBlock)]

    @classmethod
    def stages(cls, config: HQAConfig) -> Sequence[HQAConfig]:
        """See `Tokenizer.stages`: one layer more each time."""
        return [replace(config, widths=config.widths[: number + 1]) for number in range(len(config.widths))]

    def build_on(self, below: Tokenizer) -> None:
        """See `Tokenizer.build_on`."""
        for mine, theirs in zip(self.layers[:-1], cast(HQA, below).layers, strict=True):
            mine.load_state_dict(theirs.state_dict())

    @property
    def layout(self) -> Layout:
        """One level: the top layer's, at 1 / 2**layers of the image's size."""
        return self.layout_of(len(self.layers))

    def layout_of(self, layer: int) -> Layout:
        """The codes of one image at a layer.

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
        given: Float[Tensor, "b c2 _h _w"] | None = None,
    ) -> TokenizerOutput:
        """The top layer's losses: `reconstruction`, and those of its quantizer.

        The reconstruction of the images is None in training of layers above the first: nothing there needs it.

        Args:
            images: [-1, 1].
            seeds: of the images, which decide what is drawn in training; without, they draw the same each time.
            progress: of the training, from 0, where it is without, to 1.
            given: the features of the layer below, where they are known: it is frozen, so they do not change.
        """
        *_, top = self._layers
        seeds = row_seeds(0, torch.arange(len(images), device=images.device)) if seeds is None else seeds
        progress = torch.zeros(len(images), device=images.device) if progress is None else progress
        given = self._given(images) if given is None else given
        z_e = top.encode(given)
        more = (seeds, progress) if isinstance(top.quantizer, StochasticQuantizer) else ()
        quantized = top.quantizer(z_e, *more)
        made = top.decoder(quantized.z_q).float()
        if len(self.layers) > 1 and self.config.target == "codes":
            reconstruction_loss = F.cross_entropy(made, self._layers[-2].quantizer.encode(given))
        else:
            reconstruction_loss = F.mse_loss(made, top.normalized(given))
        reconstruction = None
        if len(self.layers) == 1:
            reconstruction = made
        elif not self.training:
            reconstruction = self.decode((quantized.codes,))
        return TokenizerOutput(
            reconstruction, (quantized.codes,), {"reconstruction": reconstruction_loss, **quantized.losses}
        )

    def features(self, images: Float[Tensor, "b c h w"], layer: int | None = None) -> Float[Tensor, "b d _h _w"]:
        """What a layer's encoder makes of images before it is quantized, z_e; the top layer's unless another is named.

        Raises:
            UserError: if there is no such layer, or the images' size does not divide by its downsampling.
        """
        number = self._number(layer)
        self._check(images.shape[2], images.shape[3], number)
        found = images
        for stage in self._layers[:number]:
            found = stage.encode(found).float()
        return found

    def quantize(
        self, z_e: Float[Tensor, "b d h w"], layer: int | None = None, seeds: Int64[Tensor, " b"] | None = None
    ) -> Int64[Tensor, "b h w"]:
        """The codes of a layer's features: the most probable, or with seeds, one for each image, samples (Eq. 3).

        Raises:
            UserError: if there is no such layer.
        """
        quantizer = self._layers[self._number(layer) - 1].quantizer
        return quantizer.encode(z_e, seeds) if isinstance(quantizer, StochasticQuantizer) else quantizer.encode(z_e)

    @torch.no_grad()
    def encode(
        self, images: Float[Tensor, "b c h w"], layer: int | None = None, seeds: Int64[Tensor, " b"] | None = None
    ) -> Codes:
        """See `Tokenizer.encode`: the top layer's codes, or another's; with seeds, one for each image, samples.

        Raises:
            UserError: as `features` does.
        """
        seeds = None if seeds is None else derive(seeds, Stream.HQA_ENCODE)
        return (self.quantize(self.features(images, layer), layer, seeds),)

    def decode(
        self,
        codes: Codes,
        digits: int | None = None,
        layer: int | None = None,
        seeds: Int64[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """See `Tokenizer.decode`: of the top layer's codes, or another's, by Algorithm 1.

        With seeds, one for each image, every layer below samples its codes, or of HAMs what its decoder predicts of
        them; without, it takes the most probable.

        Raises:
            UserError: if there is no such layer, or the codes have fewer digits.
        """
        (grid,) = codes
        number = self._number(layer)
        for above in range(number - 1, 0, -1):
            stage = self._layers[above]
            made = stage.decoder(stage.quantizer.lookup(grid, digits)).float()
            of_layer = None if seeds is None else derive(seeds, Stream.HQA_DECODE, above)
            if self.config.target == "codes":
                grid = draw(rearrange(made, "b k h w -> b h w k"), of_layer)
            else:
                grid = self.quantize(made * stage.deviation + stage.mean, above, of_layer)
        lowest = self._layers[0]
        return lowest.decoder(lowest.quantizer.lookup(grid, digits)).float().clamp(-1, 1)

    @torch.no_grad()
    def init_from_data(self, images: Float[Tensor, "b c h w"]) -> None:
        """See `Stage.init_from_data`: the top layer."""
        given = torch.cat([self._given(part) for part in images.split(_AT_ONCE)])
        self._layers[-1].init_from_data(given, self.config)

    @torch.no_grad()
    def reconstructions(self, images: Float[Tensor, "b c h w"]) -> dict[str, Float[Tensor, "b c h w"]]:
        """See `Tokenizer.reconstructions`: from each layer's codes, the coarsest first."""
        return {
            f"layer {layer}, {str(self.layout_of(layer)).replace('×', 'x')}": self.decode(
                self.encode(images, layer), layer=layer
            )
            for layer in range(len(self.layers), 0, -1)
        }

    @property
    def _layers(self) -> list[Stage]:
        """From the image upwards."""
        return [cast(Stage, layer) for layer in self.layers]

    @torch.no_grad()
    def _given(self, images: Tensor) -> Tensor:
        """What the top layer is given of images: the features of the layer below."""
        return self.features(images, len(self.layers) - 1) if len(self.layers) > 1 else images

    def _number(self, layer: int | None) -> int:
        number = len(self.layers) if layer is None else layer
        if not 1 <= number <= len(self.layers):
            raise UserError(f"this tokenizer has layers 1 to {len(self.layers)}; there is no layer {layer}")
        return number

    @staticmethod
    def _check(height: int, width: int, layers: int) -> None:
        require_size(height, width, 2**layers, f"the downsampling of {layers} layers")
