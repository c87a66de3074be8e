"""The factorized head: embeds mixed-radix codes and predicts them digit by digit along the tree of prefixes.

It is the only part of a prior that handles radices: networks and samplers see codes and features.

Legend: b batch, n positions, d width, r radix of a digit, k digits of a code.
"""

from collections.abc import Callable
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from smalti.core.codes import Level
from smalti.core.randomness import uniform

DENSE_NODES = 16
"""Digits with at most this many parent nodes are predicted by one matrix product over all their nodes.

The logits of the reached node are then gathered. Above it, the reached nodes' weights are gathered first; see
`node_products`.
"""

INITIAL_LOGIT_STD = 0.1


class TreeEmbedding(nn.Module):
    """Embeds mixed-radix codes along the tree of their prefixes.

    Each prefix of one or more digits is a node with an embedding; a code's embedding is the sum of
    those on its path. The table holds the nodes by depth, then by prefix, so siblings are adjacent.

    Args:
        radices: radices of a code's digits, most significant first.
        width: width of the embeddings.

    Raises:
        UserError: for radices that make no codebook (see `Level`).
    """

    def __init__(self, radices: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.radices = radices
        self.tree = Level(1, 1, radices)  # computes prefixes and digits; its grid is not used
        self.rows = [Level(1, 1, radices[: i + 1]).codebook_size for i in range(len(radices))]  # nodes at each depth
        # a path sums to unit variance
        self.embedding = nn.Parameter(torch.randn(sum(self.rows), width) * len(radices) ** -0.5)

    def embed(self, codes: Int64[Tensor, "b *grid"]) -> Float[Tensor, "b n d"]:
        """Returns the network's input: the embedding of each position's code, in raster order."""
        b = len(codes)
        codes = codes.flatten()
        paths = [self.tree.prefix(codes, i + 1) + sum(self.rows[:i]) for i in range(len(self.radices))]
        embedded = F.embedding_bag(torch.stack(paths, dim=-1), self.embedding, mode="sum")  # (b n) d
        return rearrange(embedded, "(b n) d -> b n d", b=b)


class FactorizedHead(TreeEmbedding):
    """Embeds mixed-radix codes and predicts them digit by digit, along the tree of their prefixes.

    Each node also has weights and a bias for its own logit, and digit i is a softmax over the children of
    the node that the digits before it lead to. So features and prefix interact, and 32**3 leaves
    cost 96 logits. With one radix this is an ordinary embedding and softmax.

    Softmax, losses and draws are computed in float32 under autocast.
    """

    def __init__(self, radices: tuple[int, ...], width: int) -> None:
        super().__init__(radices, width)
        self.codebook_size = self.tree.codebook_size
        parents = [rows // radix for rows, radix in zip(self.rows, radices, strict=True)]
        self.dense_digits = sum(nodes <= DENSE_NODES for nodes in parents)
        nodes = sum(self.rows)
        self.weight = nn.Parameter(torch.randn(nodes, width) * INITIAL_LOGIT_STD * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(nodes))

    def score(
        self,
        features: Float[Tensor, "b n d"],
        codes: Int64[Tensor, "b n"],
        temperature: float | Tensor = 1.0,
        *,
        unconditional: Float[Tensor, "b n d"] | None = None,
        guidance: float = 1.0,
    ) -> tuple[Float[Tensor, "b n k"], Bool[Tensor, "b n"]]:
        """Returns each digit's negative log-likelihood, in nats, and whether greedy decoding gives the very code.

        Digit i is scored given the true digits before it (teacher forcing). The distribution is the one that
        `sample` draws from with the same temperature and guidance.
        """
        child_logits = self._guided_logits(features, temperature, unconditional, guidance)
        nll, hits = [], []
        for i in range(len(self.radices)):
            digit = self.tree.digit(codes, i)
            logits = child_logits(i, self.tree.prefix(codes, i))
            nll.append(F.cross_entropy(rearrange(logits, "b n r -> (b n) r"), digit.flatten(), reduction="none"))
            hits.append(logits.argmax(-1) == digit)
        return torch.stack(nll, dim=-1).view(*codes.shape, -1), torch.stack(hits).all(0)

    def nll(
        self, features: Float[Tensor, "b n d"], codes: Int64[Tensor, "b n"], **options: Any
    ) -> Float[Tensor, "b n"]:
        """Returns -log p(code | features), nats; `options` are those of `score`."""
        return self.score(features, codes, **options)[0].sum(-1)

    @torch.no_grad()
    def sample(
        self,
        features: Float[Tensor, "b n d"],
        uniforms: Float[Tensor, "b n k"],
        temperature: float | Tensor = 1.0,
        *,
        unconditional: Float[Tensor, "b n d"] | None = None,
        guidance: float = 1.0,
        top_p: float = 1.0,
    ) -> Int64[Tensor, "b n"]:
        """Samples a code at each position, digit after digit, from softmax(logits / temperature).

        Args:
            features: of the positions.
            uniforms: uniform numbers in [0, 1), which decide the draws.
            temperature: divides the logits.
            unconditional: the features of the same codes without their class, for classifier-free guidance
                (arXiv 2207.12598, Eq. 6, whose 1 + w is `guidance`): for every digit, logits =
                unconditional + guidance (conditional - unconditional).
            guidance: the guidance scale.
            top_p: below 1, nucleus sampling (arXiv 1904.09751) of every digit.
        """

        @no_type_check  # as `child_logits` below
        def draw(i: int, logits: Tensor) -> Tensor:
            return inverse_cdf(nucleus(logits.softmax(-1), top_p), uniforms[..., i])

        return self.choose(features, draw, temperature, unconditional=unconditional, guidance=guidance)

    @torch.no_grad()
    def choose(
        self,
        features: Float[Tensor, "b n d"],
        choose_digit: Callable[[int, Tensor], Tensor],
        temperature: float | Tensor = 1.0,
        *,
        unconditional: Float[Tensor, "b n d"] | None = None,
        guidance: float = 1.0,
    ) -> Int64[Tensor, "b n"]:
        """Builds a code at each position, digit after digit.

        Args:
            features: of the positions; in float64 the logits are too.
            choose_digit: maps a digit's number, from 0, and its logits `(b, n, r)` given the digits chosen before it to
                the digits int64 `(b, n)`.
            temperature: divides the logits.
            unconditional: see `sample`.
            guidance: the guidance scale.
        """
        child_logits = self._guided_logits(features, temperature, unconditional, guidance)
        codes = torch.zeros(features.shape[:2], dtype=torch.int64, device=features.device)
        for i, radix in enumerate(self.radices):
            codes = codes * radix + choose_digit(i, child_logits(i, codes))
        return codes

    def random_codes(self, seeds: Int64[Tensor, " b"], *grid: int) -> Int64[Tensor, "b *grid"]:
        """Returns codes drawn uniformly from the codebook, decided by each row's seed."""
        if self.codebook_size <= 1 << 24:
            return (uniform(seeds, *grid) * self.codebook_size).long()
        high, low = (uniform(seeds, 2, *grid) * (1 << 24)).long().unbind(1)  # 32 bits, as one draw has only 24
        return ((high << 8 | low >> 16) * self.codebook_size) >> 32

    def _guided_logits(
        self, features: Tensor, temperature: float | Tensor, unconditional: Tensor | None, guidance: float
    ) -> Callable[[int, Tensor], Tensor]:
        """Returns the function of `_child_logits` with classifier-free guidance and temperature applied."""
        child_logits = self._child_logits(features)
        if unconditional is None:
            if not isinstance(temperature, Tensor) and temperature == 1:
                return child_logits
            return lambda digit, parents: child_logits(digit, parents) / temperature
        without_class = self._child_logits(unconditional)
        return lambda i, parents: (
            torch.lerp(without_class(i, parents), child_logits(i, parents), guidance) / temperature
        )

    def _child_logits(self, features: Tensor) -> Callable[[int, Tensor], Tensor]:
        """Returns a function (digit, parents `(b, n)`) -> `(b, n, r)`: logits of the parents' children.

        They are in float32, for features in float64 in float64. See `DENSE_NODES` for the two ways it computes them.
        """
        split = [sum(self.rows[: self.dense_digits]), *self.rows[self.dense_digits :]]
        weights, biases = self.weight.split(split), self.bias.split(split)
        dense = F.linear(features, weights[0], biases[0]).split(self.rows[: self.dense_digits], dim=-1)

        @no_type_check  # defined again at every sampling step; under pytest, so would be its shape checks
        def child_logits(digit: int, parents: Tensor) -> Tensor:
            radix = self.radices[digit]
            if digit == 0:
                return at_least_float32(dense[0])
            if digit < self.dense_digits:
                children = parents[..., None] * radix + torch.arange(radix, device=parents.device)
                return at_least_float32(dense[digit].gather(-1, children))
            table = 1 + digit - self.dense_digits
            # half precision is no faster here, and would also accumulate the gradients of a frequent node
            with torch.autocast(features.device.type, enabled=False):
                logits = node_products(
                    at_least_float32(features.flatten(0, 1)),
                    rearrange(weights[table], "(p r) d -> p r d", r=radix),
                    parents.flatten(),
                ).view(*parents.shape, radix)
            return logits + F.embedding(parents, rearrange(biases[table], "(p r) -> p r", r=radix))

        return child_logits


def at_least_float32(x: Tensor) -> Tensor:
    """Returns `x` in float32, or unchanged in float64."""
    return x if x.dtype == torch.float64 else x.float()


def node_products(
    features: Float[Tensor, "n d"], weights: Float[Tensor, "p r d"], nodes: Int64[Tensor, " n"]
) -> Float[Tensor, "n r"]:
    """Returns the products of each position's features with the weights of its node, `weights[nodes] @ features`.

    Gathering a matrix for every position is slow: on a CPU core, with 2,048 positions and 256 nodes, forward and
    backward pass take five times as long. So positions are sorted by node and filled into chunks, each of one node, and
    a matrix is gathered per chunk. Sizes depend on the shapes alone, so nothing waits for a GPU.
    """
    (n, d), (p, r, _) = features.shape, weights.shape
    chunk = n // p  # the mean number of positions of a node
    if chunk < 2:
        return torch.bmm(F.embedding(nodes, weights.flatten(1)).view(n, r, d), features[..., None])[..., 0]
    counts = nodes.new_zeros(p).index_add(0, nodes, torch.ones_like(nodes))
    chunks = counts.add(chunk - 1) // chunk  # of each node
    last_chunk = chunks.cumsum(0)
    order = nodes.argsort(stable=True)
    sorted_nodes = nodes[order]
    rank = torch.arange(n, device=nodes.device) - (counts.cumsum(0) - counts)[sorted_nodes]  # among those of its node
    slots = torch.empty_like(order)
    slots[order] = (last_chunk - chunks)[sorted_nodes] * chunk + rank
    most = n // chunk + p  # chunks, if the last of each node is not full; those that are left over are empty
    filled = features.new_zeros(most * chunk, d).index_copy(0, slots, features).view(most, chunk, d)
    node_of_chunk = torch.searchsorted(last_chunk, torch.arange(most, device=nodes.device), right=True).clamp(max=p - 1)
    matrices = F.embedding(node_of_chunk, weights.flatten(1)).view(most, r, d)
    return torch.bmm(filled, matrices.mT).flatten(0, 1)[slots]


def nucleus(probabilities: Float[Tensor, "*n r"], top_p: float) -> Float[Tensor, "*n r"]:
    """Keeps the fewest likeliest values whose probabilities sum to at least `top_p`, and sets the others to 0.

    This is the nucleus of top-p sampling (arXiv 1904.09751), all values for 1. The result is not normalized.
    """
    if top_p == 1:
        return probabilities
    sorted_, order = probabilities.sort(dim=-1, descending=True, stable=True)
    likelier = sorted_.cumsum(-1) - sorted_  # the total of the likelier values
    excluded = (likelier >= top_p) & (likelier > 0)  # the likeliest stays, also if top_p is 0 in float32
    return probabilities.masked_fill(excluded.gather(-1, order.argsort(-1)), 0.0)


def inverse_cdf(probabilities: Float[Tensor, "*n r"], uniforms: Float[Tensor, "*n"]) -> Int64[Tensor, "*n"]:
    """Samples an index from unnormalized probabilities by inverting their cumulative distribution at `uniforms`.

    Probabilities are summed as integers of 2**-38, since float sums need not be monotonic on devices that
    add in parallel. So the index is always below r, and never one whose probability is 0 (or below 2**-38).
    """
    cumulative = (probabilities * 2.0**38).long().cumsum(-1)
    # below the last sum, since uniforms are at most 1 - 2**-24
    threshold = (uniforms * 2.0**24).long() * cumulative[..., -1] >> 24
    return (cumulative <= threshold[..., None]).sum(-1)
