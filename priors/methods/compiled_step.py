"""Compiles a sampler's step with `torch.compile`, on a GPU as a CUDA graph. The steps are in the samplers' files."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def compiled(step: Callable[..., tuple[Tensor, ...]], device: torch.device) -> Callable[..., tuple[Tensor, ...]]:
    """Returns `step` as one compiled program that covers the network, the draws and the update of the codes.

    Results may differ from the eager step in the rounding of sums. Float arguments are passed as
    tensors, since the program would otherwise be compiled again for each temperature.
    """
    program = _program(step, device.type)

    def run(*arguments: object) -> tuple[Tensor, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        tensors = [torch.full((), value, device=device) if isinstance(value, float) else value for value in arguments]
        return tuple(tensor.clone() for tensor in program(*tensors))  # a CUDA graph overwrites its outputs

    return run


@cache
def _program(step: Callable[..., tuple[Tensor, ...]], device_type: str) -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(step, dynamic=False, mode="reduce-overhead" if device_type == "cuda" else None)
