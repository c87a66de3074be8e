"""The inpainting command: pairs images with masks, checks them and writes the fills.

The filling itself is in `inpainting.py`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from smalti.commands.class_labels import find_classes, first_class_conditional
from smalti.commands.inpainting import Filling, callback_calls, fills, working_size
from smalti.commands.model_paths import RUNS, load_priors, prior_class
from smalti.core.config import flatten
from smalti.core.devices import Device, Precision, device
from smalti.core.errors import UserError
from smalti.core.progress import bar, counting
from smalti.core.provenance import versions
from smalti.images.decoding import load_image, load_transparency, to_float
from smalti.images.masks import MID_GREY, blank, load_mask
from smalti.images.sheets import require_png, save_png, save_sheet, to_image
from smalti.tokenizers.base import Tokenizer

_BLACK_OR_WHITE = 16
"""Values this close to black or white count as such."""
_MASK_SHARE, _PHOTO_SHARE = 0.99, 0.5
"""A mask is black or white in at least the first share of its pixels, a photo in less than the second."""
_LARGE_MASK = 0.5
"""Masking more than this share of an image prints a note."""

S = TypeVar("S")


@dataclass(frozen=True)
class Inpaint(Generic[S]):
    """Settings of `inpaint`."""

    sampling: S
    """Settings of the sampler. Among priors of several kinds, these settings apply to those of the last one's kind;
    the others use their defaults."""
    image: Path
    """Image to inpaint, or a folder of images. Any size, any format Pillow reads."""
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
    """Precision of the prior; `auto` is bf16 where the hardware is fast in it, else fp32."""
    out: Path = RUNS / "inpainted.png"
    """File of the first fill. The others get -2, -3, ... after the name, and a sheet of all gets -sheet. For a folder
    of images, a folder whose files have the images' names."""

    def __post_init__(self) -> None:
        if self.num < 1:
            raise UserError(f"--num must be at least 1, not {self.num}")
        if not 0 <= self.threshold <= 254:
            raise UserError(f"--threshold must be from 0 to 254, not {self.threshold}; 127 is mid-grey")
        if min(self.expand) < 0:
            raise UserError(
                f"--expand takes pixels to add: left, top, right, bottom, not {self.expand}; crop the image first"
            )


class _Job(NamedTuple):
    """One image, its mask file, and the file of its first fill."""

    image: Path
    mask: Path | None
    out: Path


def inpaint(config: Inpaint[Any]) -> Path:
    """Fills the masked pixels of an image, or of every image in a folder, several times.

    Every pixel outside the mask and its feather band is returned exactly, in 8 bits.

    Returns:
        The path of the first fill, or the folder of all fills.

    Raises:
        UserError: for an unsuitable file, mask or model, or sizes that do not match.
    """
    jobs = _jobs(config)
    filling_device = device(config.device)
    priors, tokenizer = load_priors(config.prior, config.tokenizer)
    priors, tokenizer = [prior.to(filling_device) for prior in priors], tokenizer.to(filling_device)
    classes = list(find_classes(first_class_conditional(priors), config.classes).values())
    digests = [prior.digest() for prior in priors]
    settings = {**flatten(config), "prior_digests": digests, "versions": versions()}
    calls: list[int] = []
    for job in jobs:  # reads every image before the first fill, so that any bad file is reported at once
        height, width = _read(config, job, tokenizer.image_channels)[1].shape
        size = working_size(tokenizer, height, width, config.filling.largest)
        calls.append(callback_calls(priors, tokenizer, config.sampling, size))
    with bar(what="filling", total=sum(calls), unit="step") as progress:
        for index, job in enumerate(jobs):
            pixels, mask = _read(config, job, tokenizer.image_channels)
            _print_notes(config, job, mask, tokenizer)
            results = fills(
                priors,
                tokenizer,
                pixels,
                mask,
                num=config.num,
                seed=config.seed,
                classes=classes,
                sampling=config.sampling,
                filling=config.filling,
                precision=config.precision,
                callback=counting(progress),
            )
            progress.update(sum(calls[: index + 1]) - progress.n)  # counts the steps saved by stopping early
            _write(job, pixels, mask, results, {**settings, "image": job.image, "mask": job.mask})
    return jobs[0].out if len(jobs) == 1 and not config.image.is_dir() else jobs[0].out.parent


def _jobs(config: Inpaint[Any]) -> list[_Job]:
    """Pairs images, masks and outputs by file name, without reading them."""
    if not config.image.is_dir():
        require_png(config.out)
        if config.mask is not None and config.mask.is_dir():
            raise UserError(f"--mask {config.mask} is a folder but --image {config.image} is not; give one mask")
        if config.out.absolute() in {path.absolute() for path in (config.image, config.mask) if path}:
            raise UserError(f"--out {config.out} would overwrite an input; give another name")
        return [_Job(config.image, config.mask, config.out)]
    if config.out.suffix and config.out != RUNS / "inpainted.png":
        raise UserError(f"--image {config.image} is a folder, so --out must be a folder, not {config.out}")
    out = config.out.with_suffix("")
    if out.absolute() == config.image.absolute():
        raise UserError(f"--out {config.out} would overwrite an input; give another name")
    images = _image_files(config.image)
    stems = [image.stem for image in images]
    if duplicates := {stem for stem in stems if stems.count(stem) > 1}:
        raise UserError(f"{config.image} has several images called {min(duplicates)}; give each a name of its own")
    masks = dict.fromkeys(stems, config.mask)
    if config.mask is not None and config.mask.is_dir():
        mask_files = {mask.stem: mask for mask in _image_files(config.mask)}
        if missing := [image for image in images if image.stem not in mask_files]:
            raise UserError(f"{config.mask} has no mask called {missing[0].stem} for {missing[0]}; add it")
        masks = {stem: mask_files[stem] for stem in stems}
    return [_Job(image, masks[image.stem], out / f"{image.stem}.png") for image in images]


def _image_files(folder: Path) -> list[Path]:
    """Returns the images in a folder, without subfolders, sorted by name."""
    suffixes = Image.registered_extensions()
    files = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in suffixes and not path.name.startswith(".")
    )
    if not files:
        raise UserError(f"{folder} holds no images; give an image or a folder of images")
    return files


def _read(config: Inpaint[Any], job: _Job, channels: int) -> tuple[UInt8[Tensor, "c h w"], Bool[Tensor, "h w"]]:
    """Reads an image and its mask, True = fill, both enlarged by `--expand`."""
    pixels = load_image(job.image, channels=channels)
    _, height, width = pixels.shape
    mask_file = job.mask
    if mask_file is None and load_transparency(job.image) is not None:
        mask_file = job.image
    if mask_file is not None:
        _refuse_swapped(job)
        mask = load_mask(
            mask_file,
            height=height,
            width=width,
            invert=config.invert,
            threshold=config.threshold,
            resize=config.resize_mask,
        )
    elif any(config.expand):
        mask = torch.zeros(height, width, dtype=torch.bool)
    else:
        raise UserError(f"{job.image} has no transparent pixels to fill; give --mask, or --expand to enlarge the image")
    left, top, right, bottom = config.expand
    padding = (left, right, top, bottom)
    return F.pad(pixels, padding), F.pad(mask, padding, value=True)


def _refuse_swapped(job: _Job) -> None:
    """Refuses an image and a mask in each other's place: only the image is all black and white.

    Raises:
        UserError: if they seem swapped.
    """
    if job.mask is None or load_transparency(job.mask) is not None:
        return
    image_share, mask_share = (_black_or_white_share(path) for path in (job.image, job.mask))
    if image_share >= _MASK_SHARE and mask_share < _PHOTO_SHARE:
        raise UserError(
            f"--image {job.image} is all black and white and --mask {job.mask} is not: they seem to be swapped"
        )


def _black_or_white_share(path: Path) -> float:
    pixels = load_image(path, channels=3)
    extreme = (pixels < _BLACK_OR_WHITE) | (pixels > 255 - _BLACK_OR_WHITE)
    return float(extreme.all(0).float().mean())


def _write(
    job: _Job,
    pixels: UInt8[Tensor, "c h w"],
    mask: Bool[Tensor, "h w"],
    results: UInt8[Tensor, "n c h w"],
    settings: dict[str, object],
) -> None:
    """Writes each fill to its file, and a sheet of the image, the masked image and all fills."""
    for index, image in enumerate(results):
        path = job.out if index == 0 else job.out.with_stem(f"{job.out.stem}-{index + 1}")
        save_png(path, to_image(image), {**settings, "fill": index})
    image = to_float(pixels).unsqueeze(0)
    rows = {"image": image, "masked": blank(image, mask.unsqueeze(0)), "fills": to_float(results)}
    save_sheet(job.out.with_stem(f"{job.out.stem}-sheet"), rows, settings=settings)


def _print_notes(config: Inpaint[Any], job: _Job, mask: Bool[Tensor, "h w"], tokenizer: Tokenizer) -> None:
    """Prints a note if the image is resized for the model, and if most of it is masked."""
    height, width = mask.shape
    size, trained = working_size(tokenizer, height, width, config.filling.largest), tokenizer.config
    if size != (height, width, height, width):
        tqdm.write(
            f"note: {job.image} is filled at {size.padded_width}x{size.padded_height}, as this model's codes are "
            f"{tokenizer.downsampling} pixels wide and it was trained at {trained.width}x{trained.height} "
            "(see --largest); its known pixels stay exact",
            file=sys.stderr,
        )
    if (share := float(mask.float().mean())) > _LARGE_MASK:
        tqdm.write(
            f"note: the mask covers {share:.0%} of {job.image}; use --invert if it is the wrong way round",
            file=sys.stderr,
        )


def default_config(source: str) -> Any:
    """Returns the config class for a prior's kind: a generic alias of `Inpaint`, not a `type`."""
    return Inpaint[prior_class(source).method.filling]
