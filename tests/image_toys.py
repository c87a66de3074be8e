"""Small image sets that the tests of sources, images and rows make: one plain colour an image."""

import io
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from smalti.images import ImageSet

COLOURS = ["red", "lime", "blue", "black", "white", "yellow", "cyan", "magenta", "grey", "navy", "olive", "teal"]


def png(colour: str, size: tuple[int, int] = (32, 32), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def colour_of(image_set: ImageSet, index: int) -> str:
    rgb = tuple(image_set.pixels([index])[0, :, 16, 16].tolist())
    return next(colour for colour in COLOURS if Image.new("RGB", (1, 1), colour).getpixel((0, 0)) == rgb)


def write_folder(root: Path, names: list[str]) -> Path:
    """One image of its own colour for each name."""
    for name, colour in zip(names, COLOURS, strict=False):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(colour))
    return root


def write_parquet(path: Path, **columns) -> Path:
    """A Parquet file as anything but `datasets` writes it: without marks of what is an image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def marked(colours: list[str], **columns) -> datasets.Dataset:
    """A table whose column `image` says that it holds images."""
    images = [{"bytes": png(colour), "path": None} for colour in colours]
    return datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())
