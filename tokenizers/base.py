"""What a tokenizer promises to the rest of smalti. The networks are in the wings; the commands know only this."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from smalti.core.codes import Codes, Layout
from smalti.core.errors import UserError
from smalti.core.models import Checkpointed, Family
from smalti.training.config import FitConfig, Phase


@dataclass(frozen=True)
class TokenizerOutput:
    """What training on a batch of images gives.

    Attributes:
        reconstruction: images, [-1, 1]; None where training makes none.
        codes: one tensor per level.
        losses: scalar terms by name, already weighted; their sum is the objective.
    """

    reconstruction: Float[Tensor, "b c h w"] | None
    codes: Codes
    losses: dict[str, Float[Tensor, ""]]


def require_size(height: int, width: int, downsampling: int, whose: str = "this tokenizer's downsampling") -> None:
    """Refuses images of a size that does not divide by a tokenizer's downsampling.

    Raises:
        UserError: saying `whose` that is.
    """
    if height % downsampling or width % downsampling:
        raise UserError(f"images of {height}x{width} do not divide by {downsampling}, {whose}; crop or resize them")


class Tokenizer(Checkpointed, ABC):
    """Stage one: images in [-1, 1] to grids of codes and back.

    A tokenizer works at any height and width divisible by `downsampling`; `layout` is that of the size it was made for.
    `forward(images)` returns a `TokenizerOutput`.

    Attributes:
        uses: what else of a batch `forward` takes, by name, after the images: `seeds`, `progress`.
    """

    family: ClassVar[Family] = "tokenizer"
    uses: ClassVar[tuple[str, ...]] = ()
    image_channels: int
    downsampling: int

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """The levels of codes of one image of the size in the config."""

    @abstractmethod
    def encode(self, images: Float[Tensor, "b c h w"]) -> Codes:
        """Codes of images; the same codes for the same images."""

    @abstractmethod
    def decode(self, codes: Codes, digits: int | None = None) -> Float[Tensor, "b c h w"]:
        """Images of codes, in [-1, 1]; with `digits`, of the first digits of each code only.

        Raises:
            UserError: if the codes have fewer digits.
        """

    def draw(self, codes: Codes, seeds: Int64[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """Images of codes for new images: where a kind draws the details that codes leave open, by a seed for each."""
        return self.decode(codes)

    def init_from_data(self, images: Float[Tensor, "b c h w"]) -> None:
        """The data-dependent start of a new tokenizer, once before training; nothing, where a kind has none."""

    def phases(self, fit: FitConfig) -> list[Phase]:
        """What a step of training does, where it is more than to lower the sum of `forward`'s losses; else nothing."""
        return []

    @classmethod
    def stages(cls, config: Any) -> Sequence[Any]:
        """The configs of the tokenizers to train in turn, each built on the one before; the last is `config`."""
        return [config]

    def build_on(self, below: "Tokenizer") -> None:
        """Takes over what the stage before has learned; of kinds that have several stages."""
        raise NotImplementedError  # a kind of one stage has none before it, and is never asked

    @torch.no_grad()
    def reconstructions(self, images: Float[Tensor, "b c h w"]) -> dict[str, Float[Tensor, "b c h w"]]:
        """What to show of a tokenizer beside images: by caption, from all of each code, then from fewer digits."""
        codes = self.encode(images)
        found = {f"from {str(self.layout).replace('×', 'x')}": self.decode(codes)}
        digits = max(len(level.radices) for level in self.layout.levels)
        for first in range(digits - 1, 0, -1):
            found[f"first digit{'s' if first > 1 else ''} ({first} of {digits})"] = self.decode(codes, first)
        return found

    def collapse_remedy(self) -> str:
        """What a person may try whose codebook collapses, as it goes on after "Try"."""
        return "fewer codes, more images, or a lower --learning-rate"
