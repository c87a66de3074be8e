"""Images to a small file of codes at a fixed rate, and back. How the file is written is in `packing.py`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalti.commands.build_latents import images_for
from smalti.commands.model_paths import RUNS, load_tokenizer, of_layer
from smalti.core.codes import Codes
from smalti.core.devices import Device, device
from smalti.core.errors import UserError
from smalti.core.progress import SLOW_SECONDS, bar
from smalti.core.randomness import derive, row_seeds
from smalti.images.decoding import to_float
from smalti.images.sheets import save_png, to_image
from smalti.latentsets.packed_file import bits_per_image, read_codes, write_codes
from smalti.metrics.image_errors import mse, psnr
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.hqa.hqa import HQA

_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Compress:
    """How to compress images."""

    tokenizer: str = "hqa"
    """A trained tokenizer, of any kind: a kind (the one in runs/tokenizers/KIND), a folder, or a hub id."""
    layer: int | None = None
    """Of hqa and hams, the layer whose codes are kept: the lower, the more bits and the less error [default: the top].
    """
    images: str | None = None
    """An image, a folder of images, Parquet files or a hub id [default: what the tokenizer was trained on]."""
    height: int | None = None
    """Height of the images in pixels, if not the tokenizer's own."""
    width: int | None = None
    """Width of the images in pixels, if not the tokenizer's own."""
    device: Device = "auto"
    """Where to compute."""
    out: Path = RUNS / "images.smalti"
    """The file."""


@dataclass(frozen=True)
class Decompress:
    """How to turn a compressed file back into images."""

    codes: Path
    """The file, from compress.py."""
    tokenizer: str = "hqa"
    """The tokenizer that made it: a kind, a folder or a hub id. Its layer is the file's."""
    decodes: int = 0
    """Decodes to sample of each image, beside the most probable one; of hqa and hams alone."""
    seed: int = 0
    """Decides the samples; that of an image and its number hangs on nothing else."""
    device: Device = "auto"
    """Where to compute."""
    out: Path = RUNS / "decompressed"
    """Folder of the PNGs: 00000.png, 00000-sample-1.png, ..."""

    def __post_init__(self) -> None:
        if self.decodes < 0:
            raise UserError(f"--decodes must not be negative, not {self.decodes}")


def compress(config: Compress) -> Path:
    """Writes the codes of images, and prints the rate, and the error of what they decode to; returns the file.

    Raises:
        UserError: for a tokenizer or images that will not do.
    """
    source = of_layer(config.tokenizer, config.layer)
    where = device(config.device)
    tokenizer = load_tokenizer(source).to(where)
    images = images_for(tokenizer, config.tokenizer, config.images, config.height, config.width)
    parts, errors = [], []
    progress = bar(what="compressing", total=len(images), unit="image", delay_seconds=SLOW_SECONDS)
    with progress:
        for rows in torch.arange(len(images)).split(_ROWS_AT_ONCE):
            batch = to_float(images.pixels(rows)).to(where)
            parts.append(tokenizer.encode(batch))
            errors.append(mse(decode(tokenizer, parts[-1]), batch).cpu())
            progress.update(len(rows))
    codes = tuple(torch.cat(grids) for grids in zip(*parts, strict=True))
    layout = tokenizer.layout.resized([(grid.shape[1], grid.shape[2]) for grid in codes])
    header = {"tokenizer_kind": tokenizer.kind, "tokenizer_digest": tokenizer.digest(), "layer": config.layer}
    size, bits, error = write_codes(config.out, codes, layout, header), bits_per_image(layout), torch.cat(errors).mean()
    pixels = images.preprocessing["height"] * images.preprocessing["width"]
    payload = -(-len(images) * bits // 8)
    print(
        f"{config.out}: {len(images)} image(s), {layout}\n"
        f"rate: {bits} bits an image, {bits / pixels:.4g} a pixel; {payload} bytes of codes, "
        f"{size - payload} of header\n"
        f"distortion: MSE {float(error):.4g}, PSNR {float(psnr(error)):.2f} dB, of the most probable decodes"
    )
    return config.out


def decompress(config: Decompress) -> Path:
    """Writes the images that a file decodes to, and prints its rate; returns their folder.

    Raises:
        UserError: for a file that is damaged or of another tokenizer, or samples of a tokenizer that has one decode.
    """
    loaded: list[Tokenizer] = []

    def expected(header: dict[str, Any]) -> None:
        tokenizer = load_tokenizer(of_layer(config.tokenizer, header.get("layer")))
        if header.get("tokenizer_digest") != tokenizer.digest():
            raise UserError(
                f"{config.codes} holds codes of {header.get('tokenizer_kind')} "
                f"{str(header.get('tokenizer_digest'))[:12]}, but {config.tokenizer} is {tokenizer.digest()[:12]}; "
                "give --tokenizer the one that made it"
            )
        loaded.append(tokenizer)

    packed = read_codes(config.codes, expected)
    where = device(config.device)
    tokenizer = loaded[0].to(where)
    if config.decodes and not isinstance(tokenizer, HQA):
        raise UserError(f"{tokenizer.kind} has one decode of each code; leave --decodes out")
    config.out.mkdir(parents=True, exist_ok=True)
    images = len(packed.codes[0])
    for rows in torch.arange(images).split(_ROWS_AT_ONCE):
        codes = tuple(grid[rows].to(where) for grid in packed.codes)
        for number in range(config.decodes + 1):
            seeds = derive(row_seeds(config.seed, rows), number).to(where) if number else None
            suffix = f"-sample-{number}" if number else ""
            for row, image in zip(rows.tolist(), decode(tokenizer, codes, seeds), strict=True):
                save_png(config.out / f"{row:05d}{suffix}.png", to_image(image))
    bits = bits_per_image(packed.layout)
    print(f"{config.out}: {images} image(s) of {bits} bits each, {packed.layout}, from {packed.size_bytes} bytes")
    return config.out


@torch.no_grad()
def decode(tokenizer: Tokenizer, codes: Codes, seeds: Tensor | None = None) -> Tensor:
    """Images of codes: the most probable, or with seeds, which kinds with one decode never see, samples."""
    return tokenizer.decode(codes, seeds=seeds) if isinstance(tokenizer, HQA) else tokenizer.decode(codes)
