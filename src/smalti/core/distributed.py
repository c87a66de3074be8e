"""Collective operations besides the gradient all-reduce; no-ops in a single process.

Accelerate starts the processes and their process group.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


def total(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Returns the sum of all processes' tensors on every process (all-reduce)."""
    if not _several():
        return tensor
    summed = tensor.clone()
    dist.all_reduce(summed)
    return summed


def mean(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Returns the mean of all processes' tensors on every process (all-reduce)."""
    return total(tensor) / (dist.get_world_size() if _several() else 1)


def collected(tensor: Tensor) -> Tensor:
    """Concatenates all processes' tensors along the first dimension (all-gather); their shapes must be equal."""
    if not _several():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
