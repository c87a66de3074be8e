"""Exact bits per code, and bits per dimension, of the codes of a latent set under autoregressive priors.

The likelihood of images under a selfVAE or VAE is in `image_likelihood.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from smalti.core.codes import Split
from smalti.core.errors import UserError
from smalti.latentsets.dataset import LatentRows
from smalti.latentsets.reader import LatentSet
from smalti.priors.base import CausalPrior, Prior
from smalti.priors.methods.autoregressive import require_causal
from smalti.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class CodeBits:
    """The negative log-likelihood of codes, in bits.

    Conditional priors are conditioned on the labels or vectors of the rows, which cost no bits.

    Attributes:
        per_code: mean bits per code of each level, coarsest first.
        standard_errors: the standard error of each of these means over rows, taken as independent.
        per_dimension: bits of all levels together, per pixel and channel of the images that the codes stand for. It
            leaves out the reconstruction error, so it is a rate of the codes and no likelihood of images.
        rows: number of rows evaluated.
    """

    per_code: tuple[float, ...]
    standard_errors: tuple[float, ...]
    per_dimension: float
    rows: int


@torch.no_grad()
def count_bits(
    priors: Sequence[Prior],
    latents: LatentSet,
    *,
    split: Split = "held_out",
    batch_size: int = 64,
    tokenizer: Tokenizer | None = None,
) -> CodeBits:
    """Computes -log2 p of the codes of all rows of a split, batch by batch, in float32 even under autocast.

    Args:
        priors: one per level, coarsest first, in evaluation mode.
        latents: a latent set of the tokenizer that the priors were trained with.
        split: `held_out`, `train` or `all`.
        batch_size: rows that a prior receives at once.
        tokenizer: if the latent set has another tokenizer than the priors, one that was trained from the other one with
            encoder and codebook frozen, so that both have the same codes.

    Raises:
        UserError: if a prior has no exact likelihood, the number of priors differs from that of the levels, a prior was
            trained for other codes, or the split is empty.
    """
    levels = latents.layout.levels
    if len(priors) != len(levels):
        raise UserError(f"{latents.path} has {len(levels)} level(s), but {len(priors)} priors are given")
    bits = []
    for index, (prior, level) in enumerate(zip(priors, levels, strict=True)):
        causal = require_causal(prior)
        _require_same_codes(prior, latents, tokenizer)
        if (prior.level.radices, prior.upper_levels) != (level.radices, index):
            raise UserError(f"the prior given for level {index} of {latents.path} is not for codes of {level.radices}")
        bits.append(_bits_per_row(causal, latents, split, index, batch_size))
    per_code = [level_bits / level.positions for level_bits, level in zip(bits, levels, strict=True)]
    size = latents.provenance.preprocessing
    dimensions = size["height"] * size["width"] * size["channels"]
    return CodeBits(
        per_code=tuple(float(each.mean()) for each in per_code),
        standard_errors=tuple(float(each.std() / len(each) ** 0.5) for each in per_code),
        per_dimension=float(sum(each.mean() for each in bits)) / dimensions,
        rows=len(bits[0]),
    )


def _require_same_codes(prior: Prior, latents: LatentSet, tokenizer: Tokenizer | None) -> None:
    """Refuses codes of another tokenizer, whose numbers mean something else. Priors may not record theirs."""
    trained, stored = prior.provenance.get("tokenizer_digest"), latents.provenance.tokenizer_digest
    digests = tokenizer.digests_of_codes() if tokenizer else ()
    if trained and stored and trained != stored and not {trained, stored} <= set(digests):
        raise UserError(
            f"the prior was trained on codes of the tokenizer {trained[:12]}, but {latents.path} has those of "
            f"{stored[:12]}; build a latent set with the prior's tokenizer, or pass a tokenizer with the codes of both"
        )


def _bits_per_row(
    prior: CausalPrior, latents: LatentSet, split: Split, level: int, batch_size: int
) -> Float[Tensor, " rows"]:
    rows = LatentRows(latents, split=split, level=level, conditions=bool(prior.condition_width))
    device = prior.device
    bits = []
    for indices in torch.arange(len(rows)).split(batch_size):
        batch = {name: tensor.to(device) for name, tensor in rows.__getitems__(indices.tolist()).items()}
        nats = nats_per_code(prior, batch["codes"], **prior.conditioning(batch))
        bits.append(nats.sum(1).cpu() / math.log(2))
    return torch.cat(bits)


def nats_per_code(prior: CausalPrior, codes: Int64[Tensor, "b h w"], **conditioning: Any) -> Float64[Tensor, "b n"]:
    """Computes -log p of each code given those before it, in nats, with the network in float32 even under autocast.

    `conditioning` is that of `CodePrior.features`: the condition and the codes of the coarser levels.
    """
    with torch.autocast(prior.device.type, enabled=False):
        features = prior.features(codes, **conditioning)
        return prior.head.nll(features, codes.flatten(1)).double()
