"""Benchmarks of ancestral sampling: caches against full recomputation, and the samplers of all kinds of priors.

Each function yields comparisons; measuring and the report are in `comparison.py` and `run.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from smalti.benchmarks.comparison import Comparison, Variant
from smalti.benchmarks.priors import DEMONSTRATION, DEMONSTRATION_PIXELCNN, random_codes
from smalti.core.devices import autocast, best_device
from smalti.core.randomness import Stream, derive, row_seeds, uniform
from smalti.priors.base import CausalPrior, CodePrior, PriorConfig
from smalti.priors.conditioning import no_condition
from smalti.priors.methods.autoregressive import AncestralSampling, sample_ancestral
from smalti.priors.networks.hourglass import Hourglass
from smalti.priors.networks.maskgit import MaskGIT
from smalti.priors.networks.pixelcnn import PixelCNN
from smalti.priors.networks.transformer import Transformer, TransformerConfig

CAUSAL: tuple[tuple[type[CausalPrior], PriorConfig, float], ...] = (
    (PixelCNN, DEMONSTRATION_PIXELCNN, 100.0),
    (Transformer, TransformerConfig(), 20.0),
)
"""Causal priors, and the factor by which their cached ancestral sampling must be faster than the naive sampler, at
32x32 and 16 samples."""


def ancestral(
    *,
    batches: Sequence[int] = (16, 1, 64),
    side: int = 32,
    sides: Sequence[int] = (8, 16, 32),
    positions: int = 1,
    causal: Sequence[tuple[type[CausalPrior], PriorConfig, float]] = CAUSAL,
    parallel: Sequence[tuple[type[CodePrior], PriorConfig]] = ((Hourglass, DEMONSTRATION), (MaskGIT, DEMONSTRATION)),
) -> Iterator[Comparison]:
    """Compares cached ancestral sampling with recomputing the whole grid for each position, then all samplers.

    The naive sampler takes equally long for every position, so it samples only the first `positions`.
    """
    device = best_device()
    for cls, config, target in causal:
        network = cls(replace(config, height=side, width=side)).to(device).eval()
        for batch in batches:
            nothing = nothing_known(network, batch)
            rest = (torch.arange(side * side, device=device) >= positions).view(side, side).expand(batch, -1, -1)
            yield Comparison(
                f"codes of a {side}x{side} grid drawn one by one by a {cls.kind}, a position of {batch} samples",
                (
                    Variant("smalti", partial(sample_ancestral, network, **nothing), side * side),
                    Variant(
                        f"the whole grid anew for each position ({positions} of {side * side} timed)",
                        partial(sample_naively, network, nothing["known"], rest, nothing["seeds"], AncestralSampling()),
                        positions,
                        target=target if batch == 16 else None,
                    ),
                ),
            )
    for side in sides:
        networks = [
            cls(replace(config, height=side, width=side)).to(device).eval()
            for cls, config, *_ in (*reversed(causal), *parallel)
        ]
        yield Comparison(
            f"a sample of {side}x{side} codes, of {min(batches)} at once, by the default sampler",
            [Variant(each.kind, partial(sample_by_default, each, min(batches)), min(batches)) for each in networks],
        )


def nothing_known(network: CodePrior, batch: int) -> dict[str, Any]:
    """Returns the arguments of a sampler that generates `batch` grids; the known codes are random and ignored."""
    codes = random_codes(network, batch)
    seeds = row_seeds(0, torch.arange(batch, device=codes.device))
    return {"known": codes, "known_mask": torch.zeros_like(codes, dtype=torch.bool), "seeds": seeds}


def sample_by_default(network: CodePrior, batch: int) -> Tensor:
    """Samples grids with the default settings of the prior's own sampler."""
    method = network.method
    with autocast(network.head.weight.device, "auto"):
        return method.sampler(network, **nothing_known(network, batch), sampling=method.sampling())


@torch.no_grad()
def sample_naively(
    prior: CausalPrior,
    known: Tensor,
    known_mask: Tensor,
    seeds: Tensor,
    sampling: AncestralSampling,
    condition: Tensor | None = None,
    upper: tuple[Tensor, ...] = (),
) -> Tensor:
    """Samples in raster order without caches: recomputes the features of the whole grid at each position.

    It returns the codes of `sample_ancestral`. Positions known in every row cost nothing.
    """
    head, (b, h, w) = prior.head, known.shape
    codes = torch.where(known_mask, known, 0)
    first = derive(derive(seeds, Stream.PARTICLE, torch.zeros_like(seeds)), Stream.AUTOREGRESSIVE_DRAW)
    draws = uniform(first, h * w, len(head.radices))
    for position in (~known_mask).flatten(1).any(0).nonzero().flatten().tolist():
        features, unconditional = prior.features(codes, condition, upper), None
        if condition is not None and sampling.guidance != 1:
            unconditional = prior.features(codes, no_condition(condition), upper)
        sampled = head.sample(
            features, draws, sampling.temperature, unconditional=unconditional, guidance=sampling.guidance
        )
        current = torch.zeros_like(known_mask).view(b, -1)
        current[:, position] = True
        codes = torch.where(current.view_as(known_mask) & ~known_mask, sampled.view_as(codes), codes)
    return codes
