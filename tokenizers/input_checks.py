"""Checks of what a caller gives a tokenizer: images to encode and codes to decode. `Tokenizer` adds them to every kind.

Values are checked on the CPU alone: on an accelerator, the check would wait for everything that is queued there.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from smalti.core.codes import Level
from smalti.core.errors import UserError

LARGEST_VALUE = 2.0
"""Largest absolute value of a pixel. Resampling may overshoot [-1, 1] a little; pixels from 0 to 255 are far beyond."""
_TO_FLOAT = "smalti.images.decoding.to_float"


def checking_first(method: Callable[..., Any], name: str, check: Callable[[Any, object], None]) -> Callable[..., Any]:
    """Returns a method that first calls `check` with the object and its first argument, which is called `name`.

    While torch.compile or torch.export traces the method, nothing is checked.
    """

    @wraps(method)
    def checked(self: Any, *arguments: Any, **named: Any) -> Any:
        if (arguments or name in named) and not torch.compiler.is_compiling():
            check(self, arguments[0] if arguments else named[name])
        return method(self, *arguments, **named)

    return checked


def require_images(images: object, channels: int, dtype: torch.dtype) -> None:
    """Refuses anything but a batch of images.

    Args:
        images: what should be images, `(b, c, h, w)`, in [-1, 1].
        channels: the channels that they should have.
        dtype: the dtype of the network's weights; under autocast, images may have another one.

    Raises:
        UserError: for another type, dtype or shape; on the CPU also for values that are NaN or far outside [-1, 1].
    """
    needed = f"images must be {_name(dtype)} in [-1, 1] with shape (b, {channels}, h, w); these"
    if not isinstance(images, Tensor):
        raise UserError(f"{needed} are a {type(images).__name__}: {_TO_FLOAT} makes them from a tensor of pixels")
    if not images.is_floating_point():
        raise UserError(f"{needed} are {_name(images.dtype)}: convert them with {_TO_FLOAT}")
    if not _fits(images, dtype):
        raise UserError(f"{needed} are {_name(images.dtype)}: convert them with images.to({dtype})")
    if images.ndim != 4 or images.shape[1] != channels:
        raise UserError(f"{needed} have the shape {tuple(images.shape)}")
    if images.device.type == "cpu" and images.numel():
        low, high = map(float, images.detach().aminmax())
        if low != low:
            raise UserError(f"{needed} have values that are not a number (NaN)")
        if low < -LARGEST_VALUE or high > LARGEST_VALUE:
            raise UserError(f"{needed} have values from {low:g} to {high:g}: make them from pixels with {_TO_FLOAT}")


def require_codes(codes: object, levels: Sequence[Level], dtype: torch.dtype) -> None:
    """Refuses anything but the codes of a batch of images, on grids of any size.

    Args:
        codes: what should be a tuple of one tensor per level.
        levels: the levels of the codes.
        dtype: the dtype of the network's weights, which real-valued latents have too.

    Raises:
        UserError: for another type, number of levels, dtype or shape, or another number of images in each level; on the
            CPU also for codes outside the codebook.
    """
    count = f"{len(levels)} tensor{'s' if len(levels) > 1 else ''}"
    if not isinstance(codes, tuple | list) or len(codes) != len(levels):
        given = f"{len(codes)} tensors" if isinstance(codes, tuple | list) else f"a {type(codes).__name__}"
        raise UserError(f"codes must be a tuple of {count}, one for each level, as encode returns; this is {given}")
    for index, (level, grid) in enumerate(zip(levels, codes, strict=True)):
        kind = (
            f"{_name(dtype)} with shape (b, {level.channels}, h, w)" if level.channels else "int64 with shape (b, h, w)"
        )
        needed = f"the codes of level {index} must be {kind}; these"
        if not isinstance(grid, Tensor):
            raise UserError(f"{needed} are a {type(grid).__name__}")
        if not (_fits(grid, dtype) if level.channels else grid.dtype in (torch.int64, torch.int32)):
            raise UserError(f"{needed} are {_name(grid.dtype)}")
        if grid.ndim != 1 + len(level.shape) or (level.channels and grid.shape[1] != level.channels):
            raise UserError(f"{needed} have the shape {tuple(grid.shape)}")
        if len(grid) != len(codes[0]):
            raise UserError(
                f"the codes of level {index} are of {len(grid)} images, those of level 0 of {len(codes[0])}"
            )
        if level.radices and grid.device.type == "cpu":
            level.require(grid, f"level {index}")


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether a network with weights of a dtype computes with a tensor: its dtype is equal, or autocast is on.

    Autocast converts no float64.
    """
    if tensor.dtype == dtype:
        return True
    halves = (torch.float16, torch.bfloat16, torch.float32)
    return tensor.dtype in halves and torch.is_autocast_enabled(tensor.device.type)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
