"""HR-VQVAE: VQ-VAE with linked codebooks. Networks and losses are VQ-VAE's; only the shape of the tree differs."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from smalti.core.config import added
from smalti.core.models import register
from smalti.tokenizers.quantizers.tree import Branching, depth_of, radices_of
from smalti.tokenizers.vq.vqvae import ConvolutionalVQ, OneGridConfig

DEPTH = 3
"""Layers in most of the paper's experiments."""


@dataclass(frozen=True)
class HRVQConfig(OneGridConfig):
    """Settings of an HR-VQVAE. The defaults give 8*8*8 = 512 codes.

    Raises:
        UserError: if there are several branchings, but not `depth`.
    """

    depth: int = DEPTH
    """Layers of linked codebooks: the number of digits of a code. With a --branching for each layer it is their
    number."""
    branching: Branching = 8
    """Codewords per codebook: the number of values of a digit. One number for every layer, or a number for each, the
    first layer's first: `--branching 8 4 2`."""
    quantizer: Literal["linked", "residual"] = added("linked")
    """`linked`: the codeword of one layer chooses the codebook of the next. `residual`: each layer has one codebook for
    all residuals (residual VQ), so there are far fewer codewords."""
    shared_codebooks: bool = added(False)
    """With `residual`: all layers use one codebook (RQ-VAE)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "depth", depth_of(self.branching, self.depth, default=DEPTH))


@register
class HRVQ(ConvolutionalVQ[HRVQConfig]):
    """Hierarchical residual learning VQ-VAE (HR-VQVAE, Eqs. 3-6 and Fig. 2): one grid of `branching**depth` codes.

    The paper calls the depth n and the branching m, which is the same in all layers there; here each may have its own.
    By default codebooks do not learn by Eqs. 5 and 6: see the deviations of `LinkedQuantizer`.

    Raises:
        UserError: as `ConvolutionalVQ` does.
    """

    kind: ClassVar[str] = "hrvq"
    config_class: ClassVar[type] = HRVQConfig

    @property
    def radices(self) -> tuple[int, ...]:
        """Radices of a code: the branching of each layer."""
        return radices_of(self.config.branching, self.config.depth)
