"""What the processes of a run tell each other outside of gradients. One process alone says nothing.

How they come to be, Accelerate knows; what is exchanged, the callers.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


def total(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The sum of every process's tensor, on all of them."""
    if not _several():
        return tensor
    summed = tensor.clone()
    dist.all_reduce(summed)
    return summed


def mean(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The mean of every process's tensor, on all of them."""
    return total(tensor) / (dist.get_world_size() if _several() else 1)


def collected(tensor: Tensor) -> Tensor:
    """Every process's tensor, of one shape on all, one after the other along the first dimension."""
    if not _several():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
