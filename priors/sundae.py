"""The SUNDAE objective: learning to repair corrupted codes, and what one's own repairs left wrong. Networks and
samplers are elsewhere.

Legend: b batch, h w grid, n positions, k digits.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.priors.head import FactorizedHead
from smalti.priors.prior import CodePrior, ObjectiveConfig
from smalti.randomness import derive, uniform

Corruption: TypeAlias = Literal["codes", "finer-digits"]

RATE, WHERE, WHAT, UNROLL, DEPTH = range(5)
"""Streams of a row's seed: what each of its draws is for."""


@dataclass(frozen=True)
class SundaeConfig(ObjectiveConfig):
    """Step-unrolled denoising.

    Raises:
        UserError: for fewer than one unrolled step, or a share that is none.
    """

    unrolled_steps: int = 2
    """Repairs in a row that are trained together: the first of corrupted codes, each next of what the one before
    drew."""
    corruption: Corruption = "codes"
    """What becomes of a corrupted code: any of the codebook; or one that shares its leading digits, any number of them
    from none to all but the last, which for linked codebooks is one that looks alike. Codes of one digit have no finer
    ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unrolled_steps < 1:
            raise UserError(f"unrolled_steps must be at least 1, got {self.unrolled_steps}")


class Sundae(nn.Module):
    """Step-unrolled denoising autoencoder (arXiv 2112.06749, Eq. 7; on image codes arXiv 2206.12351).

    The codes are corrupted, at a rate uniform on [0, 1) for each row, by codes uniform over the codebook, or by
    `finer-digits` of it, an option of our own. The prior
    predicts the codes from them; a draw from the prediction, at temperature 1 and without gradient, is what the next
    unrolled step starts from. The loss is the mean cross-entropy of all unrolled steps over all positions, corrupted or
    not.
    """

    def __init__(self, prior: CodePrior, config: SundaeConfig) -> None:
        super().__init__()
        self.prior = prior
        self.config = config

    def forward(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss, in nats per code, and its parts.

        Args:
            batch: `codes` int64 `(b, h, w)`, and `seeds` int64 `(b,)`, another for each row and step of training: they
            decide all draws; and what `CodePrior.told` reads.

        Returns:
            The loss, and detached: `loss_1`, `loss_2`, ... of each unrolled step; `nll_1`, `nll_2`, ... of each digit,
            which sum to the loss; `accuracy`, the share of codes that the first step's likeliest digits repair or keep.
        """
        codes, seeds = batch["codes"], batch["seeds"]
        head, (_, h, w) = self.prior.head, codes.shape
        target = codes.flatten(1)  # b n
        more = self.prior.told(batch, self.config.label_dropout if self.training else 0.0)
        features = self.prior.features(corrupt(head, codes, seeds, self.config.corruption), **more)  # b n d
        scores = [head.score(features, target)]
        for step in range(1, self.config.unrolled_steps):
            draws = uniform(derive(seeds, UNROLL, step), h * w, len(head.radices))
            features = self.prior.features(head.sample(features, draws).view_as(codes), **more)
            scores.append(head.score(features, target))
        nll, hits = zip(*scores, strict=True)  # b n k and b n, of each step
        table = torch.stack([of_step.mean((0, 1)) for of_step in nll])  # steps k
        loss = table.sum(1).mean()
        metrics = {f"loss_{i + 1}": value for i, value in enumerate(table.detach().sum(1))}
        metrics |= {f"nll_{i + 1}": value for i, value in enumerate(table.detach().mean(0))}
        return loss, metrics | {"accuracy": hits[0].float().mean()}


def corrupt(
    head: FactorizedHead, codes: Int64[Tensor, "b h w"], seeds: Int64[Tensor, " b"], corruption: Corruption = "codes"
) -> Int64[Tensor, "b h w"]:
    """Replaces each code, with a probability drawn uniformly for its row, by one drawn uniformly from the codebook; or
    from those that share a number of its leading digits, drawn uniformly too, see `SundaeConfig.corruption`."""
    (_, h, w), digits = codes.shape, len(head.radices)
    rate = uniform(derive(seeds, RATE), 1, 1)  # b 1 1
    where = uniform(derive(seeds, WHERE), h, w) < rate
    drawn = other = head.random_codes(derive(seeds, WHAT), h, w)
    if corruption == "finer-digits":
        kept = (uniform(derive(seeds, DEPTH), h, w) * digits).long()
        for digit in range(1, digits):
            below = math.prod(head.radices[digit:])  # codes that share so many digits
            other = torch.where(kept == digit, codes - codes % below + drawn % below, other)
    return torch.where(where, other, codes)
