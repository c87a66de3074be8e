"""selfVAE: a hierarchical VAE whose levels are transformed versions of the image.

The model is in `hierarchical_vae.py`, the transformations are in `transformations.py`.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from smalti.core.models import register
from smalti.tokenizers.selfvae.hierarchical_vae import Hierarchy, VAEConfig
from smalti.tokenizers.selfvae.transformations import Transformation, forms, transform


@dataclass(frozen=True)
class SelfVAEConfig(VAEConfig):
    """Settings of a selfVAE."""

    levels: int = 2
    """Number of levels, the image itself among them. 2 is one transformation, 3 is the paper's 3lvl."""
    transformation: Transformation = "downscale"
    """Transformation from each level to the next: `downscale` halves the size, `bits` halves the bits per value,
    `sketch` and `grayscale` give one grey image and need 2 levels."""


@register
class SelfVAE(Hierarchy[SelfVAEConfig]):
    """Self-supervised variational autoencoder (arXiv 2010.02014), with one transformation (Eqs. 9-19) or several.

    Raises:
        UserError: as `Hierarchy` does, or if the transformation cannot be repeated for so many levels.
    """

    kind: ClassVar[str] = "selfvae"
    config_class: ClassVar[type] = SelfVAEConfig

    def __init__(self, config: SelfVAEConfig) -> None:
        super().__init__(config, forms(config.transformation, config.levels, config.image_channels))

    def representations(self, images: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b _c _h _w"]]:
        """Returns the image and its repeated transformations; see `Hierarchy.representations`."""
        y = super().representations(images)
        for before, after in pairwise(self.forms):
            y.append(transform(self.config.transformation, y[-1], before, after))
        return y
