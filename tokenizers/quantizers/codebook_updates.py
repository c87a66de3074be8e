"""How codewords learn other than by gradients: running means, and the revival of those that nothing chooses any more.

All of a layer's nodes at once, and of all processes: each ends with the same codewords. Which vectors reach which node,
and when all this happens, `linked.py` says.

Legend: n vectors, d code width, m branching.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from smalti.core.distributed import collected
from smalti.tokenizers.quantizers.drawing import drawing_keys, turns

SMOOTHING = 1e-5  # epsilon of the Laplace smoothing, in vectors a step
CANDIDATES = 256  # the most codewords of a layer that are revived in one step


def running_means(
    codebook: Float[Tensor, "nodes m d"],
    counts: Float[Tensor, "nodes m"],
    *,
    chosen: Float[Tensor, "nodes m"],
    sums: Float[Tensor, "nodes m d"],
    decay: float,
) -> tuple[Float[Tensor, "nodes m d"], Float[Tensor, "nodes m"]]:
    """Codewords and counts after a step (VQ-VAE, arXiv 1711.00937, Eqs. 6-8), counts smoothed within each codebook.

    The running sum of what chose a codeword is not kept: it is the codeword times its smoothed count, so the two cannot
    disagree. A codebook that no vector reached keeps its codewords.

    Args:
        codebook: before the step.
        counts: running means of how many vectors choose each codeword in a step.
        chosen: how many did in this one.
        sums: of these vectors.
        decay: from 0 to below 1.
    """
    after = decay * counts + (1 - decay) * chosen
    moved = (decay * _smoothed(counts)[..., None] * codebook + (1 - decay) * sums) / _smoothed(after)[..., None]
    reached = chosen.sum(1) > 0
    return torch.where(reached[:, None, None], moved, codebook), after


def _smoothed(counts: Tensor) -> Tensor:
    """Laplace smoothing that keeps each codebook's total: no codeword is ever divided by nothing."""
    total = counts.sum(1, keepdim=True)
    return (counts + SMOOTHING) / (total + counts.shape[1] * SMOOTHING) * total


def revival(
    counts: Float[Tensor, "nodes m"],
    *,
    below: float,
    vectors: Float[Tensor, "n d"],
    nodes: Int64[Tensor, " n"],
    errors: Float[Tensor, " n"],
    noise: Float[Tensor, " n"],
) -> tuple[Int64[Tensor, " r"], Float[Tensor, "r d"], Float[Tensor, " r"]]:
    """Codewords that are hardly chosen, each with one of the vectors that reach its node, to be put there.

    A codeword is dead when its count is less than `below` times the mean of its codebook. Vectors are drawn with
    probability proportional to their squared error, as k-means++ draws its seeds: a revived codeword lands where others
    fit badly. So a subtree comes back from its root: once a codeword is revived, vectors reach those below it.

    Args:
        counts: running means of how many vectors choose each codeword in a step.
        below: the share of the mean under which a codeword is dead.
        vectors: this process's, as they arrive at the layer.
        nodes: which codebook each arrives at.
        errors: squared distances to the nearest codeword there.
        noise: uniform on [0, 1), of the vector and not of the process.

    Returns:
        `node * m + digit` of the codewords, the vectors, and the counts to start again with: the mean of the codebook,
        so that they are not dead at once. Always of as many: those that revive none say `nodes * m`, one past the last
        codeword, for how many are dead only the device knows. `put_at` leaves them out.
    """
    m, mean = counts.shape[1], counts.mean(1)
    dead = counts < below * mean[:, None]
    keys = drawing_keys(errors * dead.any(1)[nodes], noise)
    keys, nodes, vectors = _largest(*(collected(part) for part in _largest(keys, nodes, vectors)))
    turn, first_dead = turns(nodes, keys), dead.float().argsort(dim=1, descending=True, stable=True)
    drawn = (turn < dead.sum(1)[nodes]) & (keys > -torch.inf)  # a NaN is not drawn either
    places = torch.where(drawn, nodes * m + first_dead[nodes, turn.clamp(max=m - 1)], counts.numel())
    return places, vectors, mean[nodes]


def put_at(
    places: Int64[Tensor, " r"], values: Float[Tensor, "r *d"], table: Float[Tensor, "n *d"]
) -> Float[Tensor, "n *d"]:
    """The table with values in the rows that `places` names, each once; what is for row n is left out."""
    longer = torch.cat([table, table.new_zeros(1, *table.shape[1:])])
    return longer.index_copy_(0, places, values)[:-1]


def _largest(keys: Tensor, nodes: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The candidates with the largest keys: of all processes' largest, the largest are those of all vectors."""
    keys, rows = keys.topk(min(CANDIDATES, len(keys)))
    return keys, nodes[rows], vectors[rows]
