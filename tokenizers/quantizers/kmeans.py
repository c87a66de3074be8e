"""A data-dependent start for linked codebooks: k-means in every node of the tree, layer by layer. Only the start."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.core.randomness import derive, row_seeds, uniform
from smalti.tokenizers.quantizers.drawing import drawing_keys, turns
from smalti.tokenizers.quantizers.search import nearest_children

LLOYD_STEPS = 10
SEED_ROUNDS = 64


def linked_kmeans(
    vectors: Float[Tensor, "n d"], codebooks: Sequence[Float[Tensor, "_nodes _m d"]], *, seed: int
) -> list[Float[Tensor, "_nodes _m d"]]:
    """New codebooks: those of layer i are the k-means centres of the residuals that reach each node.

    k-means++ seeds, then Lloyd's steps, in every node at once. A node with fewer distinct vectors than codewords keeps
    the rest of its codewords, and one that no vector reaches all of them, scaled to the residuals of its layer.
    """
    started, residual = [], vectors.detach().float()
    node = torch.zeros(len(vectors), dtype=torch.long, device=vectors.device)
    for layer, codebook in enumerate(codebooks):
        nodes, m, d = codebook.shape
        fallback = codebook.detach().float() * residual.square().mean().sqrt()
        centres = _spread_seeds(residual, node, fallback, seed=seed + layer)
        for _ in range(LLOYD_STEPS):
            child = nearest_children(residual, centres, node)
            counts = residual.new_zeros(nodes * m).index_add(0, child, residual.new_ones(len(child)))
            sums = residual.new_zeros(nodes * m, d).index_add(0, child, residual)
            means = sums / counts[:, None].clamp_min(1)
            centres = torch.where(counts[:, None] > 0, means, centres.view(-1, d)).view(nodes, m, d)
        started.append(centres)
        node = nearest_children(residual, centres, node)
        residual = residual - centres.view(-1, d)[node]
    return started


def _spread_seeds(residual: Tensor, node: Tensor, fallback: Tensor, *, seed: int) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007) in all nodes at once.

    In turn each node draws one of its vectors, the first uniformly, the others with probability proportional to the
    squared distance to the nearest seed so far. Codebooks larger than `SEED_ROUNDS` draw several at once, as k-means||
    does (Bahmani et al. 2012): one by one would take as many passes over the vectors as there are codewords.
    """
    m, d = fallback.shape[1:]
    centres, weight = fallback.clone(), residual.new_ones(len(residual))
    seeds = row_seeds(seed, torch.arange(len(residual), device=residual.device))
    first = 0
    while first < m:
        at_once = min(m - first, 1 if first == 0 else -(-m // SEED_ROUNDS))
        keys = drawing_keys(weight, uniform(derive(seeds, first)))
        turn = turns(node, keys)
        chosen = torch.nonzero((turn < at_once) & (weight > 0)).squeeze(1)  # none of a node that is all seeds
        centres[node[chosen], first + turn[chosen]] = residual[chosen]
        new = centres[:, first : first + at_once].contiguous()
        nearest = new.view(-1, d)[nearest_children(residual, new, node)]
        distance = (residual - nearest).square().sum(1)
        weight = torch.minimum(weight, distance) if first else distance
        first += at_once
    return centres
