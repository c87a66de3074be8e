"""HR-VQVAE: VQ-VAE with linked codebooks. Nothing is different but the shape of the tree, so little is here."""

from dataclasses import dataclass
from typing import ClassVar

from smalti.core.models import register
from smalti.tokenizers.vq.vqvae import VQVAE, VQConfig


@dataclass(frozen=True)
class HRVQConfig(VQConfig):
    """Settings of an HR-VQVAE. The defaults make 512 leaves, 8*8*8."""

    depth: int = 3
    """Layers of linked codebooks (n in the paper): digits of a code."""
    branching: int = 8
    """Codewords of each codebook (m in the paper): values of a digit."""


@register
class HRVQ(VQVAE):
    """Hierarchical residual learning VQ-VAE (HR-VQVAE, Eqs. 3-6 and Fig. 2): one grid of codes of `branching**depth`.

    Raises:
        UserError: as `VQVAE` does.
    """

    kind: ClassVar[str] = "hrvq"
    config_class: ClassVar[type] = HRVQConfig

    @property
    def radices(self) -> tuple[int, ...]:
        """Of a code: `branching` for each of `depth` layers."""
        return (self.config.branching,) * self.config.depth
