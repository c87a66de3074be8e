"""SimVQ: a frozen random codebook behind one learned linear map.

Legend: b batch, d code width, h w grid, k codebook size.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.core.codes import Digits
from smalti.core.errors import UserError
from smalti.tokenizers.quantizers.gradients import Gradient, with_gradient
from smalti.tokenizers.quantizers.linked import QuantizerOutput, codewords
from smalti.tokenizers.quantizers.search import nearest_paths


class SimVQ(nn.Module):
    """Vector quantization whose codewords share one learned linear map (SimVQ, arXiv 2411.02038).

    The codewords are C W: C is random and never learns, W is a learned (d, d) matrix. A step moves all codewords, also
    those that no vector chose, so that none is left behind. Search and losses are float32 under autocast.

    Deviations: W starts as the identity, and `init_from_data` fits the spread of the codewords to that of the encoder's
    outputs; as in the other quantizers the squared norms are means over positions and channels.

    Args:
        code_width: length of a codeword.
        codebook_size: number of codewords, at least 2.
        commitment_weight: weight of the commitment loss, beta.
        gradient: how the gradient of z_q reaches z_e; see `with_gradient`.

    Raises:
        UserError: if `codebook_size` is below 2 or `commitment_weight` negative.
    """

    frozen_codebook: Tensor

    def __init__(
        self, *, code_width: int, codebook_size: int, commitment_weight: float, gradient: Gradient = "straight-through"
    ) -> None:
        super().__init__()
        if codebook_size < 2 or not commitment_weight >= 0:
            values = f"{codebook_size} and {commitment_weight}"
            raise UserError(f"a codebook has at least 2 codewords and a commitment_weight of at least 0, not {values}")
        self.commitment_weight = commitment_weight
        self.gradient: Gradient = gradient
        self.register_buffer("frozen_codebook", torch.randn(codebook_size, code_width) / code_width**0.5)
        self.map = nn.Linear(code_width, code_width, bias=False)
        nn.init.eye_(self.map.weight)

    @property
    def radices(self) -> tuple[int, ...]:
        """Radices of a code: the codebook size alone."""
        return (len(self.frozen_codebook),)

    @property
    def codebook(self) -> Float[Tensor, "k d"]:
        """Codewords: the frozen ones, mapped, in float32."""
        with torch.autocast(self.frozen_codebook.device.type, enabled=False):
            return self.map(self.frozen_codebook)

    def forward(self, z_e: Float[Tensor, "b d h w"]) -> QuantizerOutput:
        """Quantizes a grid of any size and computes the losses of codebook and encoder."""
        b, _, h, w = z_e.shape
        vectors, codebook = rearrange(z_e, "b d h w -> (b h w) d").float(), self.codebook
        codes = nearest_paths(vectors, [codebook[None]])
        chosen = F.embedding(codes, codebook)
        losses = {
            "codebook": F.mse_loss(chosen, vectors.detach()),
            "commitment": self.commitment_weight * F.mse_loss(vectors, chosen.detach()),
        }
        z_q = with_gradient(vectors, chosen, self.gradient)
        return QuantizerOutput(
            z_q=rearrange(z_q, "(b h w) d -> b d h w", b=b, h=h, w=w),
            codes=rearrange(codes, "(b h w) -> b h w", b=b, h=h, w=w),
            losses=losses,
        )

    def encode(self, z_e: Float[Tensor, "b d h w"]) -> Int64[Tensor, "b h w"]:
        """Returns the codes alone, without losses or gradients."""
        b, _, h, w = z_e.shape
        codes = nearest_paths(rearrange(z_e, "b d h w -> (b h w) d"), [self.codebook[None]])
        return rearrange(codes, "(b h w) -> b h w", b=b, h=h, w=w)

    def lookup(self, codes: Int64[Tensor, "b h w"], digits: Digits | None = None) -> Float[Tensor, "b d h w"]:
        """Returns the codewords of codes.

        Raises:
            UserError: if `digits` are others than the one digit of these codes.
        """
        return codewords(self.codebook, codes, digits)

    @torch.no_grad()
    def init_from_data(self, z_e: Float[Tensor, "b d h w"]) -> None:
        """Sets the map so that the codewords have the second moments of the vectors: they start where vectors are."""
        vectors = rearrange(z_e, "b d h w -> (b h w) d").cpu().double()  # not every device has float64
        variances, axes = torch.linalg.eigh(vectors.T @ vectors / len(vectors))
        root = axes * variances.clamp_min(0).sqrt() @ axes.T
        self.map.weight.copy_(root * vectors.shape[1] ** 0.5)  # frozen codewords have the covariance 1 / d
