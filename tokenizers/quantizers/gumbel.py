"""Quantization by drawing codes (Gumbel-softmax), in place of the nearest codeword's search of `linked.py`.

Legend: b batch, d code width, h w grid, k codebook size.
"""

import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.core.randomness import gumbel
from smalti.tokenizers.quantizers.linked import QuantizerOutput, codewords


class GumbelQuantizer(nn.Module):
    """Codes drawn from a distribution that the encoder states (arXiv 1611.01144), with a codebook of their codewords.

    Forward a code is hard, one codeword; backward its gradient is that of the relaxed draw. The KL divergence from the
    uniform distribution keeps codes in use. Logits, draws and losses are float32 under autocast.

    Args:
        code_width: length of z_e and of a codeword.
        codebook_size: codewords.
        temperature: of the relaxation.
        kl_weight: of the KL term, in nats a position.
    """

    def __init__(self, *, code_width: int, codebook_size: int, temperature: float, kl_weight: float) -> None:
        super().__init__()
        self.temperature, self.kl_weight = temperature, kl_weight
        self.logits = nn.Conv2d(code_width, codebook_size, 1)
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_width))

    def forward(self, z_e: Float[Tensor, "b d h w"], seeds: Int64[Tensor, " b"] | None = None) -> QuantizerOutput:
        """Draws codes, from the seeds of the images alone; without seeds takes each position's likeliest."""
        k, (h, w) = len(self.codebook), z_e.shape[2:]
        logits = self._logits(z_e)
        drawn = logits
        if seeds is not None:
            drawn = logits + rearrange(gumbel(seeds, h, w, k), "b h w k -> b k h w")
        codes = drawn.argmax(1)
        soft = (drawn / self.temperature).softmax(1)
        hard = rearrange(F.one_hot(codes, k), "b h w k -> b k h w") + soft - soft.detach()
        log_p = logits.log_softmax(1)
        kl = reduce(log_p.exp() * (log_p + math.log(k)), "b k h w -> b h w", "sum").mean()
        z_q = einsum(hard, self.codebook, "b k h w, k d -> b d h w")
        return QuantizerOutput(z_q=z_q, codes=codes, losses={"kl": self.kl_weight * kl})

    def encode(self, z_e: Float[Tensor, "b d h w"]) -> Int64[Tensor, "b h w"]:
        """Each position's likeliest code."""
        return self._logits(z_e).argmax(1)

    def lookup(self, codes: Int64[Tensor, "b h w"], digits: int | None = None) -> Float[Tensor, "b d h w"]:
        """The codewords of codes.

        Raises:
            UserError: for other than one digit.
        """
        return codewords(self.codebook, codes, digits)

    def init_from_data(self, z_e: Float[Tensor, "b d h w"]) -> None:
        """Nothing: codewords are not where vectors are."""

    def _logits(self, z_e: Tensor) -> Tensor:
        with torch.autocast(z_e.device.type, enabled=False):
            return self.logits(z_e.float())
