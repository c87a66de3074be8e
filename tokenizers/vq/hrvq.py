"""HR-VQVAE: VQ-VAE with linked codebooks. Networks and losses are VQ-VAE's; only the shape of the tree differs."""

from dataclasses import dataclass
from typing import ClassVar

from smalti.core.models import register
from smalti.tokenizers.vq.vqvae import ConvolutionalVQ, VQConfig


@dataclass(frozen=True)
class HRVQConfig(VQConfig):
    """Settings of an HR-VQVAE. The defaults give 8*8*8 = 512 codes."""

    depth: int = 3
    """Layers of linked codebooks: the number of digits of a code."""
    branching: int = 8
    """Codewords per codebook: the number of values of a digit."""


@register
class HRVQ(ConvolutionalVQ[HRVQConfig]):
    """Hierarchical residual learning VQ-VAE (HR-VQVAE, Eqs. 3-6 and Fig. 2): one grid of `branching**depth` codes.

    The paper calls the depth n and the branching m.

    Raises:
        UserError: as `ConvolutionalVQ` does.
    """

    kind: ClassVar[str] = "hrvq"
    config_class: ClassVar[type] = HRVQConfig

    @property
    def radices(self) -> tuple[int, ...]:
        """Radices of a code: `branching` in each of `depth` layers."""
        return (self.config.branching,) * self.config.depth
