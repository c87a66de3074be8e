"""A data-dependent start for linked codebooks: k-means in every node of the tree, layer by layer. Only the start; training goes on by gradient."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.randomness import row_seeds, uniform
from smalti.tokenizers.search import nearest_paths

LLOYD_STEPS = 10


def linked_kmeans(vectors: Float[Tensor, "n d"], codebooks: Sequence[Float[Tensor, "_nodes _m d"]], *, seed: int) -> list[Float[Tensor, "_nodes _m d"]]:
    """New codebooks: those of layer i are the k-means centres of the residuals that reach each node (k-means++ seeds, then Lloyd's steps).

    A node that no vector reaches keeps its codewords, shrunk to the size of the residuals around it.
    """
    vectors, started = vectors.detach().float(), []
    residual, node = vectors, torch.zeros(len(vectors), dtype=torch.long, device=vectors.device)
    for layer, codebook in enumerate(codebooks):
        nodes, m, d = codebook.shape
        centres = _spread_seeds(residual, node, codebook.detach().float() * residual.std(), seed=seed + layer)
        for _ in range(LLOYD_STEPS):
            child = node * m + (residual[:, None] - centres[node]).square().sum(-1).argmin(1)
            counts = residual.new_zeros(nodes * m).index_add(0, child, residual.new_ones(len(child)))
            sums = residual.new_zeros(nodes * m, d).index_add(0, child, residual)
            flat = centres.view(-1, d)
            centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), flat).view(nodes, m, d)
        started.append(centres)
        node = nearest_paths(vectors, started)
        residual = residual - centres.view(-1, d)[node]
    return started


def _spread_seeds(residual: Tensor, node: Tensor, fallback: Tensor, *, seed: int) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007) in all nodes at once: m times, each node draws one of its vectors with probability
    proportional to the squared distance to its nearest seed so far, by the largest of log-weight + Gumbel noise."""
    nodes, m, d = fallback.shape
    centres = fallback.clone()
    distance = residual.square().sum(1)
    noise = uniform(row_seeds(seed, torch.arange(len(residual), device=residual.device)), m)
    for j in range(m):
        keys = distance.clamp_min(1e-20).log() - (-noise[:, j].clamp_min(1e-7).log()).log()
        best = keys.new_full((nodes,), -torch.inf).scatter_reduce(0, node, keys, "amax")
        chosen = torch.nonzero(keys == best[node]).squeeze(1)
        centres[node[chosen], j] = residual[chosen]
        distance = torch.minimum(distance, (residual - centres[node, j]).square().sum(1))
    return centres
