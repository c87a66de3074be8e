"""Filling the holes of images: from pixels to codes, through the prior, and back into the images, at any size.

The command, with its files and masks, is `inpaint.py`; how a fill meets its image, `smalti.images.blending`.

Legend: b batch, k candidates, c channels, h w pixels, y x codes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from smalti.commands.class_labels import draw_labels, that_knows_classes
from smalti.core.devices import Precision, autocast
from smalti.core.errors import UserError
from smalti.core.randomness import Stream, derive, row_seeds
from smalti.images.blending import compose
from smalti.images.decoding import to_float
from smalti.images.masks import DILATION_CODES, blank, known_codes
from smalti.priors.base import CodePrior, Prior
from smalti.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Filling:
    """How a hole is filled, beside the sampling of its codes.

    Raises:
        UserError: for values outside their ranges.
    """

    candidates: int = 16
    """How many are drawn for each fill that is kept: the one that goes best with the pixels beside the hole."""
    dilation: int = DILATION_CODES
    """How many codes around the hole are drawn anew too, as the encoder saw the blanked hole through them."""
    feather: int = 0
    """Pixels outside the hole's edge over which the fill fades into the image; all others come back exactly."""
    match_colour: bool = True
    """Shift the fill's colours by what they are off at the hole's rim."""
    largest: float = 4.0
    """An image of more than this many times the area the model was trained at is worked on shrunk to that, and its
    fills are enlarged; what is known stays at full size."""

    def __post_init__(self) -> None:
        if self.candidates < 1 or self.largest <= 0:
            raise UserError(
                f"--candidates must be at least 1 and --largest above 0, not {self.candidates} and {self.largest}"
            )
        if self.dilation < 0 or self.feather < 0:
            raise UserError(f"--dilation and --feather must be at least 0, not {self.dilation} and {self.feather}")


class WorkingSize(NamedTuple):
    """At what size an image is worked on: first resized to `height` x `width`, then its edges repeated to the rest."""

    height: int
    width: int
    padded_height: int
    padded_width: int


def working_size(tokenizer: Tokenizer, height: int, width: int, largest: float) -> WorkingSize:
    """The size itself where the tokenizer takes it and it is not too large; see `Filling.largest`."""
    most = largest * tokenizer.config.height * tokenizer.config.width
    shrink = min(1.0, math.sqrt(most / (height * width)))
    height, width = max(1, round(height * shrink)), max(1, round(width * shrink))
    step = tokenizer.downsampling
    return WorkingSize(height, width, math.ceil(height / step) * step, math.ceil(width / step) * step)


@torch.no_grad()
def fill(
    priors: Sequence[Prior],
    tokenizer: Tokenizer,
    pixels: UInt8[Tensor, "b c h w"],
    mask: Bool[Tensor, "b h w"],
    *,
    seeds: Int64[Tensor, " b"],
    sampling: Any,
    labels: Int64[Tensor, " b"] | None = None,
    filling: Filling = Filling(),
    callback: Callable[[int, Tensor], None] | None = None,
) -> UInt8[Tensor, "b c h w"]:
    """The images with their holes filled; pixels outside hole and feather band are those given.

    What the holes hide is painted over before anything else, so the fill cannot depend on it, and the codes beside a
    hole, whose pixels saw the paint, are drawn anew. The pixels there that are known then judge: of several candidates
    the one is kept whose decoding comes nearest to them. Of several levels, each is filled given those above it, with
    its own codes around the hole drawn anew.

    Args:
        priors: of each level, coarsest first, on the device to compute on.
        tokenizer: on the same device.
        pixels: of any size, which stays.
        hole: True = to fill; not all of an image.
        seeds: one for each image.
        sampling: how codes are drawn, by priors of whose kind it is; the others keep their defaults for filling.
        labels: the class of each, -1 for any; None is any for all.
        filling: the rest.
        callback: as that of a sampler, with the candidates of an image after each other.

    Raises:
        UserError: for a prior over real numbers, which cannot be told a part of them.
    """
    for prior in priors:
        if not isinstance(prior, CodePrior):
            raise UserError(f"a {prior.kind} draws whole images and cannot fill in parts; fill with a prior of codes")
    where, (height, width), k = next(priors[0].parameters()).device, pixels.shape[2:], filling.candidates
    work = working_size(tokenizer, height, width, filling.largest)
    painted, work_mask = _at_working_size(blank(to_float(pixels), mask), mask, work)
    painted, work_mask = painted.to(where), work_mask.to(where)
    with torch.autocast(where.type, enabled=False):
        encoded = tokenizer.encode(painted)
    of_candidates = derive(seeds.to(where).repeat_interleave(k), torch.arange(k, device=where).repeat(len(pixels)))
    codes: tuple[Tensor, ...] = ()
    settings = torch.zeros_like(work_mask)
    for prior, known in zip(priors, encoded, strict=True):
        pixels_a_code = work.padded_height // known.shape[1]
        known_mask = known_codes(work_mask, pixels_a_code, dilation=filling.dilation)
        settings |= ~work_mask & ~_patches(known_mask, pixels_a_code)
        codes += (
            prior.method.sampler(
                prior,
                known=known.repeat_interleave(k, 0),
                known_mask=known_mask.repeat_interleave(k, 0),
                seeds=derive(of_candidates, Stream.LEVEL, len(codes)) if codes else of_candidates,
                labels=labels.to(where).repeat_interleave(k) if labels is not None and prior.classes else None,
                upper=codes,
                sampling=filling_of(prior, sampling),
                callback=callback,
            ),
        )
    with torch.autocast(where.type, enabled=False):
        decoded: Float[Tensor, "bk c h w"] = tokenizer.decode(codes)
    kept = _nearest(decoded.unflatten(0, (len(pixels), k)), painted, settings)
    kept = kept[:, :, : work.height, : work.width].cpu()
    if (work.height, work.width) != (height, width):
        kept = F.interpolate(kept, (height, width), mode="bicubic").clamp(-1, 1)
    return compose(pixels, kept, mask, feather_pixels=filling.feather, match_colour=filling.match_colour)


def filling_of(prior: Prior, given: Any) -> Any:
    """How a prior fills: as given, if that is for its kind; else by its kind's defaults."""
    return given if isinstance(given, prior.method.sampling) else prior.method.filling()


def fills(
    priors: Sequence[Prior],
    tokenizer: Tokenizer,
    pixels: UInt8[Tensor, "c h w"],
    mask: Bool[Tensor, "h w"],
    *,
    num: int,
    seed: int,
    classes: Sequence[int],
    sampling: Any,
    filling: Filling,
    precision: Precision,
    callback: Callable[[int, Tensor], None] | None = None,
) -> UInt8[Tensor, "n c h w"]:
    """`num` fills of one image, of these classes in turn, or of any; fill i depends on the seed and on i alone.

    The rest is as in `fill`; `precision` is that of the priors.
    """
    numbers = torch.arange(num)
    with autocast(next(priors[0].parameters()).device, precision):
        return fill(
            priors,
            tokenizer,
            pixels.expand(num, -1, -1, -1),
            mask.expand(num, -1, -1),
            seeds=row_seeds(seed, numbers),
            labels=draw_labels(that_knows_classes(priors), classes, numbers, seed) if classes else None,
            sampling=sampling,
            filling=filling,
            callback=callback,
        )


def calls_of(priors: Sequence[Prior], tokenizer: Tokenizer, sampling: Any, size: WorkingSize) -> int:
    """How often a callback hears of one image's progress, at most."""
    trained = tokenizer.config
    return sum(
        filling_of(prior, sampling).calls(
            prior.level.height * size.padded_height // trained.height,
            prior.level.width * size.padded_width // trained.width,
        )
        for prior in priors
    )


def _at_working_size(
    images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b h w"], work: WorkingSize
) -> tuple[Float[Tensor, "b c h2 w2"], Bool[Tensor, "b h2 w2"]]:
    """A pixel made from any of the hole's is of the hole."""
    size, masks = (work.height, work.width), mask.unsqueeze(1).float()
    if size != tuple(images.shape[2:]):
        images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)
        masks = F.adaptive_max_pool2d(masks, size)
    padding = (0, work.padded_width - work.width, 0, work.padded_height - work.height)
    images, masks = (F.pad(each, padding, mode="replicate") for each in (images, masks))
    return images, masks.squeeze(1) > 0


def _patches(of_codes: Bool[Tensor, "b y x"], downsampling: int) -> Bool[Tensor, "b h w"]:
    """For each pixel what holds for its code."""
    return of_codes.repeat_interleave(downsampling, 1).repeat_interleave(downsampling, 2)


def _nearest(
    candidates: Float[Tensor, "b k c h w"], given: Float[Tensor, "b c h w"], settings: Bool[Tensor, "b h w"]
) -> Float[Tensor, "b c h w"]:
    """Of each image's candidates the one nearest to what is given at the judging pixels."""
    errors = ((candidates - given.unsqueeze(1)).square().sum(2) * settings.unsqueeze(1)).sum((2, 3))
    return candidates[torch.arange(len(given), device=given.device), errors.argmin(1)]
