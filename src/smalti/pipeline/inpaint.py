"""What a trained pair of tokenizer and prior is for besides new images: the missing parts of given ones."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from smalti.devices import Device, Precision, autocast, device
from smalti.errors import UserError
from smalti.interfaces import Tokenizer
from smalti.masks import blank, known_codes, load_mask
from smalti.pictures import save_png, save_sheet, to_image
from smalti.pipeline.places import RUNS, load_prior, prior_class
from smalti.preprocess import load_image, to_float, to_uint8
from smalti.priors.prior import Prior
from smalti.progress import bar, counting
from smalti.randomness import derive, row_seeds
from smalti.runs import flatten, versions

S = TypeVar("S")


@dataclass(frozen=True)
class Inpaint(Generic[S]):
    """How to fill the holes of an image."""

    image: Path
    """The image to mend: any format that Pillow opens, of a size that divides by the tokenizer's downsampling."""
    mask: Path
    """An image of the same size: what is white is filled in."""
    sampling: S
    """How codes are drawn."""
    invert: bool = False
    """Fill what is black in the mask instead."""
    num: int = 3
    """How many different fills."""
    candidates: int = 16
    """How many are drawn for each fill that is kept: the one that goes best with the pixels beside the hole."""
    prior: str = "hourglass"
    """A trained prior: a kind (the one in runs/priors/KIND), a folder, or a hub id."""
    tokenizer: str | None = None
    """Its tokenizer: a kind, a folder or a hub id [default: the copy in the prior's folder]."""
    seed: int = 0
    """Fill i depends on the seed and i alone."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """Arithmetic of the prior; auto is bf16 where the hardware is fast in it."""
    out: Path = RUNS / "inpainted.png"
    """The first fill; further ones get -2, -3, ... and a sheet of all -sheet after the name."""


def inpaint(config: Inpaint[Any]) -> Path:
    """Fills the holes of one image several times; returns the first fill's path.

    Every pixel outside the mask comes back exactly.

    Raises:
        UserError: for a file, mask or model that will not do, or sizes that do not fit together.
    """
    if config.num < 1 or config.candidates < 1:
        raise UserError(f"--num and --candidates must be at least 1, not {config.num} and {config.candidates}")
    where = device(config.device)
    prior, tokenizer = load_prior(config.prior, config.tokenizer)
    prior, tokenizer = prior.to(where), tokenizer.to(where)
    pixels = load_image(config.image, channels=tokenizer.image_channels)
    _, height, width = pixels.shape
    if height % tokenizer.downsampling or width % tokenizer.downsampling:
        trained = f"{tokenizer.config.width}x{tokenizer.config.height}"
        raise UserError(
            f"{config.image} is {width}x{height}, which does not divide by {tokenizer.downsampling}; crop or resize it "
            f"(the model knows {trained} best)"
        )
    hole = load_mask(config.mask, height=height, width=width, invert=config.invert)
    calls = config.sampling.calls(height // tokenizer.downsampling, width // tokenizer.downsampling)
    with (
        bar(what="filling", total=calls, unit="step") as progress,
        autocast(where, config.precision),
    ):
        filled = fill(
            prior,
            tokenizer,
            pixels.expand(config.num, -1, -1, -1),
            hole.expand(config.num, -1, -1),
            seeds=row_seeds(config.seed, torch.arange(config.num)),
            sampling=config.sampling,
            candidates=config.candidates,
            callback=counting(progress),
        )
    settings = {**flatten(config), "prior_digest": prior.digest(), "versions": versions()}
    for index, image in enumerate(filled):
        name = config.out if index == 0 else config.out.with_stem(f"{config.out.stem}-{index + 1}")
        save_png(name, to_image(image), {**settings, "fill": index})
    masked = blank(to_float(pixels).unsqueeze(0), hole.unsqueeze(0))
    rows = {"image": to_float(pixels).unsqueeze(0), "masked": masked, "fills": to_float(filled)}
    save_sheet(config.out.with_stem(f"{config.out.stem}-sheet"), rows, settings=settings)
    return config.out


@torch.no_grad()
def fill(
    prior: Prior,
    tokenizer: Tokenizer,
    pixels: Tensor,
    hole: Bool[Tensor, "b h w"],
    *,
    seeds: Int64[Tensor, " b"],
    sampling: Any,
    candidates: int = 1,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Images `(b, c, h, w)` uint8 with their holes filled; pixels outside the holes are those given.

    What the holes hide is painted over before encoding, so the fill cannot depend on it, and the codes beside a hole,
    whose pixels saw the paint, are drawn anew. The pixels there that are known then judge: of several candidates the
    one is kept whose decoding comes nearest to them.
    """
    where, b = next(prior.parameters()).device, len(pixels)
    hole, given = hole.to(where), to_float(pixels).to(where)
    with torch.autocast(where.type, enabled=False):
        (known,) = tokenizer.encode(blank(given, hole))
    known_mask = known_codes(hole, tokenizer.downsampling)
    seeds = derive(seeds.to(where).repeat_interleave(candidates), torch.arange(candidates, device=where).repeat(b))
    codes = prior.method.sampler(
        prior,
        known=known.repeat_interleave(candidates, 0),
        known_mask=known_mask.repeat_interleave(candidates, 0),
        seeds=seeds,
        sampling=sampling,
        callback=callback,
    )
    with torch.autocast(where.type, enabled=False):
        decoded: Float[Tensor, "bk c h w"] = tokenizer.decode((codes,))
    of_images = decoded.unflatten(0, (b, candidates))  # b k c h w
    judging = ~hole & ~_patches(known_mask, tokenizer.downsampling)  # b h w
    errors = ((of_images - given.unsqueeze(1)).square().sum(2) * judging.unsqueeze(1)).sum((2, 3))  # b k
    kept = of_images[torch.arange(b, device=where), errors.argmin(1)]
    return torch.where(hole.unsqueeze(1).cpu(), to_uint8(kept).cpu(), pixels)


def _patches(of_codes: Bool[Tensor, "b y x"], downsampling: int) -> Bool[Tensor, "b h w"]:
    """For each pixel what holds for its code."""
    return of_codes.repeat_interleave(downsampling, 1).repeat_interleave(downsampling, 2)


def default_config(source: str) -> Any:
    """The config class for a prior, for the command line: `Inpaint` of its kind's sampling, an alias and no `type`."""
    return Inpaint[prior_class(source).method.filling]
