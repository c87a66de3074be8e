"""Benchmark of colour matching: composing a fill into images of 1, 4 and 12 megapixels."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from smalti.benchmarks.comparison import Comparison, Variant
from smalti.core.randomness import generator_for, row_seeds
from smalti.images.blending import compose
from smalti.images.masks import strokes

SIZES = ((864, 1152), (1728, 2304), (3024, 4032))


def blending(sizes: Sequence[tuple[int, int]] = SIZES) -> Iterator[Comparison]:
    """Measures one fill of a stroke that covers 16% of the image."""
    variants = []
    for height, width in sizes:
        pixels = torch.randint(256, (1, 3, height, width), dtype=torch.uint8, generator=generator_for(0))
        filled = torch.rand(1, 3, height, width, generator=generator_for(1)) * 2 - 1
        mask = strokes(row_seeds(3, torch.arange(1)), height, width)
        work = partial(compose, pixels, filled, mask, feather_pixels=0, match_colour=True)
        variants.append(Variant(f"{width}×{height}", work))
    yield Comparison("a fill with matched colours composed into its image", variants)
