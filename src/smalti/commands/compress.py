"""Compresses images to a small file of codes at a fixed rate, and decompresses such a file.

The file format is in `latentsets/packed_file.py`.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalti.commands.model_paths import RUNS, image_inputs, images_for, layer_source, load_tokenizer
from smalti.core import locks
from smalti.core.codes import Codes, Layout
from smalti.core.config import flatten
from smalti.core.devices import Device, device
from smalti.core.errors import UserError
from smalti.core.files import file_digest
from smalti.core.progress import SLOW_SECONDS, bar
from smalti.core.provenance import versions
from smalti.core.randomness import derive, row_seeds
from smalti.images.decoding import to_float, to_uint8
from smalti.images.image_set import ImageSet
from smalti.images.reading import Reading
from smalti.images.sheets import embedded_settings, image_paths, save_image
from smalti.latentsets.packed_file import bits_per_image, find_name_error, read_codes, read_header, write_codes
from smalti.metrics.image_errors import mse, psnr
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.hqa.hqa import HQA

_BATCH_SIZE = 64


@dataclass(frozen=True)
class Compress:
    """Settings of `compress`."""

    tokenizer: str = "hqa"
    """Any trained tokenizer: a kind (read from runs/tokenizers/KIND), a folder, or a hub id."""
    layer: int | None = None
    """Layer whose codes are kept, counted from 1 at the image; only for hqa and hams. A lower layer takes more bits and
    has less error [default: the top layer]."""
    images: str | None = None
    """An image, a folder of images, or any other source that `train-tokenizer` reads [default: the images that the
    tokenizer was trained on]."""
    reading: Reading = field(default_factory=Reading)
    height: int | None = None
    """Height of the images in pixels [default: as trained]."""
    width: int | None = None
    """Width of the images in pixels [default: as trained]."""
    device: Device = "auto"
    """Device that encodes the images."""
    out: Path | None = None
    """The file to write [default: runs/NAME.smalti, with the name of --images]."""
    overwrite: bool = False
    """Replace an existing file. Without it, only a file that this command made from the same images is replaced."""


@dataclass(frozen=True)
class Decompress:
    """Settings of `decompress`."""

    codes: Path
    """A file that compress.py wrote."""
    tokenizer: str = "hqa"
    """The tokenizer that made the file: a kind, a folder or a hub id. The file records the layer."""
    decodes: int = 0
    """Sampled decodes of each image, besides the most probable one; only for hqa and hams."""
    seed: int = 0
    """Seed of the sampled decodes. Each sample depends on the seed, its image's row and its number alone."""
    device: Device = "auto"
    """Device that decodes the images."""
    out: Path | None = None
    """Folder for the PNGs, which have the names of the compressed files, or 00000.png and so on if the images were not
    in files; sampled decodes have -sample-1 and so on after the name [default: runs/NAME, with the name of --codes]."""
    overwrite: bool = False
    """Replace existing files. Without it, only images that this command made from the same codes are replaced."""

    def __post_init__(self) -> None:
        if self.decodes < 0:
            raise UserError(f"--decodes must not be negative, not {self.decodes}")


def compress(config: Compress) -> Path:
    """Writes the codes of images to a file and prints rate and distortion; returns the file.

    Raises:
        UserError: for an unsuitable tokenizer or unsuitable images.
    """
    encoding_device = device(config.device)
    source = layer_source(config.tokenizer, config.layer)
    tokenizer = load_tokenizer(source).to(encoding_device)
    images = images_for(tokenizer, config.tokenizer, config.images, config.height, config.width, config.reading)
    out = config.out or RUNS / f"{_file_name(images.source)}.smalti"

    def is_own(path: Path) -> bool:
        return read_header(path).get("images_fingerprint") == images.fingerprint

    inputs = image_inputs(config.images, tokenizer=source)
    with locks.claim([out], inputs=inputs, overwrite=config.overwrite, is_own=is_own):
        _compress(config, out, tokenizer, images)
    return out


def _names(images: ImageSet, kept: Tensor) -> list[str] | None:
    """Returns the names of the images' files, without suffix unless they would then repeat; None for no names."""
    if (files := images.file_names()) is None:
        return None
    chosen = [files[index] for index in kept.tolist()]
    stems = [str(Path(name).with_suffix("")) for name in chosen]
    counts = Counter(stem.casefold() for stem in stems)
    names = [stem if counts[stem.casefold()] == 1 else name for name, stem in zip(chosen, stems, strict=True)]
    return None if find_name_error(names, len(names)) else names


def _file_name(source: str) -> str:
    """Returns a name for the codes of images: the last part of their path or hub id, without wildcards."""
    return re.sub(r"[^\w.-]+", "-", Path(source).stem).strip("-.") or "images"


def _compress(config: Compress, out: Path, tokenizer: Tokenizer, images: ImageSet) -> None:
    encoding_device = next(tokenizer.parameters()).device
    batches, errors, kept = [], [], (~images.left_out).nonzero().squeeze(1)
    progress = bar(what="compressing", total=len(kept), unit="image", delay_seconds=SLOW_SECONDS)
    with progress:
        for rows in kept.split(_BATCH_SIZE):
            batch = to_float(images.pixels(rows)).to(encoding_device)
            batches.append(tokenizer.encode(batch))
            with torch.no_grad():
                errors.append(mse(tokenizer.decode(batches[-1]), batch).cpu())
            progress.update(len(rows))
    codes = tuple(torch.cat(grids) for grids in zip(*batches, strict=True))
    layout = tokenizer.layout.resized([(grid.shape[1], grid.shape[2]) for grid in codes])
    header = {"tokenizer_kind": tokenizer.kind, "tokenizer_digest": tokenizer.digest(), "layer": config.layer}
    header["images_fingerprint"] = images.fingerprint
    if names := _names(images, kept):
        header["names"] = names
    size, bits, error = write_codes(out, codes, layout, header), bits_per_image(layout), torch.cat(errors).mean()
    pixels = images.preprocessing["height"] * images.preprocessing["width"]
    payload = -(-len(kept) * bits // 8)
    print(
        f"{out}: {len(kept)} image(s), {layout}\n"
        f"rate: {bits} bits an image, {bits / pixels:.4g} a pixel; {payload} bytes of codes, "
        f"{size - payload} of header\n"
        f"distortion: MSE {float(error):.4g}, PSNR {float(psnr(error)):.2f} dB, for the most probable decodes"
    )


def decompress(config: Decompress) -> Path:
    """Decodes a file to PNG images and prints its rate; returns their folder.

    Raises:
        UserError: for a damaged file or one of another tokenizer, and for sampled decodes with a
            tokenizer whose decoding is deterministic.
    """
    loaded: list[Tokenizer] = []

    def load_matching(header: dict[str, Any]) -> None:
        tokenizer = load_tokenizer(layer_source(config.tokenizer, header.get("layer")))
        if header.get("tokenizer_digest") not in tokenizer.digests_of_codes():
            raise UserError(
                f"{config.codes} was made by {header.get('tokenizer_kind')} "
                f"{str(header.get('tokenizer_digest'))[:12]}, but {config.tokenizer} is {tokenizer.digest()[:12]}; "
                "give --tokenizer the one that made it"
            )
        loaded.append(tokenizer)

    packed = read_codes(config.codes, load_matching)
    _require_layout(config, packed.layout, loaded[0])
    decoding_device = device(config.device)
    tokenizer = loaded[0].to(decoding_device)
    if config.decodes and not isinstance(tokenizer, HQA):
        raise UserError(f"{tokenizer.kind} decodes each code to one image; leave --decodes out")
    images, out = len(packed.codes[0]), config.out or RUNS / config.codes.stem
    settings = {"command": "decompress", "codes_sha256": file_digest(config.codes)}

    def is_own(path: Path) -> bool:
        return embedded_settings(path.with_suffix(".png")).items() >= settings.items()

    names = packed.header.get("names") or [f"{row:05d}" for row in range(images)]
    pictures = [out / _png_name(name, number) for name in names for number in range(config.decodes + 1)]
    outputs = [path for picture in pictures for path in image_paths(picture, tokenizer.image_channels)]
    if len({str(path).casefold() for path in outputs}) < len(outputs):
        raise UserError(f"an image of {config.codes} has the name of another's sample; leave --decodes out")
    inputs = [config.codes, *image_inputs(None, tokenizer=config.tokenizer)]
    with locks.claim(outputs, folder=out, inputs=inputs, overwrite=config.overwrite, is_own=is_own):
        _write_images(
            config,
            [out / name for name in names],
            packed.codes,
            tokenizer,
            {**settings, **flatten(config), "versions": versions()},
        )
    bits = bits_per_image(packed.layout)
    print(f"{out}: {images} image(s) of {bits} bits each, {packed.layout}, from {packed.size_bytes} bytes")
    return out


def _png_name(name: str, number: int) -> str:
    """Returns the file of an image's most probable decode, or of a sampled one, counted from 1."""
    return f"{name}-sample-{number}.png" if number else f"{name}.png"


def _write_images(
    config: Decompress, firsts: Sequence[Path], grids: Codes, tokenizer: Tokenizer, settings: dict[str, object]
) -> None:
    decoding_device = next(tokenizer.parameters()).device
    images = len(grids[0])
    for rows in torch.arange(images).split(_BATCH_SIZE):
        codes = tuple(grid[rows].to(decoding_device) for grid in grids)
        for number in range(config.decodes + 1):
            seeds = derive(row_seeds(config.seed, rows), number).to(decoding_device) if number else None
            for row, image in zip(rows.tolist(), _decode(tokenizer, codes, seeds), strict=True):
                path = firsts[row].with_name(_png_name(firsts[row].name, number))
                save_image(path, to_uint8(image), {**settings, "row": row})


def _require_layout(config: Decompress, layout: Layout, tokenizer: Tokenizer) -> None:
    """Refuses codes of other codebooks than the tokenizer's, whose decoder would fail on them or decode other images.

    Raises:
        UserError: if the codebooks differ.
    """
    theirs, ours = ([(level.radices, level.channels) for level in each.levels] for each in (layout, tokenizer.layout))
    if theirs != ours:
        raise UserError(f"{config.codes} holds codes of {layout}, but {config.tokenizer} decodes {tokenizer.layout}")


@torch.no_grad()
def _decode(tokenizer: Tokenizer, codes: Codes, seeds: Tensor | None) -> Tensor:
    """Returns the most probable decodes of codes, or sampled decodes for seeds, which only HQA takes."""
    return tokenizer.decode(codes, seeds=seeds) if isinstance(tokenizer, HQA) else tokenizer.decode(codes)
