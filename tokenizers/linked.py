"""Quantization through linked codebooks, the bottleneck of HR-VQVAE; with one layer it is VQ-VAE's. Vectors in, codes out: no image code here.

Legend: b batch, d code width, h w grid, m branching, n layers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.tokenizers.kmeans import linked_kmeans
from smalti.tokenizers.search import nearest_paths

LARGEST_LEAF_COUNT = 2**31 - 1


@dataclass(frozen=True)
class QuantizerOutput:
    """What quantizing a batch gives.

    Attributes:
        z_q: the combined representation e_C (Eq. 4); its gradient passes straight through to `z_e`.
        codes: paths, 0 to m**n - 1.
        losses: scalar terms of Eqs. 5 and 6, by name, already weighted: their sum is the bottleneck's share of the objective.
    """

    z_q: Float[Tensor, "b d h w"]
    codes: Int64[Tensor, "b h w"]
    losses: dict[str, Float[Tensor, ""]]


class LinkedQuantizer(nn.Module):
    """Residual quantization through linked codebooks (HR-VQVAE, Eqs. 3-6).

    Layer i holds `branching**(i-1)` codebooks of `branching` codewords; the codeword chosen in layer i-1 decides which one layer i
    searches. A path from the first layer to the last is one code in [0, branching**depth). With `depth=1` this is VQ-VAE (Eqs. 1-2).

    The squared norms of Eqs. 5 and 6 are means over positions and channels, so the weights do not depend on the sizes. The paper
    gives no values for beta; 0.25 is VQ-VAE's. Search, losses and sums are float32 under autocast: half precision swaps near neighbours.

    Deviations: the codebooks start from the data (`start_from`): from random codewords, whole subtrees are never chosen and never learn.

    Raises:
        UserError: if `branching` is below 2, `depth` below 1, or there are more than 2**31 - 1 leaves.
    """

    def __init__(self, *, code_width: int, depth: int, branching: int, commitment_weight: float) -> None:
        super().__init__()
        if depth < 1 or branching < 2:
            raise UserError(f"linked codebooks need depth of at least 1 and branching of at least 2, not {depth} and {branching}")
        if branching**depth > LARGEST_LEAF_COUNT:
            raise UserError(f"{branching}**{depth} leaves are more than {LARGEST_LEAF_COUNT}; take a smaller depth or branching")
        self.depth, self.branching, self.commitment_weight = depth, branching, commitment_weight
        self.codebooks = nn.ParameterList(
            torch.zeros(branching**layer, branching, code_width).uniform_(-(0.5**layer), 0.5**layer) for layer in range(depth)
        )

    def forward(self, z_e: Float[Tensor, "b d h w"]) -> QuantizerOutput:
        """Quantizes, with the losses that train codebooks and encoder. `Raises`: nothing; any grid size will do."""
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
        """Sets every codebook to the k-means centres of what reaches it: the start that keeps whole subtrees from dying unused."""
        vectors = rearrange(z_e, "b d h w -> (b h w) d")
        for codebook, centres in zip(self.codebooks, linked_kmeans(vectors, list(self.codebooks), seed=seed), strict=True):
            codebook.copy_(centres)

    def encode(self, z_e: Float[Tensor, "b d h w"]) -> Int64[Tensor, "b h w"]:
        """Codes only, without losses or gradients."""
        b, _, h, w = z_e.shape
        paths = nearest_paths(rearrange(z_e, "b d h w -> (b h w) d"), list(self.codebooks))
        return rearrange(paths, "(b h w) -> b h w", b=b, h=h, w=w)

    def lookup(self, codes: Int64[Tensor, "b h w"], digits: int | None = None) -> Float[Tensor, "b d h w"]:
        """The combined representation of codes, e_C (Eq. 4), or of their first `digits` digits only: what the first layers say."""
        digits = self.depth if digits is None else digits
        if not 1 <= digits <= self.depth:
            raise UserError(f"these codes have {self.depth} digits; cannot decode {digits} of them")
        combined = sum(
            F.embedding(codes // self.branching ** (self.depth - 1 - layer), codebook.flatten(0, 1))
            for layer, codebook in enumerate(list(self.codebooks)[:digits])
        )
        assert isinstance(combined, Tensor)
        return rearrange(combined, "b h w d -> b d h w")
