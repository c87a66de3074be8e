"""How many bits a prior needs for codes it was never trained on: exactly, over a whole latent set of any size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.core.errors import UserError
from smalti.latentsets.dataset import LatentRows, Split
from smalti.latentsets.reader import LatentSet
from smalti.priors.base import CausalPrior, Prior


@dataclass(frozen=True)
class Bits:
    """What was found; the codes' labels, where a prior has classes, are told it and cost nothing.

    Attributes:
        per_code: of each level, coarsest first.
        standard_errors: of these, from the spread over rows, as if no two were of one image.
        per_dimension: of all levels together, for each number (pixel and channel) of the images that the codes stand
            for. It leaves out what decoding gets wrong: a rate, no likelihood of images.
        rows: how many images were counted.
    """

    per_code: tuple[float, ...]
    standard_errors: tuple[float, ...]
    per_dimension: float
    rows: int


@torch.no_grad()
def count_bits(priors: Sequence[Prior], latents: LatentSet, *, split: Split = "held_out", batch_size: int = 64) -> Bits:
    """-log2 p of the codes of all rows on one side, read batch by batch, in float32 whatever the autocast.

    Args:
        priors: of each level, coarsest first, in evaluation mode.
        latents: of the tokenizer that they were trained with.
        split: `held_out`, `train` or `all`.
        batch_size: rows at once.

    Raises:
        UserError: if a prior's likelihood is not known exactly, there is not one for each level, their codes are not
            those of the set, or the set has no such rows.
    """
    if len(priors) != len(latents.layout.levels):
        raise UserError(f"{latents.path} has {len(latents.layout.levels)} level(s), but {len(priors)} priors are given")
    found = []
    for number, (prior, level) in enumerate(zip(priors, latents.layout.levels, strict=True)):
        if not isinstance(prior, CausalPrior):
            raise UserError(f"a {prior.kind} has no exact likelihood of codes; a pixelcnn has")
        if (prior.level.radices, prior.upper_levels) != (level.radices, number):
            raise UserError(f"the prior given for level {number} of {latents.path} is not for codes of {level.radices}")
        found.append(_bits_per_row(prior, LatentRows(latents, split=split, level=number), batch_size))
    size = latents.provenance.preprocessing
    per_code = [bits / level.positions for bits, level in zip(found, latents.layout.levels, strict=True)]
    return Bits(
        per_code=tuple(float(bits.mean()) for bits in per_code),
        standard_errors=tuple(float(bits.std() / len(bits) ** 0.5) for bits in per_code),
        per_dimension=float(sum(bits.mean() for bits in found)) / (size["height"] * size["width"] * size["channels"]),
        rows=len(found[0]),
    )


def _bits_per_row(prior: CausalPrior, rows: LatentRows, batch_size: int) -> Float[Tensor, " rows"]:
    where = next(prior.parameters()).device
    found = []
    for numbers in torch.arange(len(rows)).split(batch_size):
        batch = {name: tensor.to(where) for name, tensor in rows.__getitems__(numbers.tolist()).items()}
        with torch.autocast(where.type, enabled=False):
            features = prior.features(batch["codes"], **prior.conditioning(batch))
            nats = prior.head.nll(features, batch["codes"].flatten(1))  # b n
        found.append(nats.double().sum(1).cpu() / math.log(2))
    return torch.cat(found)
