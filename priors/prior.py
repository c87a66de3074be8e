"""What objectives and samplers ask of a prior, whatever its body: features of codes, and a head that turns them into
probabilities."""

from abc import ABC, abstractmethod
from typing import ClassVar

from jaxtyping import Float, Int64
from torch import Tensor

from smalti.checkpoint import Checkpointed
from smalti.codes import Level
from smalti.priors.head import FactorizedHead
from smalti.registry import Family


class Prior(Checkpointed, ABC):
    """A distribution over one level's grids of codes: a body, and the head that reads codes for it and predicts them
    from it.

    Attributes:
        level: the grid it is trained on, and the radices of its codes.
        head: embedding, likelihood and draws.
    """

    family: ClassVar[Family] = "prior"
    level: Level
    head: FactorizedHead

    @abstractmethod
    def features(self, codes: Int64[Tensor, "b h w"]) -> Float[Tensor, "b n d"]:
        """What the body knows of each position, in raster order (n = h w); the head's probabilities follow from it
        alone."""
