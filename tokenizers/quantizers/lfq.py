"""Lookup-free quantization: codes without a codebook, one bit a dimension, spread by an entropy loss.

Legend: b batch, d code width, h w grid, n bits, which are the digits of a code.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.core.codes import Digits, Level, hidden_digits
from smalti.core.errors import UserError
from smalti.tokenizers.quantizers.inner_product import ENTROPY_TEMPERATURE
from smalti.tokenizers.quantizers.linked import QuantizerOutput

LARGEST_GROUP_BITS = 13
"""Bits up to which the entropy of the batch is that of whole codes; more are divided into groups."""


class LFQ(nn.Module):
    """Lookup-free quantization (LFQ, arXiv 2310.05737, Sec. 3.1): each digit is the sign of a dimension.

    A linear map takes z_e to n dimensions, which become -1 or 1 with the straight-through estimator; another linear map
    takes them to z_q. The first dimension is the most significant digit; 1 is the digit of a positive sign. The entropy
    loss makes the bits of each position certain and uses all codes over the batch: the mean entropy of the positions'
    distributions minus the entropy of their mean. The commitment loss keeps the dimensions near -1 and 1. All of it is
    float32 under autocast.

    The distribution of a position is a softmax of inner products with all codes, thus a product over the bits: its
    entropy is a sum over them. The entropy of the mean is that of whole codes up to 2**13 of them. For more, bits are
    divided into groups, whose entropies are added: an upper bound that spreads the codes of each group, and costs no
    tensor with an entry for each code. The mean is over the micro-batch of a process.

    Args:
        code_width: length of z_e and z_q.
        bits: dimensions, and so digits of a code.
        commitment_weight: weight of the commitment loss.
        entropy_weight: weight of the entropy loss, which is in nats per position.

    Raises:
        UserError: if `bits` is not from 1 to 30, or a weight is negative.
    """

    def __init__(self, *, code_width: int, bits: int, commitment_weight: float, entropy_weight: float) -> None:
        super().__init__()
        if not (1 <= bits <= 30 and commitment_weight >= 0 and entropy_weight >= 0):
            values = f"{bits}, {commitment_weight} and {entropy_weight}"
            raise UserError(f"bits must be from 1 to 30, commitment_weight and entropy_weight at least 0, not {values}")
        self.commitment_weight, self.entropy_weight = commitment_weight, entropy_weight
        self.level = Level(1, 1, (2,) * bits)
        self.down = nn.Conv2d(code_width, bits, 1)
        self.up = nn.Conv2d(bits, code_width, 1)

    @property
    def radices(self) -> tuple[int, ...]:
        """Radices of a code: 2 for each bit."""
        return self.level.radices

    def forward(self, z_e: Float[Tensor, "b d h w"]) -> QuantizerOutput:
        """Quantizes a grid of any size and computes the losses `commitment` and `entropy`."""
        with torch.autocast(z_e.device.type, enabled=False):
            values = self.down(z_e.float())
            signs = torch.where(values > 0, 1.0, -1.0)
            z_q = self.up(values + (signs - values).detach())  # straight-through estimator
            logits = (
                4 * rearrange(values, "b n h w -> (b h w) n") / ENTROPY_TEMPERATURE
            )  # of bit 1: v.1 - v.(-1), doubled
            losses = {
                "commitment": self.commitment_weight * F.mse_loss(values, signs),
                "entropy": self.entropy_weight * entropy_loss(logits),
            }
        return QuantizerOutput(z_q=z_q, codes=self._codes(values), losses=losses)

    def encode(self, z_e: Float[Tensor, "b d h w"]) -> Int64[Tensor, "b h w"]:
        """Returns the codes alone, without losses or gradients."""
        with torch.autocast(z_e.device.type, enabled=False):
            return self._codes(self.down(z_e.float()))

    def lookup(self, codes: Int64[Tensor, "b h w"], digits: Digits | None = None) -> Float[Tensor, "b d h w"]:
        """Returns z_q of codes, or of some of their bits with the others at 0, between their two values.

        Raises:
            UserError: if there are no such codes, or they do not have these digits.
        """
        self.level.require(codes, "LFQ")
        values = rearrange(2.0 * self.level.split(codes) - 1, "b h w n -> b n h w")
        values[:, hidden_digits(digits, len(self.radices))] = 0
        with torch.autocast(codes.device.type, enabled=False):
            return self.up(values)

    def init_from_data(self, z_e: Float[Tensor, "b d h w"]) -> None:
        """Does nothing: there is no codebook."""

    def _codes(self, values: Tensor) -> Tensor:
        return self.level.join(rearrange((values > 0).long(), "b n h w -> b h w n"))


def entropy_loss(logits: Float[Tensor, "p n"]) -> Float[Tensor, ""]:
    """Returns the mean entropy of the positions' codes minus that of their mean, in nats.

    Args:
        logits: of bit 1, for each position and bit; bits are independent given the position.
    """
    p, not_p = logits.sigmoid(), (-logits).sigmoid()
    entropy = -(p * F.logsigmoid(logits) + not_p * F.logsigmoid(-logits)).sum(1).mean()
    groups = -(-logits.shape[1] // LARGEST_GROUP_BITS)
    pairs = zip(not_p.tensor_split(groups, 1), p.tensor_split(groups, 1), strict=True)
    for group in (torch.stack(pair, -1) for pair in pairs):  # p n 2
        middle = group.shape[1] // 2
        left, right = _code_probabilities(group[:, :middle]), _code_probabilities(group[:, middle:])
        mean = left.T @ right / len(left)  # of all codes of the group, without a tensor of positions times codes
        entropy = entropy + torch.special.xlogy(mean, mean.clamp_min(1e-12)).sum()
    return entropy


def _code_probabilities(bits: Float[Tensor, "p n 2"]) -> Float[Tensor, "p k"]:
    """Returns the probability of each of the 2**n codes of independent bits, most significant bit first."""
    probabilities = bits.new_ones(len(bits), 1)
    for bit in bits.unbind(1):
        probabilities = rearrange(probabilities[:, :, None] * bit[:, None], "p k two -> p (k two)")
    return probabilities
