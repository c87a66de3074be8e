"""The sampling command: its flags, and the files that it writes of the images that `generating.py` draws."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import UInt8
from torch import Tensor

from smalti.commands.class_labels import Conditions, find_conditions
from smalti.commands.generating import generate_batches, sampling_for
from smalti.commands.model_paths import RUNS, image_inputs, load_priors, prior_class
from smalti.core import locks
from smalti.core.codes import Codes
from smalti.core.config import flatten
from smalti.core.devices import Device, Precision, device
from smalti.core.errors import UserError, require_at_least_one
from smalti.core.files import free_name, print_left_over
from smalti.core.progress import print_note
from smalti.core.provenance import versions
from smalti.core.randomness import require_seed
from smalti.images.formats.opening import most_pixels
from smalti.images.sheets import (
    embedded_settings,
    most_on_sheet,
    require_png,
    save_animation,
    save_grid,
    save_png,
    save_sheet,
    to_image,
)
from smalti.priors.base import Prior
from smalti.tokenizers.base import Tokenizer

S = TypeVar("S")

MOST_FRAMES = 100
_MOST_FILES = 10**6
"""Largest number of files in one folder."""


@dataclass(frozen=True)
class Sample(Generic[S]):
    """Settings of `sample`."""

    sampling: S
    """Settings of the sampler. Among priors of several kinds, these settings apply to those of the last one's kind;
    the others use their defaults."""
    prior: tuple[str, ...] = ("hourglass",)
    """A trained prior: a kind (read from runs/priors/KIND), a folder, or a hub id. Give one for each level if the
    tokenizer has several levels."""
    tokenizer: str | None = None
    """The tokenizer of the prior's codes: a kind, a folder or a hub id [default: the copy in the prior's folder]."""
    num: int = 64
    """Number of images."""
    height: int | None = None
    """Height in pixels [default: as trained]. Larger images are sampled through overlapping windows."""
    width: int | None = None
    """Width in pixels [default: as trained]."""
    classes: tuple[str, ...] = ()
    """Classes to generate in turn, a row of the sheet each: names, beginnings of names, or `all` [default: each class
    as often as in the training set]."""
    conditions: Path | None = None
    """For a prior trained with --condition vector: a .npy file of vectors (n, width), which are the conditions of the
    images in turn, a row of the sheet each if there are fewer than --num [default: images without a vector]."""
    seed: int = 0
    """Random seed. Image i depends on the seed and i alone: --num 8 gives the first 8 images of --num 64."""
    batch_size: int = 64
    """Images generated at once. Lower it if memory runs out; the images stay the same, up to rounding."""
    device: Device = "auto"
    """Device to run on."""
    precision: Precision = "auto"
    """Precision of the prior; `auto` is bf16 where the hardware is fast in it, fp16 on older GPUs, else fp32."""
    out: Path | None = None
    """The sheet to write, a PNG with these settings embedded [default: runs/samples.png, numbered if samples of another
    prior are there]."""
    files: bool = False
    """Also write each image to a file of its own, in a folder named after the sheet, as soon as its batch is drawn. The
    sheet shows the first images if not all fit on it."""
    animate: bool = False
    """Also write an animated PNG of the sampling steps, with -steps after its name. With several levels it shows the
    steps of the last one."""
    overwrite: bool = False
    """Replace existing files. Without it, only images that this command made with the same prior are replaced."""


@torch.no_grad()
def sample(config: Sample[Any]) -> Path:
    """Writes a sheet of new images; returns its path.

    Raises:
        UserError: for an unsuitable prior, tokenizer, size or number.
    """
    require_seed(config.seed)
    require_at_least_one(config, "num", "batch_size")
    if config.out:
        require_png(config.out)
    sampling_device = device(config.device)
    priors, tokenizer = load_priors(config.prior, config.tokenizer)
    priors, tokenizer = [prior.to(sampling_device) for prior in priors], tokenizer.to(sampling_device)
    conditions = find_conditions(priors, config.classes, config.conditions)
    grids = _grids(config, priors, tokenizer)
    most_shown = _most_shown(config, tokenizer, conditions.names)
    digests = [prior.digest() for prior in priors]

    def is_own(path: Path) -> bool:  # a rerun with the same priors may replace its own
        settings = embedded_settings(path)
        return settings.get("command") == "sample" and settings.get("prior_digests") == digests

    out = config.out or free_name(
        RUNS / "samples.png", lambda name: _outputs(config, name), lambda each: config.overwrite or is_own(each)
    )
    with locks.claim(
        _outputs(config, out),
        folder=out.with_suffix("") if config.files else None,
        inputs=image_inputs(None, priors=config.prior, tokenizer=config.tokenizer),
        overwrite=config.overwrite,
        is_own=is_own,
    ):
        _sample(replace(config, out=out), out, priors, tokenizer, grids, conditions, digests, most_shown)
        if config.files:
            print_left_over(out.with_suffix(""), "*.png", _files(config, out), is_own)
    return out


def _sample(
    config: Sample[Any],
    out: Path,
    priors: Sequence[Prior],
    tokenizer: Tokenizer,
    grids: Sequence[tuple[int, int]],
    conditions: Conditions,
    digests: Sequence[str],
    most_shown: int,
) -> None:
    steps_by_batch: dict[int, list[Codes]] = {}  # the codes after steps, by the batch's first row
    calls, seen = sampling_for(priors[-1], config.sampling).calls(*grids[-1]), Counter[int]()

    def keep(first: int, codes: Codes) -> None:
        if first >= most_shown:
            return
        kept = steps_by_batch.setdefault(first, [])
        if seen[first] % -(-calls // MOST_FRAMES):
            kept[-1] = codes  # of the steps of one frame the last
        else:
            kept.append(codes)
        seen[first] += 1

    batches = generate_batches(
        priors,
        tokenizer,
        num=config.num,
        seed=config.seed,
        sampling=config.sampling,
        grids=grids,
        conditions=conditions.values,
        batch_size=config.batch_size,
        precision=config.precision,
        watch=keep if config.animate else None,
    )
    settings = {"command": "sample", **flatten(config), "prior_digests": digests, "versions": versions()}
    images = _write_files(batches, _files(config, out), settings, most_shown)
    if len(images) < config.num:
        print_note(f"{out} shows the first {len(images)} images, as many as fit on a sheet")
    if names := _row_names(config, conditions.names):
        turns = [names[number % len(names)] for number in range(len(images))]
        rows = {name: images[[turn == name for turn in turns]] for name in dict.fromkeys(turns)}
        save_sheet(out, rows, settings=settings)
    else:
        save_grid(out, images, settings=settings)
    if config.animate:
        frames = [frame[:most_shown] for frame in _frames(tokenizer, list(steps_by_batch.values()))]
        save_animation(_animation(out), frames, settings=settings)
    if also := [out.with_suffix("")] * config.files + [_animation(out)] * config.animate:
        print_note(f"also written: {' and '.join(map(str, also))}")


def _write_files(
    batches: Iterable[UInt8[Tensor, "_b _c _h _w"]], files: Sequence[Path], settings: dict[str, Any], most_shown: int
) -> UInt8[Tensor, "n _c _h _w"]:
    """Writes the images of each batch once it is drawn, if there are files for them; returns the first of all images.

    If it is stopped, the files that are written stay, and a note says how many.
    """
    shown, drawn, written = list[Tensor](), 0, 0
    try:
        for batch in batches:
            if drawn < most_shown:
                shown.append(batch[: most_shown - drawn])
            drawn += len(batch)
            for path, image in zip(files[written:drawn], batch, strict=False):  # no files without --files
                save_png(path, to_image(image), {**settings, "number": written})
                written += 1
    finally:
        if 0 < written < len(files):
            print_note(
                f"note: {written} of {len(files)} images were written to {files[0].parent}; run it again for all"
            )
    return torch.cat(shown)


def _row_names(config: Sample[Any], names: Sequence[str]) -> Sequence[str]:
    """Returns the names that images have in turn, whose rows the sheet shows; empty for a grid."""
    return names if config.classes or len(names) < config.num else ()


def _outputs(config: Sample[Any], out: Path) -> list[Path]:
    return [out, *_files(config, out), *([_animation(out)] if config.animate else [])]


def _files(config: Sample[Any], out: Path) -> list[Path]:
    """Returns the file of each image; none if only a sheet is written."""
    folder, digits = out.with_suffix(""), len(str(config.num - 1))
    return [folder / f"{number:0{digits}}.png" for number in range(config.num)] if config.files else []


def _animation(out: Path) -> Path:
    return out.with_stem(f"{out.stem}-steps")


@torch.no_grad()
def _frames(tokenizer: Tokenizer, steps_by_batch: Sequence[Sequence[tuple[Tensor, ...]]]) -> list[Tensor]:
    """Decodes the codes of all batches after each kept step. A batch that finished early repeats its last one."""
    return [
        torch.cat([tokenizer.decode(batch[min(step, len(batch) - 1)]).cpu() for batch in steps_by_batch])
        for step in range(max(map(len, steps_by_batch)))
    ]


def _grids(config: Sample[Any], priors: Sequence[Prior], tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """Returns the rows and columns of codes of each level for the requested image size."""
    trained = tokenizer.config
    for name, pixels in (("height", config.height), ("width", config.width)):
        if pixels is not None and (pixels < 1 or pixels % tokenizer.downsampling):
            raise UserError(f"--{name} must be a multiple of {tokenizer.downsampling} pixels, not {pixels}")
    height, width = config.height or trained.height, config.width or trained.width
    if height * width > most_pixels():
        most = f"the most is {most_pixels()} pixels"
        raise UserError(f"images of {width}x{height} are too large: {most}; lower --height and --width")
    levels = [prior.level for prior in priors]
    return [(level.height * height // trained.height, level.width * width // trained.width) for level in levels]


def _most_shown(config: Sample[Any], tokenizer: Tokenizer, names: Sequence[str]) -> int:
    """Returns how many images fit on the sheet.

    Raises:
        UserError: if there are more, which are not written to files; or too many files.
    """
    height, width = config.height or tokenizer.config.height, config.width or tokenizer.config.width
    most = most_on_sheet(height, width, _row_names(config, names))
    if config.num > most and not config.files:
        raise UserError(
            f"{config.num} images of {width}x{height} do not fit on a sheet; the most is --num {most}, or pass --files "
            "to write each image to a file, of which the sheet shows the first"
        )
    if config.files and config.num > _MOST_FILES:
        raise UserError(f"--num {config.num} would be too many files in a folder; the most is {_MOST_FILES}")
    return most


def default_config(source: str) -> Any:
    """Returns the config class for a prior's kind: a generic alias of `Sample`, not a `type`."""
    return Sample[prior_class(source).method.sampling]
