"""Writes small image sets for tests: images of one plain colour each, or of grey patches."""

import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image

from smalti.images.image_set import ImageSet
from smalti.metrics.extractors import Extractor

COLOURS = ["red", "lime", "blue", "black", "white", "yellow", "cyan", "magenta", "grey", "navy", "olive", "teal"]


def png(colour: str, size: tuple[int, int] = (32, 32), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def colour_of(image_set: ImageSet, index: int) -> str:
    rgb = tuple(image_set.pixels([index])[0, :, 16, 16].tolist())
    return next(colour for colour in COLOURS if Image.new("RGB", (1, 1), colour).getpixel((0, 0)) == rgb)


def write_patches(root: Path, count: int) -> None:
    """Writes `count` grey images of 28x28 pixels, each of 4x4 patches of random shades."""
    root.mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(count):
        pixels = random.integers(0, 256, (4, 4), dtype=np.uint8).repeat(7, 0).repeat(7, 1)
        Image.fromarray(pixels).save(root / f"{index}.png")


def write_folder(root: Path, names: list[str]) -> Path:
    """Writes one image per name, each in a colour of its own."""
    for name, colour in zip(names, COLOURS, strict=False):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(colour))
    return root


def write_parquet(path: Path, **columns) -> Path:
    """Writes a Parquet file without the metadata by which `datasets` marks image columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def marked(colours: list[str], **columns) -> datasets.Dataset:
    """Returns a table whose column `image` is marked as images."""
    images = [{"bytes": png(colour), "path": None} for colour in colours]
    return datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())


class MeanColours(Extractor):
    """The mean of each colour, in place of a network that takes seconds to load and of distances that take seconds."""

    name, width, size, resampling = "lite0", 3, 8, "none"

    def features(self, colour):
        return colour.float().mean((2, 3))


class Projections(Extractor):
    """Random projections of the pixels at 8x8, as many as a small set of images can tell apart."""

    name, width, size, resampling = "lite0", 48, 8, "none"

    def features(self, colour):
        pixels = F.interpolate(colour.float(), (self.size, self.size), mode="bilinear", antialias=True).flatten(1)
        return pixels @ torch.randn(pixels.shape[1], self.width, generator=torch.Generator().manual_seed(0)).to(pixels)
