"""The hourglass that knows hidden codes: trained to name them, and drawn from in rounds. Both are in `masked.py`."""

import torch
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.core.models import register
from smalti.priors.methods.masked import HIDDEN, MASKED
from smalti.priors.networks.hourglass import Hourglass, HourglassConfig


@register
class MaskGIT(Hourglass):
    """MaskGIT (arXiv 2202.04200) with the 2-D hourglass as its transformer: one more vector stands for a hidden code.

    Deviation: the factorised head, whose digits of one position are drawn one after the other.
    """

    kind = "maskgit"
    method = MASKED

    def __init__(self, config: HourglassConfig) -> None:
        super().__init__(config)
        self.hidden = nn.Parameter(torch.zeros(config.model_width))

    def embed(self, codes: Int64[Tensor, "b h w"]) -> Float[Tensor, "b n d"]:
        """What the body reads of codes, some of which may be `HIDDEN`."""
        hidden = rearrange(codes == HIDDEN, "b h w -> b (h w) 1")
        return torch.where(hidden, self.hidden, self.head.embed(codes.clamp(min=0)))
