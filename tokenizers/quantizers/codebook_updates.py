"""Codebook updates that use no gradients: exponential moving averages (EMA) and the revival of dead codewords.

Also holds the weighted sampling of vectors that revival shares with k-means++ seeding (`kmeans.py`). Every function
treats all nodes of a layer at once and is exact across processes: each process computes the same codewords. `linked.py`
decides which vectors reach which node, and when codebooks are updated.

Legend: n vectors, d code width, m branching.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from smalti.core.distributed import collected

SMOOTHING = 1e-5  # epsilon of the Laplace smoothing, in vectors per step
CANDIDATES = 256  # the most codewords of a layer that are revived in one step


def ema_update(
    codebook: Float[Tensor, "nodes m d"],
    counts: Float[Tensor, "nodes m"],
    *,
    chosen: Float[Tensor, "nodes m"],
    sums: Float[Tensor, "nodes m d"],
    decay: float,
) -> tuple[Float[Tensor, "nodes m d"], Float[Tensor, "nodes m"]]:
    """Updates codewords by moving averages (VQ-VAE, arXiv 1711.00937, Eqs. 6-8), with counts smoothed in each codebook.

    Returns the codewords and counts after the step. The running sum of the vectors that choose a codeword is not
    stored: it is the codeword times its smoothed count, so the two cannot disagree. A codeword that no vector chose
    stays, as in the equations; the smoothing would draw it to zero.

    Args:
        codebook: codewords before the step.
        counts: moving averages of the number of vectors that choose each codeword in a step.
        chosen: number of vectors that chose each codeword in this step.
        sums: sums of these vectors.
        decay: decay of the averages, from 0 to below 1.
    """
    new_counts = decay * counts + (1 - decay) * chosen
    new_sums = decay * _smoothed(counts)[..., None] * codebook + (1 - decay) * sums
    means = new_sums / _smoothed(new_counts)[..., None]
    return torch.where(chosen[..., None] > 0, means, codebook), new_counts


def _smoothed(counts: Tensor) -> Tensor:
    """Smooths counts (Laplace) and keeps each codebook's total, so that no codeword is divided by zero."""
    total = counts.sum(1, keepdim=True)
    return (counts + SMOOTHING) / (total + counts.shape[1] * SMOOTHING) * total


def dead_codeword_revivals(
    counts: Float[Tensor, "nodes m"],
    *,
    below: float,
    vectors: Float[Tensor, "n d"],
    nodes: Int64[Tensor, " n"],
    errors: Float[Tensor, " n"],
    noise: Float[Tensor, " n"],
) -> tuple[Int64[Tensor, " r"], Float[Tensor, "r d"], Float[Tensor, " r"]]:
    """Revives dead codewords: pairs each one with a vector of its node that it is moved to.

    A codeword is dead when its count is less than `below` times the mean count of its codebook. Vectors are sampled
    with probability proportional to their squared error, as in k-means++ seeding, so a revived codeword lands where the
    others fit badly. A dead subtree is revived from its root: vectors reach the codewords below a revived one in later
    steps.

    Args:
        counts: moving averages of the number of vectors that choose each codeword in a step.
        below: share of the mean count under which a codeword is dead.
        vectors: residuals that arrive at the layer on this process.
        nodes: the codebook at which each vector arrives.
        errors: squared distance of each vector to its nearest codeword.
        noise: uniform on [0, 1); depends on the vector, not on the process.

    Returns:
        Index `node * m + digit` of each revived codeword, its new vector, and its new count. The new count is the mean
        of the codebook, so that the codeword is not dead again at once. The number of rows is fixed, so that
        the number of dead codewords need not be read from the device: unused rows have the index `nodes * m`, one past
        the last codeword, and `scatter_rows` skips them.
    """
    m, mean = counts.shape[1], counts.mean(1)
    dead = counts < below * mean[:, None]
    keys = sampling_keys(errors * dead.any(1)[nodes], noise)
    keys, nodes, vectors = _largest(*(collected(part) for part in _largest(keys, nodes, vectors)))
    rank, dead_first = rank_within_node(nodes, keys), dead.float().argsort(dim=1, descending=True, stable=True)
    sampled = (rank < dead.sum(1)[nodes]) & (keys > -torch.inf)  # a NaN is never sampled
    indices = torch.where(sampled, nodes * m + dead_first[nodes, rank.clamp(max=m - 1)], counts.numel())
    return indices, vectors, mean[nodes]


def scatter_rows(
    indices: Int64[Tensor, " r"], values: Float[Tensor, "r *d"], table: Float[Tensor, "n *d"]
) -> Float[Tensor, "n *d"]:
    """Returns the table with `values` in the rows at `indices`, each at most once; values for row n are dropped."""
    longer = torch.cat([table, table.new_zeros(1, *table.shape[1:])])
    return longer.index_copy_(0, indices, values)[:-1]


def _largest(keys: Tensor, nodes: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Selects the candidates with the largest keys; the largest of every process's largest are the largest of all."""
    keys, rows = keys.topk(min(CANDIDATES, len(keys)))
    return keys, nodes[rows], vectors[rows]


def sampling_keys(weights: Float[Tensor, " n"], noise: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Returns log-weights plus Gumbel noise: the r largest keys are r vectors sampled by weight without replacement.

    Args:
        weights: at least 0. A vector of weight 0 is never sampled; its key is -inf.
        noise: uniform on [0, 1).
    """
    return weights.log() - (-noise.clamp_min(1e-7).log()).log()


def rank_within_node(nodes: Int64[Tensor, " n"], keys: Float[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """Counts, for each vector, the vectors of the same node that have a larger key."""
    by_key = keys.argsort(descending=True, stable=True)
    order = by_key[nodes[by_key].argsort(stable=True)]  # node by node, the largest key of each first
    ordered, position = nodes[order], torch.arange(len(nodes), device=nodes.device)
    starts = torch.where(ordered != ordered.roll(1), position, 0).cummax(0).values
    return torch.empty_like(position).scatter_(0, order, position - starts)
