"""HR-VQVAE: VQ-VAE with linked codebooks. Networks and losses are VQ-VAE's; only the shape of the tree differs."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from smalti.core.config import added
from smalti.core.models import register
from smalti.tokenizers.vq.vqvae import ConvolutionalVQ, OneGridConfig


@dataclass(frozen=True)
class HRVQConfig(OneGridConfig):
    """Settings of an HR-VQVAE. The defaults give 8*8*8 = 512 codes."""

    depth: int = 3
    """Layers of linked codebooks: the number of digits of a code."""
    branching: int = 8
    """Codewords per codebook: the number of values of a digit."""
    quantizer: Literal["linked", "residual"] = added("linked")
    """`linked`: the codeword of one layer chooses the codebook of the next. `residual`: each layer has one codebook for
    all residuals (residual VQ), so there are far fewer codewords."""
    shared_codebooks: bool = added(False)
    """With `residual`: all layers use one codebook (RQ-VAE)."""


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
