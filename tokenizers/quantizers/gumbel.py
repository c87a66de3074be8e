"""Gumbel-softmax quantization: codes are sampled from a predicted distribution, not found by nearest-codeword search.

The search-based quantizer is in `linked.py`; HQA's sampled posterior over codewords is in `stochastic.py`.

Legend: b batch, d code width, h w grid, k codebook size.
"""

import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.core.codes import Digits
from smalti.core.errors import UserError
from smalti.core.randomness import gumbel
from smalti.tokenizers.quantizers.linked import QuantizerOutput, codewords


class GumbelQuantizer(nn.Module):
    """Straight-through Gumbel-softmax quantizer (arXiv 1611.01144): the encoder predicts a distribution over codes.

    The forward pass uses one codeword per position, the backward pass the gradient of the relaxed sample. The KL
    divergence of the predicted distribution from the uniform one works against codebook collapse. Logits, samples and
    losses are float32 under autocast.

    Args:
        code_width: length of z_e and of a codeword.
        codebook_size: number of codewords.
        temperature: temperature of the relaxation.
        kl_weight: weight of the KL term, which is in nats per position.

    Raises:
        UserError: if `temperature` is not above 0, or `kl_weight` negative.
    """

    def __init__(self, *, code_width: int, codebook_size: int, temperature: float, kl_weight: float) -> None:
        super().__init__()
        if not (temperature > 0 and kl_weight >= 0):
            values = f"{temperature} and {kl_weight}"
            raise UserError(f"temperature must be above 0 and kl_weight at least 0, not {values}")
        self.temperature, self.kl_weight = temperature, kl_weight
        self.logits = nn.Conv2d(code_width, codebook_size, 1)
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_width))

    @property
    def radices(self) -> tuple[int, ...]:
        """Radices of a code: the codebook size alone."""
        return (len(self.codebook),)

    def forward(self, z_e: Float[Tensor, "b d h w"], seeds: Int64[Tensor, " b"] | None = None) -> QuantizerOutput:
        """Samples codes in training, each image from its own seed; otherwise takes the most probable ones.

        Without seeds it takes the most probable codes in training too.
        """
        k, (h, w) = len(self.codebook), z_e.shape[2:]
        logits = self._logits(z_e)
        noisy = logits
        if seeds is not None and self.training:
            noisy = logits + rearrange(gumbel(seeds, h, w, k), "b h w k -> b k h w")
        codes = noisy.argmax(1)
        soft = (noisy / self.temperature).softmax(1)
        hard = rearrange(F.one_hot(codes, k), "b h w k -> b k h w") + soft - soft.detach()  # straight-through
        log_p = logits.log_softmax(1)
        kl = reduce(log_p.exp() * (log_p + math.log(k)), "b k h w -> b h w", "sum").mean()
        with torch.autocast(z_e.device.type, enabled=False):
            z_q = einsum(hard, self.codebook, "b k h w, k d -> b d h w")
        return QuantizerOutput(z_q=z_q, codes=codes, losses={"kl": self.kl_weight * kl})

    def encode(self, z_e: Float[Tensor, "b d h w"]) -> Int64[Tensor, "b h w"]:
        """Returns the most probable code at each position."""
        return self._logits(z_e).argmax(1)

    def lookup(self, codes: Int64[Tensor, "b h w"], digits: Digits | None = None) -> Float[Tensor, "b d h w"]:
        """Returns the codewords of codes.

        Raises:
            UserError: if `digits` are others than the one digit of these codes.
        """
        return codewords(self.codebook, codes, digits)

    def init_from_data(self, z_e: Float[Tensor, "b d h w"]) -> None:
        """Does nothing: codewords need not be near encoder outputs, since codes are not found by distance."""

    def _logits(self, z_e: Tensor) -> Tensor:
        with torch.autocast(z_e.device.type, enabled=False):
            return self.logits(z_e.float())
