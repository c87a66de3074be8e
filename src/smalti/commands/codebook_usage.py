"""How much of its codebooks a tokenizer uses while it trains, and the alarm when they collapse.

Over a whole latent set, `inspect_latents` counts.
"""

import math
import sys

import torch
from torch import Tensor

from smalti.core.codes import Level
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows
from smalti.latentsets.reader import perplexity
from smalti.tokenizers.base import Tokenizer

USAGE_IMAGES, USAGE_BATCH = 1_024, 64
COLLAPSED_BELOW = 0.1
"""The share of codes in use, of those that could be, under which a codebook counts as collapsed."""


@torch.no_grad()
def code_counts(tokenizer: Tokenizer, rows: ImageRows, images: int = USAGE_IMAGES) -> list[Tensor]:
    """How often each code of each level occurs in up to so many images, evenly taken; nothing of continuous levels."""
    count, device = min(images, len(rows)), next(tokenizer.parameters()).device
    counts = [torch.zeros(level.codebook_size if level.radices else 0).long() for level in tokenizer.layout.levels]
    for chosen in torch.arange(count).mul(len(rows)).div(count, rounding_mode="floor").split(USAGE_BATCH):
        batch = to_float(rows.__getitems__(chosen.tolist())["images"]).to(device)
        for codes, total in zip(tokenizer.encode(batch), counts, strict=True):
            if len(total):
                total += torch.bincount(codes.flatten().cpu(), minlength=len(total))
    return counts


class CodebookAlarm:
    """Measures the use of every level's codebook, whole and by its first digits; warns once if one collapses."""

    def __init__(self) -> None:
        self.rung = False

    def measure(self, tokenizer: Tokenizer, rows: ImageRows) -> dict[str, float]:
        """What `rows` need of the codebooks.

        Returns:
            `codes_used`, the share of codes that occur, in (0, 1], and `code_perplexity`, from 1 to the codebook's
            size; of several levels, with their numbers; of the first i of several digits, with `_first_i`.
        """
        levels, found = tokenizer.layout.levels, {}
        for number, (level, counts) in enumerate(zip(levels, code_counts(tokenizer, rows), strict=True)):
            suffix = f"_{number}" if len(levels) > 1 else ""
            for digits in range(1, len(level.radices) + 1):
                name = suffix if digits == len(level.radices) else f"{suffix}_first_{digits}"
                of_digits = counts.view(math.prod(level.radices[:digits]), -1).sum(1)
                found[f"codes_used{name}"] = float((of_digits > 0).float().mean())
                found[f"code_perplexity{name}"] = perplexity(of_digits)
                if _collapsed(of_digits) and not self.rung:
                    self.rung = True
                    _warn(tokenizer, f"level {number}" if suffix else "the codebook", level, digits, of_digits)
        return found


def _collapsed(counts: Tensor) -> bool:
    """Few codes are in use of those that could be; or, of however few, one only."""
    used, possible = int((counts > 0).sum()), min(len(counts), int(counts.sum()))
    return used < COLLAPSED_BELOW * possible or used == 1 < possible


def _warn(tokenizer: Tokenizer, what: str, level: Level, digits: int, counts: Tensor) -> None:
    of = f" (first {digits} of {len(level.radices)} digits)" if digits < len(level.radices) else ""
    print(
        f"\nwarning: {what}{of} collapses: {int((counts > 0).sum())} of {len(counts)} codes are in use, perplexity "
        f"{perplexity(counts):.1f}. Try {tokenizer.collapse_remedy()}",
        file=sys.stderr,
        flush=True,
    )
