"""What a trained pair of tokenizer and prior is for: new images. Filling holes in given ones is in `inpaint.py`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor

from smalti.codes import Codes
from smalti.devices import Device, Precision, autocast, device
from smalti.errors import UserError
from smalti.interfaces import Tokenizer
from smalti.pictures import save_grid, save_sheet
from smalti.pipeline.classes import draw_labels, find_classes
from smalti.pipeline.places import RUNS, load_priors, prior_class
from smalti.priors.prior import Prior
from smalti.progress import bar, counting
from smalti.randomness import derive, row_seeds
from smalti.runs import flatten, versions

S = TypeVar("S")

LEVEL = 16
"""The stream of a row's seed that leads to those of the levels below the first; samplers have those below."""


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


@torch.no_grad()
def sample(config: Sample[Any]) -> Path:
    """Writes a sheet of new images; returns its path.

    Raises:
        UserError: for a prior, tokenizer or number that will not do.
    """
    if config.num < 1 or config.batch_size < 1:
        raise UserError(f"--num and --batch-size must be at least 1, not {config.num} and {config.batch_size}")
    where = device(config.device)
    priors, tokenizer = load_priors(config.prior, config.tokenizer)
    priors, tokenizer = [prior.to(where) for prior in priors], tokenizer.to(where)
    samplings = [sampling_of(prior, config.sampling) for prior in priors]
    told = next((prior for prior in priors if prior.classes), priors[0])  # all of one latent set
    classes = find_classes(told, config.classes)
    grids = _grids(config, priors, tokenizer)
    images = []
    batches = range(0, config.num, config.batch_size)
    calls = sum(sampling.calls(*grid) for sampling, grid in zip(samplings, grids, strict=True))
    with bar(what="sampling", total=len(batches) * calls, unit="step") as progress:
        for index, start in enumerate(batches):
            rows = torch.arange(start, min(start + config.batch_size, config.num))
            labels = draw_labels(told, list(classes.values()), rows, config.seed)
            with autocast(where, config.precision):
                codes = generate_levels(
                    priors,
                    rows,
                    labels,
                    grids=grids,
                    seed=config.seed,
                    samplings=samplings,
                    callback=counting(progress),
                )
            images.append(tokenizer.decode(codes).cpu())
            progress.update((index + 1) * calls - progress.n)  # steps that stopping early saved
    digests = [prior.digest() for prior in priors]
    settings = {**flatten(config), "prior_digests": digests, "versions": versions()}
    if classes:
        of_class = {name: torch.cat(images)[i :: len(classes)] for i, name in enumerate(classes) if i < config.num}
        save_sheet(config.out, of_class, settings=settings)
    else:
        save_grid(config.out, torch.cat(images), settings=settings)
    return config.out


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
) -> Codes:
    """Codes of all levels, coarsest first, on these grids, each drawn given those above it; see `generate_codes`."""
    codes: tuple[Tensor, ...] = ()
    for prior, grid, sampling in zip(priors, grids, samplings, strict=True):
        here = {"grid": grid, "sampling": sampling, "upper": codes, "callback": callback}
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
) -> Int64[Tensor, "b h w"]:
    """Codes of the samples of a seed that have these numbers, each of its class and below the codes of its upper
    levels: inpainting with nothing known.

    `grid` is rows and columns, where other than those trained on.
    """
    where = next(prior.parameters()).device
    height, width = grid or (prior.level.height, prior.level.width)
    known = torch.zeros(len(rows), height, width, dtype=torch.int64, device=where)
    seeds = row_seeds(seed, rows.to(where))
    return prior.method.sampler(
        prior,
        known=known,
        known_mask=torch.zeros_like(known, dtype=torch.bool),
        seeds=derive(seeds, LEVEL, len(upper)) if upper else seeds,
        labels=labels.to(where) if labels is not None and prior.classes else None,
        upper=upper,
        sampling=sampling,
        callback=callback,
    )


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
