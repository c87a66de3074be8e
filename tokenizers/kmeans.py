"""A data-dependent start for linked codebooks: k-means in every node of the tree, layer by layer. Only the start."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.randomness import row_seeds, uniform
from smalti.tokenizers.search import nearest_children

LLOYD_STEPS = 10


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

    m times, each node draws one of its vectors, the first uniformly, the others with probability proportional to the
    squared distance to the nearest seed so far: the largest of log-weight + Gumbel noise.
    """
    nodes, m, _ = fallback.shape
    centres = fallback.clone()
    distance = residual.new_full((len(residual),), torch.inf)
    noise = uniform(row_seeds(seed, torch.arange(len(residual), device=residual.device)), m)
    for j in range(m):
        weight = distance if j else torch.ones_like(distance)
        keys = weight.log() - (-noise[:, j].clamp_min(1e-7).log()).log()
        best = keys.new_full((nodes,), -torch.inf).scatter_reduce(0, node, keys, "amax")
        chosen = torch.nonzero((keys == best[node]) & (weight > 0)).squeeze(1)  # none of a node that is all seeds
        centres[node[chosen], j] = residual[chosen]
        distance = torch.minimum(distance, (residual - centres[node, j]).square().sum(1))
    return centres
