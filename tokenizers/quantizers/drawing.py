"""Vectors drawn from every node of a tree at once: what starts codebooks and revives codewords. Nothing is moved here.

Legend: n vectors.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def drawing_keys(weights: Float[Tensor, " n"], noise: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Log-weight plus Gumbel noise: the vectors with the r largest keys are r drawn in turn, with these weights.

    Args:
        weights: at least 0; what has none is never drawn, and its key is -inf.
        noise: uniform on [0, 1).
    """
    return weights.log() - (-noise.clamp_min(1e-7).log()).log()


def turns(nodes: Int64[Tensor, " n"], keys: Float[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """For each vector how many of the same node have a larger key, counted from 0: its turn to be drawn there."""
    by_key = keys.argsort(descending=True, stable=True)
    order = by_key[nodes[by_key].argsort(stable=True)]  # node by node, in each the largest key first
    ordered, position = nodes[order], torch.arange(len(nodes), device=nodes.device)
    starts = torch.where(ordered != ordered.roll(1), position, 0).cummax(0).values
    return torch.empty_like(position).scatter_(0, order, position - starts)
