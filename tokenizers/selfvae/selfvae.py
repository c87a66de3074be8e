"""selfVAE: VAEs in a hierarchy, through representations that transformations make. The model is in `hierarchy.py`."""

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
    """How many images there are, x among them: 2 has the one transformation of Eqs. 9-19, 3 is the paper's 3lvl."""
    transformation: Transformation = "downscale"
    """What each level becomes at the next: `downscale` to half the size, `bits` to half the bits of a value; a `sketch`
    or `grayscale` image, of two levels."""


@register
class SelfVAE(Hierarchy):
    """The self-supervised variational autoencoder (arXiv 2010.02014), of one transformation or several in turn.

    Raises:
        UserError: as `Hierarchy` does, or if the transformation cannot be done so often.
    """

    kind: ClassVar[str] = "selfvae"
    config_class: ClassVar[type] = SelfVAEConfig

    def __init__(self, config: SelfVAEConfig) -> None:
        super().__init__(config, forms(config.transformation, config.levels, config.image_channels))

    def representations(self, images: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b _c _h _w"]]:
        """See `Hierarchy.representations`."""
        found = super().representations(images)
        for before, after in pairwise(self.forms):
            found.append(transform(self.config.transformation, found[-1], before, after))
        return found
