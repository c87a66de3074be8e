"""Inpainting: from masked pixels to codes, through the prior, and back to pixels, at any image size.

The command, with its files and masks, is in `inpaint.py`; blending a fill into its image is in
`images/blending.py`.

Legend: b batch, k candidates, c channels, h w pixels, y x codes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from smalti.commands.class_labels import draw_conditions
from smalti.commands.generating import sampling_for
from smalti.core.devices import Precision, autocast
from smalti.core.errors import UserError, require_numbers
from smalti.core.randomness import Stream, derive, row_seeds
from smalti.images.blending import compose
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows
from smalti.images.masks import DILATION_CODES, blank, examples, known_codes
from smalti.images.sheets import save_sheet
from smalti.priors.base import CodePrior, Prior
from smalti.priors.conditioning import Condition
from smalti.tokenizers.base import Tokenizer

EXAMPLES_PER_MASK, FILLS_PER_EXAMPLE = 2, 3
MOST_AROUND = 1000
"""Largest dilation, in codes, and feather band, in pixels."""


@dataclass(frozen=True)
class Filling:
    """Settings of a fill besides the sampling of its codes.

    Raises:
        UserError: for values outside their ranges.
    """

    candidates: int = 16
    """Candidates sampled for each fill; the one that best matches the known pixels beside the mask is kept. Fewer are
    faster, more fit better."""
    dilation: int = DILATION_CODES
    """Width, in codes, of the ring around the mask that is sampled too, since the encoder saw masked pixels there."""
    feather: int = 0
    """Width, in pixels outside the mask, of the band where the fill fades into the image. All other known pixels stay
    exact."""
    match_colour: bool = True
    """Shift the fill's colours to match the image's shades at the mask's edge. If the fill is visible because it has
    other colours than the image, try --feather 1."""
    largest: float = 4.0
    """Largest area that the model fills directly, as a multiple of the area it was trained at. Larger images are filled
    at reduced size and the fill is enlarged; their known pixels stay exact."""

    def __post_init__(self) -> None:
        require_numbers(self)
        if self.candidates < 1 or self.largest <= 0:
            raise UserError(
                f"--candidates must be at least 1 and --largest above 0, not {self.candidates} and {self.largest}"
            )
        if self.dilation < 0 or self.feather < 0:
            raise UserError(f"--dilation and --feather must be at least 0, not {self.dilation} and {self.feather}")
        if max(self.dilation, self.feather) > MOST_AROUND:
            raise UserError(
                f"--dilation and --feather must be at most {MOST_AROUND}, not {self.dilation} and {self.feather}"
            )


class WorkingSize(NamedTuple):
    """The size an image is filled at: resized to `height` x `width`, then padded by repeating its edges."""

    height: int
    width: int
    padded_height: int
    padded_width: int


def working_size(tokenizer: Tokenizer, height: int, width: int, largest: float) -> WorkingSize:
    """Returns the size to fill an image at: its own, if the tokenizer supports that and `largest` allows it.

    See `Filling.largest`.
    """
    largest_area = largest * tokenizer.config.height * tokenizer.config.width
    scale = min(1.0, math.sqrt(largest_area / (height * width)))
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    factor = tokenizer.downsampling
    if scale < 1 and min(height, width) < factor:  # padding it to a whole code would exceed the area
        longest = max(factor, int(largest_area / factor))
        height, width = min(height, longest), min(width, longest)
    return WorkingSize(height, width, math.ceil(height / factor) * factor, math.ceil(width / factor) * factor)


@torch.no_grad()
def fill(
    priors: Sequence[Prior],
    tokenizer: Tokenizer,
    pixels: UInt8[Tensor, "b c h w"],
    mask: Bool[Tensor, "b h w"],
    *,
    seeds: Int64[Tensor, " b"],
    sampling: Any,
    condition: Condition | None = None,
    filling: Filling = Filling(),
    callback: Callable[[int, Tensor], None] | None = None,
) -> UInt8[Tensor, "b c h w"]:
    """Fills the masked pixels of images; pixels outside the mask and its feather band stay exact.

    The masked pixels are blanked before anything else, so the fill cannot depend on them. The codes
    beside the mask, whose receptive field includes blanked pixels, are sampled as well. The known
    pixels under those codes select the best candidate: the one whose decoding is nearest to them.
    Each level is filled conditioned on the coarser levels, with its own ring of codes around the mask.

    Args:
        priors: one for each level, coarsest first, on the device that computes.
        tokenizer: decodes the priors' codes, on the same device.
        pixels: images of any size; the result has the same size.
        mask: True = fill; not all of an image.
        seeds: one for each image.
        sampling: settings for priors of its kind; the others use their defaults for filling.
        condition: the class of each image, -1 for any, or its vector; None is any for all.
        filling: the other settings.
        callback: a sampler's callback; it receives the candidates of each image in sequence.

    Raises:
        UserError: for a prior over real-valued latents, which cannot be conditioned on a part of them.
    """
    for prior in priors:
        if not isinstance(prior, CodePrior):
            raise UserError(f"a {prior.kind} samples whole images and cannot fill in parts; use a prior of codes")
    device, (height, width) = priors[0].device, pixels.shape[2:]
    size = working_size(tokenizer, height, width, filling.largest)
    blanked, resized_mask = (each.to(device) for each in _prepared(pixels, mask, size))
    condition = None if condition is None else condition.to(device)
    work = _Work(blanked, resized_mask, seeds.to(device), condition)
    codes, scored = _sample_levels(priors, tokenizer, work, sampling, filling, callback)
    with torch.autocast(device.type, enabled=False):
        decoded: Float[Tensor, "bk c h w"] = tokenizer.decode(codes)
    best = _nearest(decoded.unflatten(0, (len(pixels), filling.candidates)), work.images, scored)
    best = best[:, :, : size.height, : size.width].cpu()
    options = {"feather_pixels": filling.feather, "match_colour": filling.match_colour}
    if (size.height, size.width) == (height, width):
        return compose(pixels, best, mask, **options)
    result = torch.empty(pixels.shape, dtype=torch.uint8)
    for index in range(len(pixels)):  # one at a time, to bound the memory
        one = slice(index, index + 1)
        enlarged = F.interpolate(best[one], (height, width), mode="bicubic").clamp_(-1, 1)
        result[one] = compose(pixels[one], enlarged, mask[one], **options)
    return result


@dataclass(frozen=True)
class _Work:
    """Images to fill, blanked under their masks and at the working size, on the device that computes."""

    images: Float[Tensor, "b c h w"]
    mask: Bool[Tensor, "b h w"]
    seeds: Int64[Tensor, " b"]
    condition: Condition | None


def _sample_levels(
    priors: Sequence[Prior],
    tokenizer: Tokenizer,
    work: _Work,
    sampling: Any,
    filling: Filling,
    callback: Callable[[int, Tensor], None] | None,
) -> tuple[tuple[Int64[Tensor, "bk _y _x"], ...], Bool[Tensor, "b h w"]]:
    """Samples the unknown codes of all levels, `candidates` times for each image.

    Returns:
        The codes of all levels, and the known pixels under sampled codes, which score the candidates.
    """
    device, k = work.images.device, filling.candidates
    condition = None if work.condition is None else work.condition.repeat_interleave(k, 0)
    with torch.autocast(device.type, enabled=False):
        encoded = tokenizer.encode(work.images)
    candidate_seeds = derive(work.seeds.repeat_interleave(k), torch.arange(k, device=device).repeat(len(work.seeds)))
    codes: tuple[Tensor, ...] = ()
    scored = torch.zeros_like(work.mask)
    for prior, known in zip(priors, encoded, strict=True):
        pixels_per_code = work.images.shape[2] // known.shape[1]
        known_mask = known_codes(work.mask, pixels_per_code, dilation=filling.dilation)
        scored |= ~work.mask & ~_to_pixels(known_mask, pixels_per_code)
        codes += (
            prior.method.sampler(
                prior,
                known=known.repeat_interleave(k, 0),
                known_mask=known_mask.repeat_interleave(k, 0),
                seeds=derive(candidate_seeds, Stream.LEVEL, len(codes)) if codes else candidate_seeds,
                condition=condition if prior.conditional else None,
                upper=codes,
                sampling=sampling_for(prior, sampling, inpainting=True),
                callback=callback,
            ),
        )
    return codes, scored


def fills(
    priors: Sequence[Prior],
    tokenizer: Tokenizer,
    pixels: UInt8[Tensor, "c h w"],
    mask: Bool[Tensor, "h w"],
    *,
    num: int,
    seed: int,
    conditions: Sequence[int] | Float[Tensor, "_n _v"],
    sampling: Any,
    filling: Filling,
    precision: Precision,
    callback: Callable[[int, Tensor], None] | None = None,
) -> UInt8[Tensor, "n c h w"]:
    """Makes `num` fills of one image, with the conditions (classes or vectors) in turn or with any; see `fill`.

    Fill i depends on the seed and on i alone. `precision` is the priors' precision.
    """
    numbers = torch.arange(num)
    with autocast(priors[0].device, precision):
        return fill(
            priors,
            tokenizer,
            pixels.expand(num, -1, -1, -1),
            mask.expand(num, -1, -1),
            seeds=row_seeds(seed, numbers),
            condition=draw_conditions(priors, conditions, numbers, seed) if len(conditions) else None,
            sampling=sampling,
            filling=filling,
            callback=callback,
        )


def callback_calls(priors: Sequence[Prior], tokenizer: Tokenizer, sampling: Any, size: WorkingSize) -> int:
    """Returns the largest number of callback calls for one image, to scale a progress bar."""
    trained = tokenizer.config
    return sum(
        sampling_for(prior, sampling, inpainting=True).calls(
            prior.level.height * size.padded_height // trained.height,
            prior.level.width * size.padded_width // trained.width,
        )
        for prior in priors
    )


def _prepared(
    pixels: UInt8[Tensor, "b c h w"], mask: Bool[Tensor, "b h w"], size: WorkingSize
) -> tuple[Float[Tensor, "b c h2 w2"], Bool[Tensor, "b h2 w2"]]:
    """Blanks the masked pixels, then resizes and pads images and masks; images to be reduced one at a time."""
    if (size.height, size.width) == tuple(pixels.shape[2:]):
        return _to_working_size(blank(to_float(pixels), mask), mask, size)
    pairs = zip(pixels.split(1), mask.split(1), strict=True)
    images, masks = zip(*(_to_working_size(blank(to_float(one), each), each, size) for one, each in pairs), strict=True)
    return torch.cat(images), torch.cat(masks)


def _to_working_size(
    images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b h w"], size: WorkingSize
) -> tuple[Float[Tensor, "b c h2 w2"], Bool[Tensor, "b h2 w2"]]:
    """Resizes and pads images and masks. A pixel is masked if any of the pixels that it replaces is.

    The filter reaches further than these. So that no masked pixel shows in one that is not masked, such a pixel is the
    mean of the known pixels alone, weighted by the filter.
    """
    resized, masks = (size.height, size.width), mask.unsqueeze(1).float()
    if resized != tuple(images.shape[2:]):
        shrink = partial(F.interpolate, size=resized, mode="bicubic", antialias=True)
        known = 1 - masks
        of_all, of_known = shrink(images), shrink(images * known) / shrink(known).clamp(min=0.5)
        masks = F.adaptive_max_pool2d(masks, resized)
        images = torch.where(masks > 0, of_all, of_known).clamp(-1, 1)
    padding = (0, size.padded_width - size.width, 0, size.padded_height - size.height)
    images, masks = (F.pad(each, padding, mode="replicate") for each in (images, masks))
    return images, masks.squeeze(1) > 0


def _to_pixels(code_mask: Bool[Tensor, "b y x"], pixels_per_code: int) -> Bool[Tensor, "b h w"]:
    """Returns, for each pixel, the value of its code."""
    return code_mask.repeat_interleave(pixels_per_code, 1).repeat_interleave(pixels_per_code, 2)


def _nearest(
    candidates: Float[Tensor, "b k c h w"], images: Float[Tensor, "b c h w"], scored: Bool[Tensor, "b h w"]
) -> Float[Tensor, "b c h w"]:
    """Returns, for each image, the candidate with the least squared error at the scored pixels."""
    errors = ((candidates - images.unsqueeze(1)).square().sum(2) * scored.unsqueeze(1)).sum((2, 3))
    return candidates[torch.arange(len(images), device=images.device), errors.argmin(1)]


@torch.no_grad()
def save_example_fills(
    prior: Prior,
    tokenizer: Tokenizer,
    rows: ImageRows,
    path: Path,
    *,
    sampling: Any,
    seed: int = 0,
    precision: Precision = "auto",
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Saves a sheet: for each example mask, some of the images as they are, masked, and filled several times.

    Args:
        prior: the prior of a tokenizer with one level.
        tokenizer: the tokenizer, on the same device.
        rows: the images, of which evenly spread ones are shown.
        path: the PNG file to write.
        sampling: the sampler's config.
        seed: of the fills.
        precision: of the networks.
        settings: embedded in the file.
    """
    masks = examples(tokenizer.config.height, tokenizer.config.width)
    count = len(masks) * EXAMPLES_PER_MASK
    images = rows.__getitems__([(2 * i + 1) * len(rows) // (2 * count) for i in range(count)])["images"]
    mask = torch.stack(list(masks.values())).repeat_interleave(EXAMPLES_PER_MASK, 0)
    with autocast(tokenizer.device, precision):
        filled = fill(
            [prior],
            tokenizer,
            images.repeat_interleave(FILLS_PER_EXAMPLE, 0),
            mask.repeat_interleave(FILLS_PER_EXAMPLE, 0),
            seeds=row_seeds(seed, torch.arange(count * FILLS_PER_EXAMPLE)),
            sampling=sampling,
        )
    columns = [
        to_float(images)[:, None],
        blank(to_float(images), mask)[:, None],
        to_float(filled).unflatten(0, (count, FILLS_PER_EXAMPLE)),
    ]
    shown = f"{EXAMPLES_PER_MASK} images, each with the mask and {FILLS_PER_EXAMPLE} fills"
    captions = [f"{name}: {shown}" for name in masks]
    sheet_rows = torch.cat(columns, 1).flatten(0, 1).chunk(len(masks))
    save_sheet(path, dict(zip(captions, sheet_rows, strict=True)), settings=settings)
