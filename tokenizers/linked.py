"""Quantization through linked codebooks, the bottleneck of HR-VQVAE; with one layer it is VQ-VAE's.

Vectors in, codes out: no image code here.

Legend: b batch, d code width, h w grid, m branching, n layers.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.codes import LARGEST_CODEBOOK_SIZE
from smalti.errors import UserError
from smalti.tokenizers.kmeans import linked_kmeans
from smalti.tokenizers.search import nearest_paths


@dataclass(frozen=True)
class QuantizerOutput:
    """What quantizing a batch gives.

    Attributes:
        z_q: the combined representation e_C (Eq. 4); its gradient passes straight through to `z_e`.
        codes: paths, 0 to m**n - 1.
        losses: scalar terms of Eqs. 5 and 6, by name, already weighted: their sum is the bottleneck's share of the
            objective.
    """

    z_q: Float[Tensor, "b d h w"]
    codes: Int64[Tensor, "b h w"]
    losses: dict[str, Float[Tensor, ""]]


class LinkedQuantizer(nn.Module):
    """Residual quantization through linked codebooks (HR-VQVAE, Eqs. 3-6).

    Layer i holds `branching**(i-1)` codebooks of `branching` codewords; the codeword chosen in layer i-1 decides which
    one layer i searches. A path from the first layer to the last is one code in [0, branching**depth).

    With `depth=1` the codes are VQ-VAE's (Eq. 1), and the losses are the last two terms of its Eq. 2, twice: Eq. 5's
    terms over the whole and Eq. 6's over the only layer are then the same.

    The paper gives no values for beta; here it is one for all layers, and 0.25 is VQ-VAE's. Search, losses and sums
    are float32 under autocast: half precision swaps near neighbours.

    Deviations: the squared norms of Eqs. 5 and 6 are means over positions and channels, so that the weights do not
    depend on the sizes; and the codebooks start from the data (`start_from`), since from random codewords whole
    subtrees are never chosen and never learn.

    Raises:
        UserError: if `code_width` or `depth` is below 1, `branching` below 2, `commitment_weight` negative, or there
            are more than 2**31 - 1 leaves.
    """

    def __init__(self, *, code_width: int, depth: int, branching: int, commitment_weight: float) -> None:
        super().__init__()
        if min(depth, code_width) < 1 or branching < 2:
            given = f"{depth}, {code_width} and {branching}"
            raise UserError(f"depth and code_width must be at least 1 and branching at least 2, not {given}")
        if commitment_weight < 0:
            raise UserError(f"commitment_weight must not be negative, got {commitment_weight}; 0.25 is usual")
        if depth * math.log2(branching) >= 31:  # before the power, which might never end
            leaves = f"{branching}**{depth} leaves are more than {LARGEST_CODEBOOK_SIZE}"
            raise UserError(f"{leaves}; take a smaller depth or branching")
        self.depth, self.branching, self.commitment_weight = depth, branching, commitment_weight
        self.codebooks = nn.ParameterList(
            torch.zeros(branching**layer, branching, code_width).uniform_(-(0.5**layer), 0.5**layer)
            for layer in range(depth)
        )

    def forward(self, z_e: Float[Tensor, "b d h w"]) -> QuantizerOutput:
        """Quantizes, with the losses that train codebooks and encoder; any grid will do."""
        b, _, h, w = z_e.shape
        vectors = rearrange(z_e, "b d h w -> (b h w) d").float()
        paths = nearest_paths(vectors, list(self.codebooks))
        codebook_loss = commitment_loss = torch.zeros((), device=z_e.device)
        combined, residual = torch.zeros_like(vectors), vectors
        for layer, codebook in enumerate(self.codebooks):
            codeword = F.embedding(paths // self.branching ** (self.depth - 1 - layer), codebook.flatten(0, 1))
            codebook_loss = codebook_loss + F.mse_loss(codeword, residual.detach())  # Eq. 6
            commitment_loss = commitment_loss + F.mse_loss(residual, codeword.detach())
            combined = combined + codeword  # Eq. 4
            residual = residual - codeword.detach()  # not in place: every layer's commitment must reach the encoder
        codebook_loss = codebook_loss + F.mse_loss(combined, vectors.detach())  # Eq. 5
        commitment_loss = commitment_loss + F.mse_loss(vectors, combined.detach())
        z_q = vectors + (combined - vectors).detach()  # straight through
        return QuantizerOutput(
            z_q=rearrange(z_q, "(b h w) d -> b d h w", b=b, h=h, w=w),
            codes=rearrange(paths, "(b h w) -> b h w", b=b, h=h, w=w),
            losses={"codebook": codebook_loss, "commitment": self.commitment_weight * commitment_loss},
        )

    @torch.no_grad()
    def start_from(self, z_e: Float[Tensor, "b d h w"], *, seed: int = 0) -> None:
        """Sets every codebook to the k-means centres of what reaches it, so that no subtree dies unused."""
        vectors = rearrange(z_e, "b d h w -> (b h w) d")
        started = linked_kmeans(vectors, list(self.codebooks), seed=seed)
        for codebook, centres in zip(self.codebooks, started, strict=True):
            codebook.copy_(centres)

    def encode(self, z_e: Float[Tensor, "b d h w"]) -> Int64[Tensor, "b h w"]:
        """Codes only, without losses or gradients."""
        b, _, h, w = z_e.shape
        paths = nearest_paths(rearrange(z_e, "b d h w -> (b h w) d"), list(self.codebooks))
        return rearrange(paths, "(b h w) -> b h w", b=b, h=h, w=w)

    def lookup(self, codes: Int64[Tensor, "b h w"], digits: int | None = None) -> Float[Tensor, "b d h w"]:
        """The combined representation of codes, e_C (Eq. 4), or what their first `digits` layers say of it.

        Raises:
            UserError: if the codes do not have that many digits.
        """
        digits = self.depth if digits is None else digits
        if not 1 <= digits <= self.depth:
            raise UserError(f"these codes have {self.depth} digits; cannot decode {digits} of them")
        combined = sum(
            F.embedding(codes // self.branching ** (self.depth - 1 - layer), codebook.flatten(0, 1))
            for layer, codebook in enumerate(list(self.codebooks)[:digits])
        )
        assert isinstance(combined, Tensor)
        return rearrange(combined, "b h w d -> b d h w")
