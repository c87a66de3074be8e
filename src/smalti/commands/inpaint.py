"""The inpainting command: pairs images with masks, checks them and writes the fills of `inpainting.py`."""

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, UInt8
from torch import Tensor

from smalti.commands.class_labels import find_conditions
from smalti.commands.inpainting import Filling, WorkingSize, callback_calls, fills, working_size
from smalti.commands.model_paths import RUNS, image_inputs, load_priors, prior_class
from smalti.core import locks
from smalti.core.config import flatten
from smalti.core.devices import Device, Precision, device
from smalti.core.errors import UserError, require_at_least_one
from smalti.core.files import input_digest, print_left_over
from smalti.core.progress import bar, counting, print_note
from smalti.core.provenance import versions
from smalti.core.randomness import require_seed
from smalti.images.blending import restore_transparency
from smalti.images.decoding import Layers, load_image, load_layers, load_transparency, to_float, without_halo
from smalti.images.formats.opening import most_pixels
from smalti.images.masks import MID_GREY, blank, is_white_paint, load_mask, refuse_swapped
from smalti.images.names import images_among, is_image_file
from smalti.images.sheets import embedded_settings, image_paths, reduced, require_png, save_image, save_sheet
from smalti.images.sources import EXAMPLE_IMAGE
from smalti.tokenizers.base import Tokenizer

_LARGE_MASK = 0.5
"""Masking more than this share of an image prints a note."""
_MOST_FILLS = 10_000
_MOST_PIXELS_AT_ONCE = 2**28
"""Largest number of pixels, in all candidates of all fills of an image, that is computed at once."""

S = TypeVar("S")


@dataclass(frozen=True)
class Inpaint(Generic[S]):
    """Settings of `inpaint`."""

    sampling: S
    """Settings of the sampler. Among priors of several kinds, these settings apply to those of the last one's kind;
    the others use their defaults."""
    image: Path | None = None
    """Image to inpaint, or a folder of images. Any size, any format Pillow reads [default: a portrait of the package
    with a transparent part]."""
    mask: Path | None = None
    """Mask of what to fill: its white pixels or, if it has transparency, its transparent pixels. Give one mask for all
    images, or a folder with a mask of the same name for each image [default: the image's own transparent pixels]."""
    filling: Filling = field(default_factory=Filling)
    invert: bool = False
    """Fill the pixels that the mask would keep, and keep the others."""
    threshold: int = MID_GREY
    """Lightness (or transparency), from 0 to 254, above which a pixel of the mask is filled."""
    resize_mask: bool = False
    """Resize masks whose size differs from their image's; otherwise they are an error."""
    expand: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Pixels to add on the left, top, right and bottom of the image, and to fill."""
    num: int = 3
    """Number of different fills of each image."""
    classes: tuple[str, ...] = ()
    """Classes of the fills, in turn: names, beginnings of names, or `all` [default: any class]."""
    conditions: Path | None = None
    """For a prior trained with --condition vector: a .npy file of vectors (n, width), in turn [default: any]."""
    prior: tuple[str, ...] = ("hourglass",)
    """A trained prior: a kind (read from runs/priors/KIND), a folder, or a hub id. Give one for each level if the
    tokenizer has several levels."""
    tokenizer: str | None = None
    """The tokenizer of the prior's codes: a kind, a folder or a hub id [default: the copy in the prior's folder]."""
    seed: int = 0
    """Random seed. Fill i depends on the seed and i alone."""
    device: Device = "auto"
    """Device to run on."""
    precision: Precision = "auto"
    """Precision of the prior; `auto` is bf16 where the hardware is fast in it, fp16 on older GPUs, else fp32."""
    out: Path = RUNS / "inpainted.png"
    """File of the first fill. The others get -2, -3, ... after the name, and a sheet of all gets -sheet. For a folder
    of images, a folder whose files have the images' names."""
    overwrite: bool = False
    """Replace existing files. Without it, only fills that this command made from the same image are replaced."""

    def __post_init__(self) -> None:
        if self.mask is not None and self.image is None:
            raise UserError(f"--mask {self.mask} needs its image; give --image")
        require_at_least_one(self, "num")
        if self.num > _MOST_FILLS:
            raise UserError(f"--num must be at most {_MOST_FILLS}, not {self.num}")
        if not 0 <= self.threshold <= 254:
            raise UserError(f"--threshold must be from 0 to 254, not {self.threshold}; 127 is mid-grey")
        if min(self.expand) < 0:
            raise UserError(f"--expand takes pixels to add: left, top, right, bottom, not {self.expand}; crop it first")


class _Job(NamedTuple):
    """One image, its mask file, the file of each fill, and the file of the sheet."""

    image: Path
    mask: Path | None
    fills: tuple[Path, ...]
    sheet: Path


def inpaint(config: Inpaint[Any]) -> Path:
    """Fills the masked pixels of an image, or of every image in a folder, several times.

    Every pixel outside the mask and its feather band is returned exactly, in 8 bits. The result is the path of the
    first fill, or the folder of all fills.

    Raises:
        UserError: for an unsuitable file, mask or model, or sizes that do not match.
    """
    require_seed(config.seed)
    image = config.image or EXAMPLE_IMAGE
    jobs = _jobs(config, image)
    filling_device = device(config.device)
    priors, tokenizer = load_priors(config.prior, config.tokenizer)
    priors, tokenizer = [prior.to(filling_device) for prior in priors], tokenizer.to(filling_device)
    conditions = find_conditions(priors, config.classes, config.conditions)
    digests = [prior.digest() for prior in priors]
    settings = {"command": "inpaint", **flatten(config), "prior_digests": digests, "versions": versions()}
    calls: list[int] = []
    inputs = None
    image_digests = [input_digest(Path(job.image)) for job in jobs]
    with ExitStack() as stack:
        stack.enter_context(_claimed(config, image, jobs, image_digests, tokenizer.image_channels))
        for job in jobs:  # reads every image before the first fill, so that any bad file is reported at once
            inputs = _read(config, job, tokenizer.image_channels)
            calls.append(callback_calls(priors, tokenizer, config.sampling, _size(config, job, inputs[1], tokenizer)))
        progress = stack.enter_context(bar(what="filling", total=sum(calls), unit="step"))
        for index, (job, image_digest) in enumerate(zip(jobs, image_digests, strict=True)):
            inputs = inputs if inputs and len(jobs) == 1 else _read(config, job, tokenizer.image_channels)
            pixels, mask, layers = inputs
            _print_notes(config, job, mask, tokenizer)
            results = fills(
                priors,
                tokenizer,
                pixels,
                mask,
                num=config.num,
                seed=config.seed,
                conditions=conditions.values,
                sampling=config.sampling,
                filling=config.filling,
                precision=config.precision,
                callback=counting(progress),
            )
            progress.update(sum(calls[: index + 1]) - progress.n)  # counts the steps saved by stopping early
            job_settings = {**settings, "image": job.image, "image_sha256": image_digest, "mask": job.mask}
            _write(job, pixels, mask, layers, results, job_settings)
        written = {path for job in jobs for path in (*job.fills, job.sheet)}
        names = "*.png" if os.path.isdir(image) else f"{escape(config.out.stem)}-[0-9]*{config.out.suffix}"
        print_left_over(jobs[0].sheet.parent, names, written, lambda path: _digest_of_image(path) in image_digests)
    return jobs[0].fills[0] if len(jobs) == 1 and not os.path.isdir(image) else jobs[0].sheet.parent


def _jobs(config: Inpaint[Any], image: Path) -> list[_Job]:
    """Pairs images, masks and outputs by file name, without reading them."""
    if not os.path.isdir(image):
        require_png(config.out)
        if config.mask is not None and os.path.isdir(config.mask):
            raise UserError(f"--mask {config.mask} is a folder but --image {image} is not; give one mask")
        return [_Job(image, config.mask, *_output_names(config.out, config.num, "-"))]
    out = config.out.with_suffix("") if config.out == RUNS / "inpainted.png" else config.out
    if is_image_file(out) and not out.is_dir():
        raise UserError(f"--image {image} is a folder, so --out must be a folder, not {out}")
    images = _image_files(image)
    counts = Counter(image.stem for image in images)
    if duplicates := [stem for stem, count in counts.items() if count > 1]:
        raise UserError(f"{image} has several images called {min(duplicates)}; give each a name of its own")
    masks = dict.fromkeys(counts, config.mask)
    if config.mask is not None and os.path.isdir(config.mask):
        files = _image_files(config.mask)
        masks = {mask.stem: mask for mask in files if mask.stem in counts}
        if several := {mask.stem for mask in files if masks.get(mask.stem, mask) != mask}:
            raise UserError(f"{config.mask} has several masks called {min(several)}; keep one of them")
        if missing := [image for image in images if image.stem not in masks]:
            raise UserError(f"{config.mask} has no mask called {missing[0].stem} for {missing[0]}; add it")
    outputs = _distinct_output_names([out / f"{stem}.png" for stem in counts], config.num)
    return [_Job(image, masks[image.stem], *names) for image, names in zip(images, outputs, strict=True)]


def _output_names(first: Path, num: int, separator: str) -> tuple[tuple[Path, ...], Path]:
    """Returns the files of an image's fills and of its sheet."""
    numbers = [first.with_stem(f"{first.stem}{separator}{number}") for number in range(2, num + 1)]
    return (first, *numbers), first.with_stem(f"{first.stem}{separator}sheet")


def _distinct_output_names(firsts: Sequence[Path], num: int) -> list[tuple[tuple[Path, ...], Path]]:
    """Returns the names of all outputs of a folder, so that no two are equal, whatever their case.

    The first fill of each image has the image's name. The numbers follow a hyphen, or more hyphens if `img-2` is the
    name of another image.
    """
    taken = {str(first).casefold() for first in firsts}
    outputs = []
    for first in firsts:
        separator = "-"
        while True:
            names, sheet = _output_names(first, num, separator)
            others = {str(path).casefold() for path in (*names[1:], sheet)}
            if taken.isdisjoint(others):
                break
            separator += "-"
        taken |= others
        outputs.append((names, sheet))
    return outputs


def _claimed(
    config: Inpaint[Any], image: Path, jobs: Sequence[_Job], digests: Sequence[str], channels: int
) -> AbstractContextManager[None]:
    """Claims all outputs. A rerun recognises its own by the SHA-256 of their images."""
    png_of = [{**image_paths(job.fills, channels), job.sheet: job.sheet} for job in jobs]
    outputs = {path: (pngs[path], digest) for pngs, digest in zip(png_of, digests, strict=True) for path in pngs}

    def is_own(path: Path) -> bool:
        png, digest = outputs[path]
        return _digest_of_image(png) == digest

    files = (path for job in jobs for path in (image, config.mask, job.image, job.mask) if path is not None)
    return locks.claim(
        outputs,
        folder=jobs[0].sheet.parent if os.path.isdir(image) else None,
        inputs=[*dict.fromkeys(files), *image_inputs(None, priors=config.prior, tokenizer=config.tokenizer)],
        overwrite=config.overwrite,
        is_own=is_own,
    )


def _digest_of_image(fill: Path) -> str | None:
    """Returns the SHA-256 of the image that a fill was made from; None for any other file."""
    settings = embedded_settings(fill)
    return settings.get("image_sha256") if settings.get("command") == "inpaint" else None


def _size(config: Inpaint[Any], job: _Job, mask: Bool[Tensor, "h w"], tokenizer: Tokenizer) -> WorkingSize:
    """Returns the size that an image is filled at.

    Raises:
        UserError: if the candidates of its fills hold too many pixels.
    """
    height, width = mask.shape
    size = working_size(tokenizer, height, width, config.filling.largest)
    pixels = config.num * config.filling.candidates * size.padded_height * size.padded_width
    if pixels > _MOST_PIXELS_AT_ONCE:
        raise UserError(
            f"{config.num} fills of {job.image} with {config.filling.candidates} candidates of "
            f"{size.padded_width}x{size.padded_height} pixels do not fit in memory; lower --num, --candidates or "
            "--largest"
        )
    return size


def _image_files(folder: Path) -> list[Path]:
    """Returns the images in a folder, without subfolders, sorted by name."""
    files = sorted(images_among(path for path in folder.iterdir() if not path.name.startswith(".")))
    if not files:
        raise UserError(f"{folder} holds no images; give an image or a folder of images")
    return files


def _read(config: Inpaint[Any], job: _Job, channels: int) -> tuple[UInt8[Tensor, "c h w"], Bool[Tensor, "h w"], Layers]:
    """Reads an image, its mask, True = fill, and the layers that fills keep, all enlarged by `--expand`.

    The colour profile is kept, and the transparency unless that is the mask, as it is if anything is erased.
    """
    pixels, layers = load_image(job.image, channels=channels), load_layers(job.image, channels=channels)
    _, height, width = pixels.shape
    mask_file = job.mask
    transparency = load_transparency(job.image) if mask_file is None else None
    if transparency is not None and ((transparency > config.threshold).any() or not any(config.expand)):
        mask_file, pixels, layers = job.image, without_halo(pixels, layers), layers._replace(alpha=None)
    if mask_file is not None:
        if job.mask is not None:
            refuse_swapped(job.image, pixels, job.mask)
        mask = load_mask(
            mask_file,
            height=height,
            width=width,
            erased=job.mask is None,
            invert=config.invert,
            threshold=config.threshold,
            resize=config.resize_mask,
        )
    elif any(config.expand):
        mask = torch.zeros(height, width, dtype=torch.bool)
    else:
        raise UserError(f"{job.image} has no transparent pixels to fill; give --mask, or --expand to enlarge the image")
    left, top, right, bottom = config.expand
    if (left + width + right) * (top + height + bottom) > most_pixels():
        raise UserError(f"--expand makes {job.image} larger than {most_pixels()} pixels; add less")
    padding = (left, right, top, bottom)
    alpha = None if layers.alpha is None else F.pad(layers.alpha, padding, value=255)
    layers = layers._replace(colours=F.pad(layers.colours, padding), alpha=alpha)
    return F.pad(pixels, padding), F.pad(mask, padding, value=True), layers


def _write(
    job: _Job,
    pixels: UInt8[Tensor, "c h w"],
    mask: Bool[Tensor, "h w"],
    layers: Layers,
    results: UInt8[Tensor, "n c h w"],
    settings: dict[str, object],
) -> None:
    """Writes each fill with the layers to its file, and a sheet of the image, the masked image and all fills."""
    for index, (path, result) in enumerate(zip(job.fills, results, strict=True)):
        if layers.alpha is not None:
            result = restore_transparency(result, pixels, mask, colours=layers.colours, alpha=layers.alpha)
        save_image(path, result, {**settings, "fill": index}, icc_profile=layers.profile)
    image, shown_mask = to_float(reduced(pixels.unsqueeze(0))), reduced(mask[None, None].to(torch.uint8))[:, 0] > 0
    rows = {"image": image, "masked": blank(image, shown_mask), "fills": to_float(reduced(results))}
    save_sheet(job.sheet, rows, settings=settings)
    print_note(f"also written: {', '.join(map(str, (*job.fills[1:], job.sheet)))}")


def _print_notes(config: Inpaint[Any], job: _Job, mask: Bool[Tensor, "h w"], tokenizer: Tokenizer) -> None:
    """Prints the share of the image that is filled, and notes on resizing, painted layers and large masks."""
    share = float(mask.float().mean())
    print_note(f"{job.image}: filling {share:.1%} of its pixels")
    if job.mask is not None and is_white_paint(job.mask):
        print_note(
            f"note: {job.mask} is white paint on a transparent layer, so the paint is the mask; --invert fills the rest"
        )
    height, width = mask.shape
    size, trained = working_size(tokenizer, height, width, config.filling.largest), tokenizer.config
    if size != (height, width, height, width):
        print_note(
            f"note: {job.image} is filled at {size.padded_width}x{size.padded_height}, as this model's codes are "
            f"{tokenizer.downsampling} pixels wide and it was trained at {trained.width}x{trained.height} "
            "(see --largest); its known pixels stay exact, in 8 bits"
        )
    if share > _LARGE_MASK:
        print_note(f"note: the mask covers {share:.0%} of {job.image}; use --invert if it is the wrong way round")


def default_config(source: str) -> Any:
    """Returns the config class for a prior's kind: a generic alias of `Inpaint`, not a `type`."""
    return Inpaint[prior_class(source).method.filling]
