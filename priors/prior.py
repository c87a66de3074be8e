"""What objectives and samplers ask of a prior, whatever its body: features of codes, and a head that turns them into
probabilities."""

from abc import ABC, abstractmethod
from typing import ClassVar

from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.checkpoint import Checkpointed
from smalti.codes import Level
from smalti.priors.head import FactorizedHead
from smalti.registry import Family


class Prior(Checkpointed, ABC):
    """A distribution over one level's grids of codes: a body, and the head that reads codes for it and predicts them
    from it.

    Attributes:
        level: the grid it is trained on, and the radices of its codes.
        classes: how many classes of images it tells apart; 0 for none.
        head: embedding, likelihood and draws.
    """

    family: ClassVar[Family] = "prior"
    level: Level
    classes: int
    head: FactorizedHead

    @abstractmethod
    def features(
        self, codes: Int64[Tensor, "b h w"], labels: Int64[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """What the body knows of each position, in raster order (n = h w); the head's probabilities follow from it
        alone.

        Args:
            codes: grids to read.
            labels: the class of each, from 0; -1, or None for all, where it is not to be known. Without `classes` no
                label changes anything.
        """


class ClassEmbedding(nn.Module):
    """A vector for each class of images, and one for a class not told. All begin at zero: a class says nothing yet."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Embedding(classes + 1, width)
        nn.init.zeros_(self.vectors.weight)

    def forward(self, labels: Int64[Tensor, " b"] | None, rows: int) -> Float[Tensor, "b d"]:
        """The vectors of `rows` labels; -1, or None for all, is the class not told."""
        if labels is None:
            return self.vectors.weight[:1].expand(rows, -1)
        return self.vectors(labels + 1)
