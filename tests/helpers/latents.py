"""Latent sets for tests: a provenance, layouts, random codes and columns, and functions that write them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from smalti.core.codes import Codes, Layout, Level
from smalti.latentsets.provenance import Provenance
from smalti.latentsets.writer import LatentSetWriter

PROVENANCE = Provenance(
    tokenizer_kind="hrvq",
    tokenizer_config={"branching": 8, "widths": (16, 32)},
    tokenizer_digest="ab" * 32,
    tokenizer_source="runs/tokenizers/hrvq",
    image_source="emoji",
    image_fingerprint="f00d",
    preprocessing={"size": [32, 32]},
)


GRID = Layout((Level(3, 4, (8, 8, 8)),))


LEVELS = [
    *(Level(3, 2, radices) for radices in [(2,), (256,), (257,), (8, 8, 8), (65536,), (41, 41, 41), (2**31 - 1,)]),
    Level(1, 1, (512,)),
    Level(4, 1, channels=3),
]


def make_codes(layout: Layout, rows: int, seed: int = 0) -> Codes:
    """Draws random codes that include the first and last code of every codebook."""
    rng = np.random.default_rng(seed)
    grids = []
    for level in layout.levels:
        shape = (rows, *level.shape)
        if level.channels:
            grids.append(torch.from_numpy(rng.normal(size=shape).astype(np.float32)))
        else:
            grid = torch.from_numpy(rng.integers(0, level.codebook_size, shape))
            grid.view(-1)[0], grid.view(-1)[-1] = 0, level.codebook_size - 1
            grids.append(grid)
    return tuple(grids)


def make_columns(rows: int) -> dict[str, torch.Tensor]:
    """Makes columns with two rows per source image, the second mirrored; every third source is held out."""
    numbers = torch.arange(rows)
    sources = numbers // 2
    return {
        "labels": numbers % 5 - 1,
        "source_ids": sources,
        "held_out": sources % 3 == 1,
        "flipped": numbers % 2 == 1,
    }


def write(path: Path, layout: Layout, codes: Codes, cuts: list[int], provenance: Provenance = PROVENANCE) -> None:
    """Writes a latent set in blocks that begin at `cuts`, in that order."""
    rows = len(codes[0])
    with LatentSetWriter(path, layout, **make_columns(rows), provenance=provenance) as writer:
        for start in cuts:
            end = min([cut for cut in cuts if cut > start], default=rows)
            writer.write(start, tuple(grid[start:end] for grid in codes))


def opened(path: Path, mode: str) -> Any:
    """Opens a file with h5py, typed as `Any` because h5py's types are unions."""
    return h5py.File(path, mode)


CONDITION_WIDTH = 5


def extended_set(path: Path, rows: int = 60) -> tuple[Codes, torch.Tensor, list[str]]:
    """Writes a set with a vector for each row, and a caption for every row but one; returns what it wrote."""
    codes = make_codes(GRID, rows)
    vectors = torch.from_numpy(np.random.default_rng(1).normal(size=(rows, CONDITION_WIDTH))).half()
    captions = ["", *(f"caption é {row}" for row in range(1, rows))]
    provenance = replace(PROVENANCE, condition_source="an encoder")
    added = {"condition_width": CONDITION_WIDTH, "captions": captions, "provenance": provenance}
    with LatentSetWriter(path, GRID, **make_columns(rows), **added) as writer:
        writer.write(0, codes, vectors)
    return codes, vectors, captions


def small_set(path: Path, rows: int = 60) -> Codes:
    codes = make_codes(GRID, rows)
    write(path, GRID, codes, [0])
    return codes
