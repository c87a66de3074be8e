"""k-means initialization of linked codebooks, layer by layer and in every node of the tree at once.

Only the start of training uses it; codebook updates during training are in `codebook_updates.py`.

Legend: n vectors, d code width, m branching.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.core.randomness import derive, row_seeds, uniform
from smalti.tokenizers.quantizers.codebook_updates import rank_within_node, sampling_keys
from smalti.tokenizers.quantizers.search import nearest_children

LLOYD_STEPS = 10
SEED_ROUNDS = 64


def linked_kmeans(
    vectors: Float[Tensor, "n d"], codebooks: Sequence[Float[Tensor, "_nodes _m d"]], *, seed: int, first: int = 0
) -> list[Float[Tensor, "_nodes _m d"]]:
    """Returns new codebooks: in layer i, the k-means centres of the residuals that reach each node.

    Seeds by k-means++, then runs Lloyd's iterations, in every node at once. A node with fewer distinct vectors than
    codewords keeps the rest of its codewords. A node that no vector reaches keeps all of them. Kept codewords are
    scaled by the root mean square of the layer's residuals. Layers before `first` stay as they are.
    """
    initialized, residual = [], vectors.detach().float()
    node = torch.zeros(len(vectors), dtype=torch.long, device=vectors.device)
    for layer, codebook in enumerate(codebooks):
        nodes, m, d = codebook.shape
        fallback = codebook.detach().float() * residual.square().mean().sqrt()
        trained = layer < first
        centres = (
            codebook.detach().float() if trained else _kmeans_plus_plus(residual, node, fallback, seed=seed + layer)
        )
        for _ in range(0 if trained else LLOYD_STEPS):
            child = nearest_children(residual, centres, node)
            counts = residual.new_zeros(nodes * m).index_add(0, child, residual.new_ones(len(child)))
            sums = residual.new_zeros(nodes * m, d).index_add(0, child, residual)
            means = sums / counts[:, None].clamp_min(1)
            centres = torch.where(counts[:, None] > 0, means, centres.view(-1, d)).view(nodes, m, d)
        initialized.append(centres)
        node = nearest_children(residual, centres, node)
        residual = residual - centres.view(-1, d)[node]
    return initialized


def _kmeans_plus_plus(residual: Tensor, node: Tensor, fallback: Tensor, *, seed: int) -> Tensor:
    """Chooses starting centres by k-means++ (Arthur and Vassilvitskii 2007) in all nodes at once.

    Each node samples its vectors one after the other: the first uniformly, the others with probability proportional to
    the squared distance to the nearest seed so far. Codebooks larger than `SEED_ROUNDS` sample several at once, as
    k-means|| does (Bahmani et al. 2012); one by one would take as many passes over the vectors as there are codewords.
    """
    m, d = fallback.shape[1:]
    centres, weight = fallback.clone(), residual.new_ones(len(residual))
    seeds = row_seeds(seed, torch.arange(len(residual), device=residual.device))
    first = 0
    while first < m:
        count = min(m - first, 1 if first == 0 else -(-m // SEED_ROUNDS))
        rank = rank_within_node(node, sampling_keys(weight, uniform(derive(seeds, first))))
        chosen = torch.nonzero((rank < count) & (weight > 0)).squeeze(1)  # none where every vector is a seed already
        centres[node[chosen], first + rank[chosen]] = residual[chosen]
        new = centres[:, first : first + count].contiguous()
        nearest = new.view(-1, d)[nearest_children(residual, new, node)]
        distance = (residual - nearest).square().sum(1)
        weight = torch.minimum(weight, distance) if first else distance
        first += count
    return centres
