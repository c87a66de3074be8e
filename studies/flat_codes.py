"""Codes without their digits: what a flat codebook would have called them."""

from dataclasses import replace
from pathlib import Path

import torch

from smalti.core.codes import Layout
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.writer import LatentSetWriter

WRITTEN_ROWS = 4_096
"""Rows that are in memory at once."""


def flatten_codes(latents: LatentSet, path: Path) -> None:
    """Writes the same set with the same codes, as numbers of one digit: those of a flat codebook."""
    levels = tuple(replace(level, radices=(level.codebook_size,)) for level in latents.layout.levels)
    columns = {name: getattr(latents, name) for name in ("labels", "source_ids", "held_out", "flipped")}
    with LatentSetWriter(path, Layout(levels), **columns, provenance=latents.provenance) as writer:
        for rows in torch.arange(len(latents)).split(WRITTEN_ROWS):
            writer.write(int(rows[0]), latents.batch(rows))
