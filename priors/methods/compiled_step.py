"""A sampler's step as one compiled program. What a step does is the samplers'."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def fused(step: Callable[..., tuple[Tensor, ...]], device: torch.device) -> Callable[..., tuple[Tensor, ...]]:
    """`step` as one program, on a GPU one CUDA graph: the network, the draws and what becomes of them.

    Sums may be rounded otherwise than without. It takes floats as tensors, or there would be a program for every
    temperature.
    """
    program = _program(step, device.type)

    def run(*given: object) -> tuple[Tensor, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        as_tensors = [torch.full((), one, device=device) if isinstance(one, float) else one for one in given]
        return tuple(tensor.clone() for tensor in program(*as_tensors))  # a graph writes to the same memory next time

    return run


@cache
def _program(step: Callable[..., tuple[Tensor, ...]], device: str) -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(step, dynamic=False, mode="reduce-overhead" if device == "cuda" else None)
