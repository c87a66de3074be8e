"""Latent sets with the same codes as single digits, as a flat codebook would number them."""

from dataclasses import replace
from pathlib import Path

import torch

from smalti.core.codes import Layout
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.writer import LatentSetWriter

ROWS_AT_ONCE = 4_096
"""Rows that are in memory at a time."""


def flat_latents(path: Path) -> Path:
    """Returns the flat copy of a latent set, in a file beside it; writes it if it does not exist."""
    flat = path.with_stem(f"{path.stem}-flat")
    if not flat.exists():
        flatten_codes(LatentSet(path), flat)
    return flat


def flatten_codes(latents: LatentSet, path: Path) -> None:
    """Writes a latent set with the same codes in levels of one digit each."""
    levels = tuple(replace(level, radices=(level.codebook_size,)) for level in latents.layout.levels)
    columns = {name: getattr(latents, name) for name in ("labels", "source_ids", "held_out", "flipped")}
    with LatentSetWriter(path, Layout(levels), **columns, provenance=latents.provenance) as writer:
        for rows in torch.arange(len(latents)).split(ROWS_AT_ONCE):
            writer.write(int(rows[0]), latents.batch(rows))
