"""What a trained pair of tokenizer and prior is for: new images. Filling holes in given ones is in `fill.py`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from smalti.commands.class_labels import draw_labels, find_classes, that_knows_classes
from smalti.commands.model_paths import RUNS, load_priors, prior_class
from smalti.core.codes import Codes
from smalti.core.config import flatten
from smalti.core.devices import Device, Precision, autocast, device
from smalti.core.errors import UserError
from smalti.core.progress import bar, counting
from smalti.core.provenance import versions
from smalti.core.randomness import Stream, derive, row_seeds
from smalti.images.sheets import require_png, save_animation, save_grid, save_png, save_sheet, to_image
from smalti.priors.base import Prior
from smalti.tokenizers.base import Tokenizer

S = TypeVar("S")

MOST_FRAMES = 100


@dataclass(frozen=True)
class Sample(Generic[S]):
    """How to generate images."""

    sampling: S
    """How codes are drawn; of priors of several kinds, by those of the last one's. The others keep their defaults."""
    prior: tuple[str, ...] = ("hourglass",)
    """A trained prior: a kind (the one in runs/priors/KIND), a folder, or a hub id. Of a tokenizer of several levels,
    one for each."""
    tokenizer: str | None = None
    """Its tokenizer: a kind, a folder or a hub id [default: the copy in the prior's folder]."""
    num: int = 64
    """How many images."""
    height: int | None = None
    """Pixels from top to bottom [default: as trained]. Larger canvases are painted through overlapping windows."""
    width: int | None = None
    """Pixels from left to right [default: as trained]."""
    classes: tuple[str, ...] = ()
    """Draw these in turn, each a row of the sheet: names or how they begin, or `all` [default: every image of a class
    drawn as often as the training set has it]."""
    seed: int = 0
    """Image i depends on the seed and i alone: --num 8 gives the first 8 of --num 64."""
    batch_size: int = 64
    """Images generated at once."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """Arithmetic of the prior; auto is bf16 where the hardware is fast in it."""
    out: Path = RUNS / "samples.png"
    """The sheet, a PNG with the settings embedded."""
    files: bool = False
    """Also write each image by itself, with its number among the settings, into a folder named as the sheet."""
    animate: bool = False
    """Also write how the images came about, step by step, as an animated PNG with -steps after its name; of several
    levels, the last one's steps."""


@torch.no_grad()
def sample(config: Sample[Any]) -> Path:
    """Writes a sheet of new images; returns its path.

    Raises:
        UserError: for a prior, tokenizer or number that will not do.
    """
    if config.num < 1 or config.batch_size < 1:
        raise UserError(f"--num and --batch-size must be at least 1, not {config.num} and {config.batch_size}")
    require_png(config.out)
    where = device(config.device)
    priors, tokenizer = load_priors(config.prior, config.tokenizer)
    priors, tokenizer = [prior.to(where) for prior in priors], tokenizer.to(where)
    classes = find_classes(that_knows_classes(priors), config.classes)
    seen: dict[int, list[Codes]] = {}  # of each batch, by its first row: the codes after every step
    images = generate_images(
        priors,
        tokenizer,
        num=config.num,
        seed=config.seed,
        sampling=config.sampling,
        grids=_grids(config, priors, tokenizer),
        classes=list(classes.values()),
        batch_size=config.batch_size,
        precision=config.precision,
        watch=lambda first, codes: seen.setdefault(first, []).append(codes) if config.animate else None,
    )
    digests = [prior.digest() for prior in priors]
    settings = {**flatten(config), "prior_digests": digests, "versions": versions()}
    if classes:
        of_class = {name: images[i :: len(classes)] for i, name in enumerate(classes) if i < config.num}
        save_sheet(config.out, of_class, settings=settings)
    else:
        save_grid(config.out, images, settings=settings)
    if config.files:
        for number, image in enumerate(images):
            name = config.out.with_suffix("") / f"{number:0{len(str(config.num - 1))}}.png"
            save_png(name, to_image(image), {**settings, "number": number})
    if config.animate:
        frames = _frames(tokenizer, list(seen.values()))
        save_animation(config.out.with_stem(f"{config.out.stem}-steps"), frames, settings=settings)
    return config.out


@torch.no_grad()
def generate_images(
    priors: Sequence[Prior],
    tokenizer: Tokenizer,
    *,
    num: int,
    seed: int,
    sampling: Any,
    grids: Sequence[tuple[int, int]] | None = None,
    classes: Sequence[int] = (),
    batch_size: int = 64,
    precision: Precision = "auto",
    watch: Callable[[int, Codes], None] | None = None,
) -> Float[Tensor, "b c h w"]:
    """The first `num` samples of a seed in [-1, 1], on the CPU, with a progress bar.

    Args:
        priors: of each level, coarsest first.
        tokenizer: of their codes, on the same device.
        num: how many.
        seed: image i depends on it and on i alone.
        sampling: how codes are drawn, for priors of its kind; see `sampling_of`.
        grids: rows and columns of each level, where other than those trained on.
        classes: see `draw_labels`.
        batch_size: images at once.
        precision: of the priors.
        watch: called after each step of the last level with the number of the batch's first image and the codes of all
            levels as they are.
    """
    grids = grids or [(prior.level.height, prior.level.width) for prior in priors]
    samplings = [sampling_of(prior, sampling) for prior in priors]
    images, batches = [], range(0, num, batch_size)
    calls = sum(each.calls(*grid) for each, grid in zip(samplings, grids, strict=True))
    with bar(what="sampling", total=len(batches) * calls, unit="step") as progress:
        for index, start in enumerate(batches):
            rows = torch.arange(start, min(start + batch_size, num))
            with autocast(next(priors[0].parameters()).device, precision):
                codes = generate_levels(
                    priors,
                    rows,
                    draw_labels(that_knows_classes(priors), classes, rows, seed),
                    grids=grids,
                    seed=seed,
                    samplings=samplings,
                    callback=counting(progress),
                    watch=partial(watch, start) if watch else None,
                )
            seeds = derive(row_seeds(seed, rows), Stream.IMAGE_DETAILS).to(codes[0].device)
            images.append(tokenizer.draw(codes, seeds).cpu())
            progress.update((index + 1) * calls - progress.n)  # steps that stopping early saved
    return torch.cat(images)


@torch.no_grad()
def generate_levels(
    priors: Sequence[Prior],
    rows: Int64[Tensor, " b"],
    labels: Int64[Tensor, " b"] | None,
    *,
    grids: Sequence[tuple[int, int]],
    seed: int,
    samplings: Sequence[Any],
    callback: Callable[[int, Tensor], None] | None = None,
    watch: Callable[[Codes], None] | None = None,
) -> Codes:
    """Codes of all levels, coarsest first, on these grids, each drawn given those above it; see `generate_codes`.

    `watch` is called after each step of the last level, with the codes of all as they are.
    """
    codes: tuple[Tensor, ...] = ()
    for prior, grid, sampling in zip(priors, grids, samplings, strict=True):

        def stepped(step: int, drawn: Tensor, above: Codes = codes) -> None:
            if callback is not None:
                callback(step, drawn)
            if watch is not None and len(above) == len(priors) - 1:
                watch((*above, drawn.clone()))  # samplers may go on in place

        here = {"grid": grid, "sampling": sampling, "upper": codes, "callback": stepped}
        codes += (generate_codes(prior, rows, labels, seed=seed, **here),)
    return codes


@torch.no_grad()
def generate_codes(
    prior: Prior,
    rows: Int64[Tensor, " b"],
    labels: Int64[Tensor, " b"] | None,
    *,
    seed: int,
    sampling: Any,
    upper: Codes = (),
    grid: tuple[int, int] | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Int64[Tensor, "b h w"] | Float[Tensor, "b _c h w"]:
    """Codes, or real numbers, of the samples of a seed that have these numbers, each of its class and below the codes
    of its upper levels: inpainting with nothing known.

    `grid` is rows and columns, where other than those trained on.
    """
    where = next(prior.parameters()).device
    height, width = grid or (prior.level.height, prior.level.width)
    level = replace(prior.level, height=height, width=width)
    dtype = torch.int64 if level.radices else torch.float32
    known = torch.zeros(len(rows), *level.shape, dtype=dtype, device=where)
    seeds = row_seeds(seed, rows.to(where))
    return prior.method.sampler(
        prior,
        known=known,
        known_mask=torch.zeros(len(rows), height, width, dtype=torch.bool, device=where),
        seeds=derive(seeds, Stream.LEVEL, len(upper)) if upper else seeds,
        labels=labels.to(where) if labels is not None and prior.classes else None,
        upper=upper,
        sampling=sampling,
        callback=callback,
    )


@torch.no_grad()
def _frames(tokenizer: Tokenizer, seen: Sequence[Sequence[tuple[Tensor, ...]]]) -> list[Tensor]:
    """Images of the codes of every batch after each step, of so many that one can watch them; a batch that was finished
    sooner than another waits."""
    steps = max(map(len, seen))
    chosen = torch.linspace(0, steps - 1, min(steps, MOST_FRAMES)).round().long().tolist()
    return [torch.cat([tokenizer.decode(of[min(step, len(of) - 1)]).cpu() for of in seen]) for step in chosen]


def _grids(config: Sample[Any], priors: Sequence[Prior], tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """Rows and columns of codes of each level, of images of the size asked for."""
    trained = tokenizer.config
    for name, pixels in (("height", config.height), ("width", config.width)):
        if pixels is not None and (pixels < 1 or pixels % tokenizer.downsampling):
            raise UserError(f"--{name} must be a multiple of {tokenizer.downsampling} pixels, not {pixels}")
    height, width = config.height or trained.height, config.width or trained.width
    levels = [prior.level for prior in priors]
    return [(level.height * height // trained.height, level.width * width // trained.width) for level in levels]


def sampling_of(prior: Prior, given: Any) -> Any:
    """How a prior is drawn from: as given, if that is for its kind; else by its kind's defaults."""
    return given if isinstance(given, prior.method.sampling) else prior.method.sampling()


def default_config(source: str) -> Any:
    """The config class for a prior, for the command line: `Sample` of its kind's sampling, an alias and no `type`."""
    return Sample[prior_class(source).method.sampling]
