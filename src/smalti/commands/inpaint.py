"""The command that fills holes in pictures: which files, which mask goes with which, what is written. The filling
itself is in `fill.py`."""

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

from smalti.commands.class_labels import find_classes, that_knows_classes
from smalti.commands.inpainting import Filling, calls_of, fills, working_size
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

_MASK_GREY, _MASK_SHARE, _PICTURE_SHARE = 16, 0.99, 0.5  # what is black or white; of a mask; of a picture
_MOST = 0.5


S = TypeVar("S")


@dataclass(frozen=True)
class Inpaint(Generic[S]):
    """How to fill the holes of one image, or of a folder of them."""

    sampling: S
    """How codes are drawn; of priors of several kinds, by those of the last one's. The others keep their defaults."""
    image: Path
    """The image to mend, of any format that Pillow opens and any size; or a folder of images."""
    mask: Path | None = None
    """What is white in it is filled in; or, if it has transparent parts, what is transparent. A folder has one for each
    image, of the same name but for the suffix; one mask serves all [default: the image's own transparent parts]."""
    filling: Filling = field(default_factory=Filling)
    invert: bool = False
    """Fill what the mask would keep instead."""
    threshold: int = MID_GREY
    """Lightness (or transparency), 0 to 254, above which a mask's pixel is a hole."""
    resize_mask: bool = False
    """Fit masks of another size to their image, instead of refusing them."""
    expand: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Pixels to add on the left, top, right and bottom, and to fill."""
    num: int = 3
    """How many different fills."""
    classes: tuple[str, ...] = ()
    """Fill with things of these classes, in turn: names or how they begin, or `all` [default: of any class]."""
    prior: tuple[str, ...] = ("hourglass",)
    """A trained prior: a kind (the one in runs/priors/KIND), a folder, or a hub id. Of a tokenizer of several levels,
    one for each."""
    tokenizer: str | None = None
    """Its tokenizer: a kind, a folder or a hub id [default: the copy in the prior's folder]."""
    seed: int = 0
    """Fill i depends on the seed and i alone."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """Arithmetic of the prior; auto is bf16 where the hardware is fast in it."""
    out: Path = RUNS / "inpainted.png"
    """The first fill; further ones get -2, -3, ... and a sheet of all -sheet after the name. For a folder of images, a
    folder, with the images' names."""

    def __post_init__(self) -> None:
        if self.num < 1:
            raise UserError(f"--num must be at least 1, not {self.num}")
        if not 0 <= self.threshold <= 254:
            raise UserError(f"--threshold must be from 0 to 254, not {self.threshold}; 127 is mid-grey")
        if min(self.expand) < 0:
            raise UserError(
                f"--expand takes pixels to add: left, top, right, bottom, not {self.expand}; crop beforehand"
            )


class _Job(NamedTuple):
    """One image, its mask, and where the first of its fills goes."""

    image: Path
    mask: Path | None
    out: Path


def inpaint(config: Inpaint[Any]) -> Path:
    """Fills the holes of one image, or of every image of a folder, several times; returns the first fill's path, or the
    folder of all.

    Every pixel outside hole and feather band comes back exactly, in 8 bits.

    Raises:
        UserError: for a file, mask or model that will not do, or sizes that do not fit together.
    """
    jobs = _jobs(config)
    where = device(config.device)
    priors, tokenizer = load_priors(config.prior, config.tokenizer)
    priors, tokenizer = [prior.to(where) for prior in priors], tokenizer.to(where)
    chosen = list(find_classes(that_knows_classes(priors), config.classes).values())
    digests = [prior.digest() for prior in priors]
    settings = {**flatten(config), "prior_digests": digests, "versions": versions()}
    calls: list[int] = []
    for job in jobs:  # all, before the first is filled: what is wrong with the last one shows at once
        height, width = _read(config, job, tokenizer.image_channels)[1].shape
        size = working_size(tokenizer, height, width, config.filling.largest)
        calls.append(calls_of(priors, tokenizer, config.sampling, size))
    with bar(what="filling", total=sum(calls), unit="step") as progress:
        for index, job in enumerate(jobs):
            pixels, mask = _read(config, job, tokenizer.image_channels)
            _remark(config, job, mask, tokenizer)
            filled = fills(
                priors,
                tokenizer,
                pixels,
                mask,
                num=config.num,
                seed=config.seed,
                classes=chosen,
                sampling=config.sampling,
                filling=config.filling,
                precision=config.precision,
                callback=counting(progress),
            )
            progress.update(sum(calls[: index + 1]) - progress.n)  # steps that stopping early saved
            _write(job, pixels, mask, filled, {**settings, "image": job.image, "mask": job.mask})
    return jobs[0].out if len(jobs) == 1 and not config.image.is_dir() else jobs[0].out.parent


def _jobs(config: Inpaint[Any]) -> list[_Job]:
    """What there is to do, by the names of the files alone."""
    if not config.image.is_dir():
        require_png(config.out)
        if config.mask is not None and config.mask.is_dir():
            raise UserError(f"--mask {config.mask} is a folder but --image {config.image} is not; give one mask")
        if config.out.absolute() in {path.absolute() for path in (config.image, config.mask) if path}:
            raise UserError(f"--out {config.out} would overwrite what was given; give another name")
        return [_Job(config.image, config.mask, config.out)]
    if config.out.suffix and config.out != RUNS / "inpainted.png":
        raise UserError(f"--image {config.image} is a folder, so --out must be one too, not {config.out}")
    out = config.out.with_suffix("")
    if out.absolute() == config.image.absolute():
        raise UserError(f"--out {config.out} would overwrite what was given; give another name")
    images = _image_files(config.image)
    stems = [image.stem for image in images]
    if doubled := {stem for stem in stems if stems.count(stem) > 1}:
        raise UserError(f"{config.image} has several images called {min(doubled)}; give each a name of its own")
    masks = dict.fromkeys(stems, config.mask)
    if config.mask is not None and config.mask.is_dir():
        found = {mask.stem: mask for mask in _image_files(config.mask)}
        if missing := [image for image in images if image.stem not in found]:
            raise UserError(f"{config.mask} has no mask called {missing[0].stem} for {missing[0]}; add it")
        masks = {stem: found[stem] for stem in stems}
    return [_Job(image, masks[image.stem], out / f"{image.stem}.png") for image in images]


def _image_files(folder: Path) -> list[Path]:
    """Of the folder itself, sorted by name."""
    known = Image.registered_extensions()
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in known and not path.name.startswith("."))
    if not files:
        raise UserError(f"{folder} holds no images; give an image, or a folder that has some")
    return files


def _read(config: Inpaint[Any], job: _Job, channels: int) -> tuple[UInt8[Tensor, "c h w"], Bool[Tensor, "h w"]]:
    """An image and its hole, both with what `--expand` adds."""
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
        raise UserError(f"{job.image} has no transparent parts to fill; give --mask, or --expand to add to its edges")
    left, top, right, bottom = config.expand
    padding = (left, right, top, bottom)
    return F.pad(pixels, padding), F.pad(mask, padding, value=True)


def _refuse_swapped(job: _Job) -> None:
    """Tells an image and a mask that changed places: the one is all black and white, the other is anything but."""
    if job.mask is None or load_transparency(job.mask) is not None:
        return
    image, mask = (load_image(path, channels=3) for path in (job.image, job.mask))
    of_image, of_mask = (
        float(((each < _MASK_GREY) | (each > 255 - _MASK_GREY)).all(0).float().mean()) for each in (image, mask)
    )
    if of_image >= _MASK_SHARE and of_mask < _PICTURE_SHARE:
        raise UserError(
            f"--image {job.image} is all black and white and --mask {job.mask} is not: they seem to have changed places"
        )


def _write(
    job: _Job,
    pixels: UInt8[Tensor, "c h w"],
    mask: Bool[Tensor, "h w"],
    filled: UInt8[Tensor, "n c h w"],
    settings: dict[str, object],
) -> None:
    for index, image in enumerate(filled):
        name = job.out if index == 0 else job.out.with_stem(f"{job.out.stem}-{index + 1}")
        save_png(name, to_image(image), {**settings, "fill": index})
    image = to_float(pixels).unsqueeze(0)
    rows = {"image": image, "masked": blank(image, mask.unsqueeze(0)), "fills": to_float(filled)}
    save_sheet(job.out.with_stem(f"{job.out.stem}-sheet"), rows, settings=settings)


def _remark(config: Inpaint[Any], job: _Job, mask: Bool[Tensor, "h w"], tokenizer: Tokenizer) -> None:
    """Says what is done that a person may not expect."""
    height, width = mask.shape
    size, trained = working_size(tokenizer, height, width, config.filling.largest), tokenizer.config
    if size != (height, width, height, width):
        tqdm.write(
            f"note: {job.image} is worked on at {size.padded_width}x{size.padded_height}, as this model's codes are "
            f"{tokenizer.downsampling} pixels wide and it was trained at {trained.width}x{trained.height} "
            "(see --largest); its known pixels come back as they are",
            file=sys.stderr,
        )
    if (share := float(mask.float().mean())) > _MOST:
        tqdm.write(
            f"note: {share:.0%} of {job.image} is filled; --invert if that is the wrong way round", file=sys.stderr
        )


def default_config(source: str) -> Any:
    """The config class for a prior, for the command line: `Inpaint` of its kind's sampling, an alias and no `type`."""
    return Inpaint[prior_class(source).method.filling]
