"""Codebook usage and perplexity while a tokenizer trains, and a warning on codebook collapse.

`inspect_latents` counts the usage over a whole latent set.
"""

import torch
from torch import Tensor

from smalti.core.codes import Level, perplexity
from smalti.core.progress import print_note
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows
from smalti.tokenizers.base import Tokenizer

USAGE_IMAGES, USAGE_BATCH = 1_024, 64
COLLAPSED_BELOW = 0.1
"""A codebook has collapsed if the share of codes in use, among those that could be, is below this."""


@torch.no_grad()
def code_counts(tokenizer: Tokenizer, rows: ImageRows, images: int = USAGE_IMAGES) -> list[Tensor]:
    """Counts how often each code of each level occurs in up to `images` evenly spaced rows.

    A continuous level has an empty count.
    """
    count = min(images, len(rows))
    counts = [torch.zeros(level.codebook_size if level.radices else 0).long() for level in tokenizer.layout.levels]
    for indices in torch.arange(count).mul(len(rows)).div(count, rounding_mode="floor").split(USAGE_BATCH):
        batch = to_float(rows.__getitems__(indices.tolist())["images"]).to(tokenizer.device)
        for codes, total in zip(tokenizer.encode(batch), counts, strict=True):
            if len(total):
                total += torch.bincount(codes.flatten().cpu(), minlength=len(total))
    return counts


class CodebookAlarm:
    """Measures the usage of every level's codebook, by whole codes and by their first digits.

    Warns once about codebook collapse.
    """

    def __init__(self) -> None:
        self.warned = False

    def measure(self, tokenizer: Tokenizer, rows: ImageRows) -> dict[str, float]:
        """Measures the codebook usage on evenly spaced `rows`.

        Returns:
            `codes_used`, the share of codes that occur, in (0, 1], and `code_perplexity`, from 1 to
            the codebook's size. Names end in the level's number if there are several levels, and in
            `_first_i` for the first i of several digits.
        """
        levels, usage = tokenizer.layout.levels, {}
        for number, (level, counts) in enumerate(zip(levels, code_counts(tokenizer, rows), strict=True)):
            suffix = f"_{number}" if len(levels) > 1 else ""
            for digits in range(1, len(level.radices) + 1):
                name = suffix if digits == len(level.radices) else f"{suffix}_first_{digits}"
                prefix_counts = level.prefix_counts(counts, digits)
                usage[f"codes_used{name}"] = float((prefix_counts > 0).float().mean())
                usage[f"code_perplexity{name}"] = perplexity(prefix_counts)
                if _collapsed(prefix_counts) and not self.warned:
                    self.warned = True
                    _warn(tokenizer, f"level {number}" if suffix else "the codebook", level, digits, prefix_counts)
        return usage


def _collapsed(counts: Tensor) -> bool:
    """Returns whether few of the possible codes are in use, or only one of several."""
    used, possible = int((counts > 0).sum()), min(len(counts), int(counts.sum()))
    return used < COLLAPSED_BELOW * possible or used == 1 < possible


def _warn(tokenizer: Tokenizer, what: str, level: Level, digits: int, counts: Tensor) -> None:
    part = f" (first {digits} of {len(level.radices)} digits)" if digits < len(level.radices) else ""
    print_note(
        f"warning: {what}{part} collapses: {int((counts > 0).sum())} of {len(counts)} codes are in use, perplexity "
        f"{perplexity(counts):.1f}. Try {tokenizer.collapse_remedy()}"
    )
