"""The functions that most programs need: load a trained tokenizer or prior, draw images, inpaint pictures.

These four functions work on tensors and PIL images and write no files; the commands of the same names add files, sheets
and progress bars. `smalti/__init__.py` exports them.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from smalti.commands import model_paths
from smalti.commands.class_labels import find_conditions
from smalti.commands.generating import generate_images
from smalti.commands.inpainting import Filling, fills
from smalti.core.devices import Precision, generators_kept
from smalti.core.errors import UserError, require_at_least_one, whole_number
from smalti.images.formats.planes import MODES, flatten, to_tensor
from smalti.images.masks import MID_GREY
from smalti.priors.base import Prior
from smalti.tokenizers.base import Tokenizer


@generators_kept()
def load_tokenizer(source: str | Path) -> Tokenizer:
    """Loads a trained tokenizer in evaluation mode on the CPU.

    Args:
        source: `"portraits"`, the one in the package; a folder; a kind (`"hrvq"` is the one in
            `runs/tokenizers/hrvq`); or a hub id: `owner/name`, `owner/name@revision` or `owner/name/folder`. A
            `Path` is never a name in the package or a kind.

    Raises:
        UserError: if there is no tokenizer, it is damaged, or its weights do not fit its config.
    """
    return model_paths.load_tokenizer(source)


@generators_kept()
def load_prior(source: str | Path) -> Prior:
    """Loads a trained prior in evaluation mode on the CPU.

    Args:
        source: `"portraits"`, the one in the package; a folder; a kind (`"hourglass"` is the one in
            `runs/priors/hourglass`); or a hub id: `owner/name`, `owner/name@revision` or `owner/name/folder`. A
            `Path` is never a name in the package or a kind.

    Raises:
        UserError: if there is no prior, it is damaged, or its weights do not fit its config.
    """
    return model_paths.load_prior(source)


@torch.no_grad()
@generators_kept()
def sample(
    prior: Prior | Sequence[Prior],
    tokenizer: Tokenizer | None = None,
    *,
    num: SupportsIndex = 16,
    classes: Iterable[str | SupportsIndex] | None = (),
    conditions: Float[Tensor, "_n _v"] | Float[np.ndarray, "_n _v"] | None = None,
    seed: SupportsIndex = 0,
    sampling: Any = None,
    batch_size: SupportsIndex = 64,
    precision: Precision = "auto",
) -> UInt8[Tensor, "n c h w"]:
    """Draws new images, on the device of the prior.

    Args:
        prior: a prior in evaluation mode, as loaded; for a tokenizer of several levels, the prior of each level.
        tokenizer: the tokenizer that made the prior's codes; by default the copy in the folder that the prior was
            loaded from. It is moved to the prior's device.
        num: the number of images.
        classes: names of classes, or their numbers, to draw in turn: image i has the class `classes[i % len(classes)]`;
            by default, every image draws its class as often as the training set has it.
        conditions: for a prior conditioned on vectors, those of the images, in turn; by default, none.
        seed: image i depends on the seed and on i alone, whatever `num` is.
        sampling: the sampler's settings, for example `SundaeSampling(steps=25)`; by default those of the prior's kind.
            Among priors of several kinds, they apply to those of their kind.
        batch_size: images drawn at once; the images stay the same up to rounding, which may change some pixels by 1.
        precision: of the prior's network: `auto`, `fp32`, `bf16`, or `fp16` on a GPU.

    Returns:
        Images with values from 0 to 255, on the CPU.

    Raises:
        UserError: for an unknown class, vectors or settings that do not fit the prior, a number below 1 or not whole, a
            tokenizer that cannot be found, or if there is not one prior for each level of the tokenizer.
    """
    num, batch_size, seed = whole_number("num", num), whole_number("batch_size", batch_size), whole_number("seed", seed)
    require_at_least_one({"num": num, "batch_size": batch_size})
    priors, tokenizer = _together(prior, tokenizer, sampling)
    return generate_images(
        priors,
        tokenizer,
        num=num,
        seed=seed,
        sampling=sampling,
        conditions=find_conditions(priors, classes, conditions).values,
        batch_size=batch_size,
        precision=precision,
    )


@torch.no_grad()
@generators_kept()
def inpaint(
    prior: Prior | Sequence[Prior],
    image: Image.Image | UInt8[Tensor, "c h w"],
    mask: Image.Image | Bool[Tensor, "y x"],
    tokenizer: Tokenizer | None = None,
    *,
    num: SupportsIndex = 3,
    classes: Iterable[str | SupportsIndex] | None = (),
    conditions: Float[Tensor, "_n _v"] | Float[np.ndarray, "_n _v"] | None = None,
    seed: SupportsIndex = 0,
    sampling: Any = None,
    filling: Filling | None = None,
    precision: Precision = "auto",
) -> UInt8[Tensor, "n c h w"]:
    """Fills the masked part of an image, several times; every other pixel comes back unchanged.

    Args:
        prior: a prior over codes, in evaluation mode; for a tokenizer of several levels, the prior of each level.
        image: a PIL image of any size and mode, or a uint8 tensor with the tokenizer's channels.
        mask: True is filled; of a PIL image, pixels lighter than mid-grey are.
        tokenizer: as in `sample`.
        num: the number of fills.
        classes: names of classes, or their numbers, to fill with in turn; by default any.
        conditions: for a prior conditioned on vectors, those of the fills, in turn; by default, none.
        seed: fill i depends on the seed and on i alone.
        sampling: the sampler's settings, for example `SundaeSampling(steps=10)`; by default those that the prior's kind
            has for inpainting. `MaskedSampling` and `AncestralSampling` fit too, with the defaults for new images.
        filling: the other settings, for example `Filling(candidates=4, feather=1)`.
        precision: as in `sample`.

    Returns:
        The fills at the image's size, on the CPU.

    Raises:
        UserError: for an image or a mask of another type, a mask of another size than the image, a mask that covers all
            or nothing, or as `sample` does.
    """
    num, seed = whole_number("num", num), whole_number("seed", seed)
    require_at_least_one({"num": num})
    priors, tokenizer = _together(prior, tokenizer, sampling)
    channels = tokenizer.image_channels
    pixels = image if isinstance(image, Tensor) else _pixels(image, channels, "image")
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or len(pixels) != channels:
        raise UserError(
            f"the image is a {pixels.dtype} tensor of the shape {tuple(pixels.shape)}; give a torch.uint8 tensor of "
            f"the shape ({channels}, h, w), with values from 0 to 255"
        )
    masked = mask if isinstance(mask, Tensor) else _pixels(mask, 1, "mask")[0] > MID_GREY
    if masked.dtype != torch.bool or masked.ndim != 2:
        raise UserError(
            f"the mask is a {masked.dtype} tensor of the shape {tuple(masked.shape)}; give a torch.bool tensor of the "
            "shape (h, w), True where the image is filled"
        )
    if masked.shape != pixels.shape[1:]:
        sizes = [f"{shape[-1]}x{shape[-2]}" for shape in (masked.shape, pixels.shape)]
        raise UserError(f"the mask is {sizes[0]} but the image is {sizes[1]}; resize one to the other")
    if not masked.any() or masked.all():
        filled = "True is" if isinstance(mask, Tensor) else "pixels lighter than mid-grey are"
        raise UserError(f"the mask must cover a part of the image: {filled} filled, and something must be left")
    if filling is not None and not isinstance(filling, Filling):
        raise UserError(
            f"filling is a {type(filling).__name__}; give Filling(...), and the sampler's settings as sampling"
        )
    filling = filling or Filling()
    return fills(
        priors,
        tokenizer,
        pixels.cpu(),
        masked.cpu(),
        num=num,
        seed=seed,
        conditions=find_conditions(priors, classes, conditions).values,
        sampling=sampling,
        filling=filling,
        precision=precision,
    )


def _together(
    prior: Prior | Sequence[Prior], tokenizer: Tokenizer | None, sampling: Any
) -> tuple[list[Prior], Tokenizer]:
    """Returns the priors, coarsest first, and their tokenizer on the same device.

    Raises:
        UserError: if they do not fit together or are no models, or the settings of the sampler fit none of the
            priors.
    """
    priors: list[Any] = list(prior) if isinstance(prior, Iterable) and not isinstance(prior, str) else [prior]
    if not priors:
        raise UserError("there is no prior; give one, or one for each level of the tokenizer")
    for name, kind, models in [("prior", Prior, priors), ("tokenizer", Tokenizer, [tokenizer] if tokenizer else [])]:
        if wrong := [each for each in models if not isinstance(each, kind)]:
            shown = repr(str(wrong[0])[:100]) if isinstance(wrong[0], str | Path) else f"a {type(wrong[0]).__name__}"
            raise UserError(f"{name} is {shown}; give a {name}, as load_{name} returns")
        for weights in (next(each.parameters()) for each in models):
            if weights.dtype != torch.float32:
                raise UserError(
                    f"the weights of the {name} are {weights.dtype}; leave them torch.float32, and give "
                    "precision='bf16' or 'fp16' for the network"
                )
    tokenizer = tokenizer or model_paths.tokenizer_beside(priors[0])
    model_paths.require_same_codes(priors, tokenizer)
    kinds = tuple(dict.fromkeys(each.method.sampling for each in priors))
    if sampling is not None and not isinstance(sampling, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"sampling is {str(sampling)[:100]}, which does not fit the prior; give {names}(...)")
    return model_paths.coarsest_first(priors, tokenizer), tokenizer.to(priors[0].device)


def _pixels(image: Image.Image, channels: int, name: str) -> UInt8[Tensor, "c h w"]:
    """Returns the pixels that a file of this image would give: upright, on white, with these channels.

    Raises:
        UserError: if it is no PIL image, whose `name` the error has; for a number of channels that PIL images do not
            have.
    """
    if not isinstance(image, Image.Image):
        raise UserError(f"the {name} is a {type(image).__name__}; give a PIL image, as Image.open returns, or a tensor")
    if channels not in MODES:
        raise UserError(f"PIL images have no {channels} channels; give a tensor")
    return to_tensor([flatten(ImageOps.exif_transpose(image), MODES[channels])])
