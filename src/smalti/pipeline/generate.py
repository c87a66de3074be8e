"""What a trained pair of tokenizer and prior is for: new images. Filling holes in given ones is in `inpaint.py`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from smalti.devices import Device, Precision, autocast, device
from smalti.errors import UserError
from smalti.interfaces import Tokenizer
from smalti.pictures import save_grid, save_sheet
from smalti.pipeline.classes import draw_labels, find_classes
from smalti.pipeline.places import RUNS, load_prior
from smalti.priors.prior import Prior
from smalti.priors.samplers import SundaeSampling, sample_sundae
from smalti.progress import bar, counting
from smalti.randomness import row_seeds
from smalti.runs import flatten, versions


@dataclass(frozen=True)
class Sample:
    """How to generate images."""

    sampling: SundaeSampling = field(default_factory=SundaeSampling)
    prior: str = "hourglass"
    """A trained prior: a kind (the one in runs/priors/KIND), a folder, or a hub id."""
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
def sample(config: Sample) -> Path:
    """Writes a sheet of new images; returns its path.

    Raises:
        UserError: for a prior, tokenizer or number that will not do.
    """
    if config.num < 1 or config.batch_size < 1:
        raise UserError(f"--num and --batch-size must be at least 1, not {config.num} and {config.batch_size}")
    where = device(config.device)
    prior, tokenizer = load_prior(config.prior, config.tokenizer)
    prior, tokenizer = prior.to(where), tokenizer.to(where)
    classes = find_classes(prior, config.classes)
    grid = _grid(config, prior, tokenizer)
    images = []
    batches = range(0, config.num, config.batch_size)
    with bar(what="sampling", total=len(batches) * config.sampling.steps, unit="step") as progress:
        for index, start in enumerate(batches):
            rows = torch.arange(start, min(start + config.batch_size, config.num))
            labels = draw_labels(prior, list(classes.values()), rows, config.seed)
            with autocast(where, config.precision):
                codes = generate_codes(
                    prior,
                    rows,
                    labels,
                    grid=grid,
                    seed=config.seed,
                    sampling=config.sampling,
                    callback=counting(progress),
                )
            images.append(tokenizer.decode((codes,)).cpu())
            progress.update((index + 1) * config.sampling.steps - progress.n)  # steps that stopping early saved
    settings = {**flatten(config), "prior_digest": prior.digest(), "versions": versions()}
    if classes:
        of_class = {name: torch.cat(images)[i :: len(classes)] for i, name in enumerate(classes) if i < config.num}
        save_sheet(config.out, of_class, settings=settings)
    else:
        save_grid(config.out, torch.cat(images), settings=settings)
    return config.out


@torch.no_grad()
def generate_codes(
    prior: Prior,
    rows: Int64[Tensor, " b"],
    labels: Int64[Tensor, " b"] | None,
    *,
    seed: int,
    sampling: SundaeSampling,
    grid: tuple[int, int] | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Int64[Tensor, "b h w"]:
    """Codes of the samples of a seed that have these numbers, each of its class: inpainting with nothing known.

    `grid` is rows and columns, where other than those trained on.
    """
    where = next(prior.parameters()).device
    height, width = grid or (prior.level.height, prior.level.width)
    known = torch.zeros(len(rows), height, width, dtype=torch.int64, device=where)
    return sample_sundae(
        prior,
        known=known,
        known_mask=torch.zeros_like(known, dtype=torch.bool),
        seeds=row_seeds(seed, rows.to(where)),
        labels=None if labels is None else labels.to(where),
        sampling=sampling,
        callback=callback,
    )


def _grid(config: Sample, prior: Prior, tokenizer: Tokenizer) -> tuple[int, int]:
    """Rows and columns of codes of images of the size asked for."""
    sizes = {"height": (config.height, prior.level.height), "width": (config.width, prior.level.width)}
    for name, (pixels, _) in sizes.items():
        if pixels is not None and (pixels < 1 or pixels % tokenizer.downsampling):
            raise UserError(f"--{name} must be a multiple of {tokenizer.downsampling} pixels, not {pixels}")
    height, width = (codes if pixels is None else pixels // tokenizer.downsampling for pixels, codes in sizes.values())
    return height, width
