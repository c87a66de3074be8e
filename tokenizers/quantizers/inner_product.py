"""Quantization by the largest inner product, trained by index backpropagation (IBQ).

The quantizers that search the nearest codeword are in `linked.py`.

Legend: b batch, d code width, h w grid, k codebook size.
"""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.core.codes import Digits
from smalti.core.errors import UserError
from smalti.tokenizers.quantizers.linked import QuantizerOutput, codewords
from smalti.tokenizers.quantizers.search import largest_products

ENTROPY_TEMPERATURE = 0.01  # of the distributions in the entropy loss, as in the published trainings


class InnerProductQuantizer(nn.Module):
    """Index backpropagation quantization (IBQ, arXiv 2412.02692): the code is the codeword of largest inner product.

    The products are logits of a distribution over all codewords. The forward pass uses the most probable codeword, the
    backward pass the gradient of the softmax (straight-through estimator), so that every codeword learns at every step.
    The entropy loss makes the distribution of each position sharp and their mean over the batch uniform, against
    codebook collapse. Logits and losses are float32 under autocast.

    Deviation: beta weights the commitment term, as in the other quantizers; the published code weights the codebook
    term with it. The mean over the batch is that of one process and micro-batch, so gradient accumulation and more
    processes change the result, as for `lfq`.

    Args:
        code_width: length of z_e and of a codeword.
        codebook_size: number of codewords.
        commitment_weight: weight of the commitment loss, beta.
        entropy_weight: weight of the entropy loss, which is in nats per position.

    Raises:
        UserError: if a weight is negative.
    """

    def __init__(self, *, code_width: int, codebook_size: int, commitment_weight: float, entropy_weight: float) -> None:
        super().__init__()
        if not (commitment_weight >= 0 and entropy_weight >= 0):
            values = f"{commitment_weight} and {entropy_weight}"
            raise UserError(f"commitment_weight and entropy_weight must be at least 0, not {values}")
        self.commitment_weight, self.entropy_weight = commitment_weight, entropy_weight
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_width))

    @property
    def radices(self) -> tuple[int, ...]:
        """Radices of a code: the codebook size alone."""
        return (len(self.codebook),)

    def forward(self, z_e: Float[Tensor, "b d h w"]) -> QuantizerOutput:
        """Quantizes a grid of any size and computes the losses of codebook and encoder."""
        with torch.autocast(z_e.device.type, enabled=False):
            z_e = z_e.float()
            logits = einsum(z_e, self.codebook, "b d h w, k d -> b k h w")
            codes, soft = logits.argmax(1), logits.softmax(1)
            hard = rearrange(F.one_hot(codes, len(self.codebook)), "b h w k -> b k h w") + soft - soft.detach()
            z_q = einsum(hard, self.codebook, "b k h w, k d -> b d h w")  # straight-through
            chosen = codewords(self.codebook, codes, None)
            losses = {
                "quantization": F.mse_loss(z_q, z_e),
                "codebook": F.mse_loss(chosen, z_e.detach()),
                "commitment": self.commitment_weight * F.mse_loss(z_e, chosen.detach()),
                "entropy": self.entropy_weight * _entropy_loss(logits / ENTROPY_TEMPERATURE),
            }
        return QuantizerOutput(z_q=z_q, codes=codes, losses=losses)

    def encode(self, z_e: Float[Tensor, "b d h w"]) -> Int64[Tensor, "b h w"]:
        """Returns the codes alone, without losses or gradients, in bounded memory."""
        b, _, h, w = z_e.shape
        codes = largest_products(rearrange(z_e, "b d h w -> (b h w) d"), self.codebook)
        return rearrange(codes, "(b h w) -> b h w", b=b, h=h, w=w)

    def lookup(self, codes: Int64[Tensor, "b h w"], digits: Digits | None = None) -> Float[Tensor, "b d h w"]:
        """Returns the codewords of codes.

        Raises:
            UserError: if `digits` are others than the one digit of these codes.
        """
        return codewords(self.codebook, codes, digits)

    def init_from_data(self, z_e: Float[Tensor, "b d h w"]) -> None:
        """Does nothing: codewords need not be near encoder outputs, since codes are not found by distance."""


def _entropy_loss(logits: Float[Tensor, "b k h w"]) -> Float[Tensor, ""]:
    """Returns the mean entropy of the positions' distributions minus the entropy of their mean."""
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    mean = reduce(p, "b k h w -> k", "mean")
    return -(p * log_p).sum(1).mean() + torch.special.xlogy(mean, mean.clamp_min(1e-12)).sum()
