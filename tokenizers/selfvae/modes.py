"""selfVAE's generation modes (Section 3.3, Fig. 3): what is transmitted of an image in each of them.

The model that transmits and decodes is in `hierarchical_vae.py`.

Legend: b batch, c channels, h w pixels, d latent channels, y x grid of latents.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from jaxtyping import Float
from torch import Tensor

GenerationMode: TypeAlias = Literal[
    "generation", "conditional-generation", "conditional-reconstruction", "reconstruction-1", "reconstruction-2"
]
"""Names of the five generation modes (Section 3.3)."""
Pixels: TypeAlias = Literal["mean", "sample"]
"""Choice of pixels from their likelihood: its mean, rounded to the nearest possible value, or a sample."""

MODES: dict[GenerationMode, str] = {
    "generation": "",
    "conditional-generation": "y",
    "conditional-reconstruction": "yz",
    "reconstruction-1": "u",
    "reconstruction-2": "uz",
}
"""Parts that each mode transmits: `y` is the coarsest representation y_K, `z` all latents z_k, `u` the latents u."""
TRANSMITTED_BITS = 16
"""Bits per transmitted latent value: latents are rounded to half precision before they are decoded."""


@dataclass(frozen=True)
class Transmitted:
    """The parts of images that are transmitted; the receiver samples the parts that are None or empty.

    Attributes:
        y: the coarsest representation, y_K.
        u: the latents u of the coarsest representation.
        z: the latents z_1, ..., z_K.
    """

    y: Float[Tensor, "b _c _h _w"] | None = None
    u: Float[Tensor, "b d y x"] | None = None
    z: tuple[Float[Tensor, "b d y x"], ...] = ()

    @property
    def latent_bits(self) -> int:
        """Bits of the transmitted latents of one image, without entropy coding."""
        latents = [*self.z, *(() if self.u is None else (self.u,))]
        return TRANSMITTED_BITS * sum(each[0].numel() for each in latents)
