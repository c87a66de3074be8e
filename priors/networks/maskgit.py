"""The hourglass with a mask token, for masked-code prediction. The loss and the sampler are in `masked.py`."""

import torch
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.core.models import register
from smalti.priors.methods.masked import MASK_TOKEN, MASKED
from smalti.priors.networks.hourglass import Hourglass, HourglassConfig


@register
class MaskGIT(Hourglass):
    """MaskGIT (arXiv 2202.04200) with the 2-D hourglass as its transformer and a learned vector for the mask token.

    Deviation: the head is factorized, so the digits of one position are sampled one after the other.
    """

    kind = "maskgit"
    method = MASKED

    def __init__(self, config: HourglassConfig) -> None:
        super().__init__(config)
        self.hidden = nn.Parameter(torch.zeros(config.model_width))  # the embedding of the mask token

    def embed(self, codes: Int64[Tensor, "b h w"]) -> Float[Tensor, "b n d"]:
        """Embeds codes, some of which may be `MASK_TOKEN`."""
        masked = rearrange(codes == MASK_TOKEN, "b h w -> b (h w) 1")
        return torch.where(masked, self.hidden, self.head.embed(codes.clamp(min=0)))
