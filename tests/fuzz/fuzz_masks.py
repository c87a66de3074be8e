"""Fuzzes mask files, and pairs of an image and a mask, through the loading of masks.

$ python tests/fuzz/fuzz_masks.py --seconds 60 --seed 0
"""

import random
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from fuzzing import main
from hostile_images import available, hostile, mask_like, valid

from smalti.images.masks import known_codes, load_mask, refuse_swapped

FORMATS = ("PNG", "PNG", "WEBP", "TIFF", "GIF", "BMP")
MODES = ("1", "L", "LA", "RGBA", "P", "RGB")
SIZES = ((24, 17), (24, 17), (24, 17), (1, 1), (500, 3), (64, 64))


def make(rng: random.Random, folder: Path) -> tuple[Path, dict[str, Any]]:
    path, size = folder / "mask.png", rng.choice(SIZES)
    if rng.random() < 0.5:
        file = BytesIO()
        try:
            mask_like(rng, rng.choice(MODES), size).save(file, rng.choice(FORMATS))
        except OSError:  # a mode that the format lacks
            mask_like(rng, "L", size).save(file, "PNG")
        content = file.getvalue()
    else:
        content = valid(rng.choice(available()))
    path.write_bytes(hostile(content, rng) if rng.random() < 0.9 else content)
    width, height = rng.choice((size, rng.choice(SIZES)))
    settings = {name: rng.random() < 0.5 for name in ("invert", "resize", "erased")}
    return path, {"height": height, "width": width, "threshold": rng.choice((0, 127, 254)), **settings}


def read(case: tuple[Path, dict[str, Any]]) -> None:
    path, settings = case
    height, width = settings["height"], settings["width"]
    mask = load_mask(path, **settings)
    assert mask.dtype == torch.bool
    assert mask.shape == (height, width)
    assert 0 < mask.sum() < mask.numel()
    known_codes(mask[None], 1)
    refuse_swapped(Path("image.png"), torch.zeros(3, height, width, dtype=torch.uint8), path)


if __name__ == "__main__":
    main(make, read)
