"""The objective of priors whose likelihood is exact: the codes' own negative log-likelihood. Networks are elsewhere.

Legend: b batch, h w grid, n positions.
"""

import math
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from smalti.priors.prior import CausalPrior, ObjectiveConfig


@dataclass(frozen=True)
class LikelihoodConfig(ObjectiveConfig):
    """Maximum likelihood."""


class Likelihood(nn.Module):
    """-log p(codes), exactly: every position predicted from those before it."""

    def __init__(self, prior: CausalPrior, config: LikelihoodConfig) -> None:
        super().__init__()
        self.prior = prior
        self.config = config

    def forward(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss, in nats per code, and its parts.

        Args:
            batch: `codes` int64 `(b, h, w)`, what `CodePrior.told` reads, and `seeds` int64 `(b,)`.

        Returns:
            The loss, and detached: `bits_per_code`, the same in bits; `nll_1`, `nll_2`, ... of each digit, which sum to
            the loss; `accuracy`, the share of codes that the likeliest digits hit.
        """
        codes = batch["codes"]
        more = self.prior.told(batch, self.config.label_dropout if self.training else 0.0)
        nll, hits = self.prior.head.score(self.prior.features(codes, **more), codes.flatten(1))  # b n k, b n
        digits = nll.mean((0, 1))
        loss = digits.sum()
        metrics = {f"nll_{i + 1}": value for i, value in enumerate(digits.detach())}
        accuracy = hits.float().mean()
        return loss, {"bits_per_code": loss.detach() / math.log(2), **metrics, "accuracy": accuracy}
