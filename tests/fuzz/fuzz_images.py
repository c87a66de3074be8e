"""Fuzzes image files through every function that decodes them.

$ python tests/fuzz/fuzz_images.py --seconds 60 --seed 0
"""

import random
from contextlib import suppress
from pathlib import Path

import torch
from fuzzing import main
from hostile_images import available, hostile, valid

from smalti.core.errors import UserError
from smalti.images.decoding import decode, load_image, load_layers, load_transparency

SIZES = ((None, None), (8, 8), (8, 8), (64, 48), (1, 1), (3, 500))


def make(rng: random.Random, folder: Path) -> tuple[Path, int, tuple[int | None, int | None]]:
    path = folder / "case.png"
    path.write_bytes(hostile(valid(rng.choice(available())), rng))
    return path, rng.choice((1, 3)), rng.choice(SIZES)


def read(case: tuple[Path, int, tuple[int | None, int | None]]) -> None:
    path, channels, (height, width) = case
    pixels = decode(path.read_bytes(), channels=channels, height=height, width=width)
    assert pixels.dtype == torch.uint8
    assert pixels.shape[0] == channels
    if height is not None:
        assert pixels.shape[1:] == (height, width)
    load_image(path, channels=channels, height=height, width=width)
    with suppress(UserError):
        load_transparency(path)
    load_layers(path, channels=channels)


if __name__ == "__main__":
    main(make, read)
