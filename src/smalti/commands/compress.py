"""Compresses images to a small file of codes, at a fixed rate or by a prior, and decompresses such a file.

The file format is in `latentsets/packed_file.py`, the entropy coding in `priors/methods/entropy_coding.py`.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalti.commands.class_labels import first_conditional, numbers_of
from smalti.commands.model_paths import (
    RUNS,
    image_inputs,
    images_for,
    layer_source,
    load_priors,
    load_tokenizer,
)
from smalti.core import locks
from smalti.core.codes import Codes, Layout
from smalti.core.config import flatten
from smalti.core.devices import Device, device
from smalti.core.errors import UserError
from smalti.core.files import input_digest
from smalti.core.progress import SLOW_SECONDS, bar
from smalti.core.provenance import versions
from smalti.core.randomness import derive, row_seeds
from smalti.images.decoding import to_float, to_uint8
from smalti.images.image_set import ImageSet
from smalti.images.reading import Reading
from smalti.images.sheets import embedded_settings, image_paths, save_image
from smalti.latentsets.packed_file import Packed, bits_per_image, find_name_error, read_codes, read_header, write_codes
from smalti.metrics.image_errors import mse, psnr
from smalti.priors.base import Prior
from smalti.priors.methods.autoregressive import require_causal
from smalti.priors.methods.entropy_coding import decode_codes, encode_codes
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.hqa.hqa import HQA

_BATCH_SIZE = 64
_DEFAULT_TOKENIZER = "hqa"


@dataclass(frozen=True)
class Compress:
    """Settings of `compress`."""

    tokenizer: str | None = None
    """Any trained tokenizer: a kind (read from runs/tokenizers/KIND), a folder, or a hub id [default: hqa; with --prior
    the copy in the prior's folder]."""
    prior: tuple[str, ...] = ()
    """Entropy-code with the probabilities of a trained transformer or pixelcnn: a kind (read from runs/priors/KIND), a
    folder, or a hub id. Give one for each level if the tokenizer has several levels. Needs the
    extra `entropy` [default: every code in the fewest whole bits]."""
    classes: bool = False
    """Give the priors each image's class, which the file then holds too. Without it, class-conditional
    priors encode without the class."""
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
    tokenizer: str | None = None
    """The tokenizer that made the file: a kind, a folder or a hub id. The file records the layer [default: hqa; with
    --prior the copy in the prior's folder]."""
    prior: tuple[str, ...] = ()
    """The priors that coded the file, if any did: kinds, folders or hub ids, in any order."""
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
    if config.layer is not None and config.prior and config.tokenizer is None:
        raise UserError("--layer needs --tokenizer: the prior's folder has a copy of the layers that it codes")
    priors, tokenizer = _load_models(config, config.layer)
    tokenizer = tokenizer.to(encoding_device)
    name = config.tokenizer or " ".join(config.prior) or _DEFAULT_TOKENIZER
    images = images_for(tokenizer, name, config.images, config.height, config.width, config.reading)
    labels = _prior_labels(priors, images) if config.classes else None
    out = config.out or RUNS / f"{_file_name(images.source)}.smalti"

    def is_own(path: Path) -> bool:
        return read_header(path).get("images_fingerprint") == images.fingerprint

    inputs = image_inputs(config.images, priors=config.prior, tokenizer=_tokenizer_source(config))
    with locks.claim([out], inputs=inputs, overwrite=config.overwrite, is_own=is_own):
        _compress(config, out, tokenizer, images, priors, labels)
    return out


def _tokenizer_source(config: Compress | Decompress) -> str | None:
    """Returns the source of the tokenizer; None for the copy in the folder of the prior."""
    return config.tokenizer or (None if config.prior else _DEFAULT_TOKENIZER)


def _load_models(config: Compress | Decompress, layer: int | None) -> tuple[list[Prior], Tokenizer]:
    """Loads the tokenizer and, if any are given, the priors of its levels, coarsest first."""
    source = _tokenizer_source(config)
    source = None if source is None else layer_source(source, layer)
    if not config.prior:
        return [], load_tokenizer(str(source))
    priors, tokenizer = load_priors(config.prior, source)
    return [require_causal(prior) for prior in priors], tokenizer


def _prior_labels(priors: Sequence[Prior], images: ImageSet) -> Tensor:
    """Returns the class of each image by the number that the priors give it; -1 for a class that they do not have.

    Raises:
        UserError: if the priors or the images have no classes.
    """
    if not priors or not (conditional := first_conditional(priors)).classes:
        raise UserError("--classes needs a --prior that was trained with classes; leave --classes out")
    if not images.label_names:
        raise UserError(f"the images of {images.source} have no classes; leave --classes out")
    return numbers_of(conditional, images.labels, images.label_names)


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


def _compress(
    config: Compress,
    out: Path,
    tokenizer: Tokenizer,
    images: ImageSet,
    priors: Sequence[Prior],
    labels: Tensor | None,
) -> None:
    batches, errors, kept = [], [], (~images.left_out).nonzero().squeeze(1)
    progress = bar(what="compressing", total=len(kept), unit="image", delay_seconds=SLOW_SECONDS)
    with progress:
        for rows in kept.split(_BATCH_SIZE):
            batch = to_float(images.pixels(rows)).to(tokenizer.device)
            batches.append(tokenizer.encode(batch))
            with torch.no_grad():
                errors.append(mse(to_float(to_uint8(tokenizer.decode(batches[-1]))), batch).cpu())  # as decompressed
            progress.update(len(rows))
    codes = tuple(torch.cat(grids) for grids in zip(*batches, strict=True))
    layout = tokenizer.layout.resized([(grid.shape[1], grid.shape[2]) for grid in codes])
    header = {"tokenizer_kind": tokenizer.kind, "tokenizer_digest": tokenizer.digest(), "layer": config.layer}
    header["images_fingerprint"] = images.fingerprint
    if names := _names(images, kept):
        header["names"] = names
    coded = None
    if priors:
        header |= {"prior_digests": [prior.digest() for prior in priors], "classes": config.classes}
        with bar(what="coding", total=len(kept), unit="image", delay_seconds=SLOW_SECONDS) as progress:
            known = None if labels is None else labels[kept]
            coded = encode_codes(priors, tuple(grid.cpu() for grid in codes), known, progress.update)
    size = write_codes(out, codes, layout, header, coded)
    pixels = images.preprocessing["height"] * images.preprocessing["width"]
    error, fixed = torch.cat(errors), bits_per_image(layout)
    payload = -(-len(kept) * fixed // 8) if coded is None else len(coded)
    bits = fixed if coded is None else 8 * payload / len(kept)
    given = ", the class included" if config.classes else ""
    comparison = f" under the prior{given} ({fixed} at a fixed rate)" if priors else ""
    print(
        f"{out}: {len(kept)} image(s), {layout}\n"
        f"rate: {bits:.6g} bits an image{comparison}, {bits / pixels:.4g} a pixel; {payload} bytes of codes, "
        f"{size - payload} of header\n"
        f"distortion: MSE {float(error.mean()):.4g}, PSNR {float(psnr(error).mean()):.2f} dB, means over the most "
        "probable decodes"
    )


def decompress(config: Decompress) -> Path:
    """Decodes a file to PNG images and prints its rate; returns their folder.

    Raises:
        UserError: for a damaged file or one of another tokenizer, and for sampled decodes with a
            tokenizer whose decoding is deterministic.
    """
    decoding_device = device(config.device)
    packed, tokenizer = _read(config)
    tokenizer = tokenizer.to(decoding_device)
    if config.decodes and not isinstance(tokenizer, HQA):
        raise UserError(f"{tokenizer.kind} decodes each code to one image; leave --decodes out")
    images, out = len(packed.codes[0]), config.out or RUNS / config.codes.stem
    settings = {"command": "decompress", "codes_sha256": input_digest(config.codes)}

    names = packed.header.get("names") or [f"{row:05d}" for row in range(images)]
    pictures = [out / _png_name(name, number) for name in names for number in range(config.decodes + 1)]
    if len({str(path).casefold() for path in pictures}) < len(pictures):
        raise UserError(f"an image of {config.codes} has the name of another's sample; leave --decodes out")
    outputs = image_paths(pictures, tokenizer.image_channels)

    def is_own(path: Path) -> bool:
        return embedded_settings(outputs[path]).items() >= settings.items()

    inputs = [config.codes, *image_inputs(None, priors=config.prior, tokenizer=_tokenizer_source(config))]
    with locks.claim(outputs, folder=out, inputs=inputs, overwrite=config.overwrite, is_own=is_own):
        _write_images(
            config,
            [out / name for name in names],
            packed.codes,
            tokenizer,
            {**settings, **flatten(config), "versions": versions()},
        )
    bits = bits_per_image(packed.layout)
    rate = "coded with the prior" if config.prior else f"of {bits} bits each"
    print(f"{out}: {images} image(s) {rate}, {packed.layout}, from {packed.size_bytes} bytes")
    return out


def _read(config: Decompress) -> tuple[Packed, Tokenizer]:
    """Reads the codes with the tokenizer and the priors that made them.

    Raises:
        UserError: if the file is damaged, or others made it.
    """
    loaded: list[tuple[list[Prior], Tokenizer]] = []

    def load_matching(header: dict[str, Any]) -> None:
        coded_by = header.get("prior_digests")
        if coded_by and not config.prior:
            raise UserError(f"{config.codes} was coded with a prior; pass the prior that encoded it as --prior")
        if config.prior and not coded_by:
            raise UserError(f"{config.codes} was written without a prior; leave --prior out")
        priors, tokenizer = _load_models(config, header.get("layer"))
        if header.get("tokenizer_digest") not in tokenizer.digests_of_codes():
            source = _tokenizer_source(config) or "the copy beside the prior"
            raise UserError(
                f"{config.codes} was made by {header.get('tokenizer_kind')} {_short(header.get('tokenizer_digest'))}, "
                f"but {source} is {_short(tokenizer.digest())}; pass the tokenizer that encoded it as --tokenizer"
            )
        if coded_by and coded_by != (digests := [prior.digest() for prior in priors]):
            raise UserError(
                f"{config.codes} was coded with the prior {_short(coded_by)}, but {' '.join(config.prior)} is "
                f"{_short(digests)}; pass the prior that encoded it as --prior"
            )
        loaded.append((priors, tokenizer))

    def decode(header: dict[str, Any], payload: bytes, images: int, layout: Layout) -> Codes | None:
        priors, tokenizer = loaded[0]
        _require_layout(config, layout, tokenizer)  # before the priors read codes of other codebooks
        labelled = bool(header.get("classes")) and any(prior.classes for prior in priors)
        grids = [(level.height, level.width) for level in layout.levels]
        with bar(what="decoding", total=images, unit="image", delay_seconds=SLOW_SECONDS) as progress:
            return decode_codes(priors, payload, images, grids, labelled=labelled, callback=progress.update)

    packed = read_codes(config.codes, load_matching, decode if config.prior else None)
    _require_layout(config, packed.layout, loaded[0][1])
    return packed, loaded[0][1]


def _short(digests: Any) -> str:
    """Returns the first digits of a digest or of a list of them."""
    return " ".join(str(digest)[:12] for digest in (digests if isinstance(digests, list) else [digests]))


def _png_name(name: str, number: int) -> str:
    """Returns the file of an image's most probable decode, or of a sampled one, counted from 1."""
    return f"{name}-sample-{number}.png" if number else f"{name}.png"


def _write_images(
    config: Decompress, firsts: Sequence[Path], grids: Codes, tokenizer: Tokenizer, settings: dict[str, object]
) -> None:
    images = len(grids[0])
    for rows in torch.arange(images).split(_BATCH_SIZE):
        codes = tuple(grid[rows].to(tokenizer.device) for grid in grids)
        for number in range(config.decodes + 1):
            seeds = derive(row_seeds(config.seed, rows), number).to(tokenizer.device) if number else None
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
        raise UserError(
            f"{config.codes} holds codes of {layout}, but the tokenizer decodes {tokenizer.layout}; give the tokenizer "
            "that made them with --tokenizer"
        )


@torch.no_grad()
def _decode(tokenizer: Tokenizer, codes: Codes, seeds: Tensor | None) -> Tensor:
    """Returns the most probable decodes of codes, or sampled decodes for seeds, which only HQA takes."""
    return tokenizer.decode(codes, seeds=seeds) if isinstance(tokenizer, HQA) else tokenizer.decode(codes)
