"""The tree head: how a prior reads codes and how it predicts them. Bodies and samplers know nothing of radices; this
file does.

Legend: b batch, n positions, d width, r radix, k digits.
"""

from collections.abc import Callable
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from smalti.core.codes import Level
from smalti.core.randomness import uniform

DENSE_NODES = 128
"""The most nodes a digit may start from for which the logits of all of them are computed, and those of the reached one
picked out.

That product costs nodes x radix; picking the reached node's weights first costs memory traffic of radix x width
instead. Forward and backward at 4096 positions of width 192 on one core, milliseconds in float32: 64 nodes of 16, 98
against 123; 128 nodes, 192 against 135; 256 nodes, 403 against 114. In bfloat16, which helps the product only: 64
nodes, 40 against 151; 128, 104 against 190; 256, 253 against 105.
"""

INITIAL_LOGIT_STD = 0.1


class TreeEmbedding(nn.Module):
    """Reads mixed-radix codes along the tree that their prefixes form: each prefix of one digit or more is a node.

    A node has an embedding, and a code is read as the sum of those on its path. The table holds the nodes by depth,
    then by prefix: siblings lie together.

    Raises:
        UserError: for radices that are no codebook (see `Level`).
    """

    def __init__(self, radices: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.radices = radices
        self.tree = Level(1, 1, radices)  # for its arithmetic of prefixes and digits; it has no grid here
        self.rows = [Level(1, 1, radices[: i + 1]).codebook_size for i in range(len(radices))]  # nodes at each depth
        # a path sums to unit variance
        self.embedding = nn.Parameter(torch.randn(sum(self.rows), width) * len(radices) ** -0.5)

    def embed(self, codes: Int64[Tensor, "b *grid"]) -> Float[Tensor, "b n d"]:
        """What a body reads: at each position, in raster order, the sum of the embeddings on its code's path."""
        b = len(codes)
        codes = codes.flatten()
        paths = [self.tree.prefix(codes, i + 1) + sum(self.rows[:i]) for i in range(len(self.radices))]
        embedded = F.embedding_bag(torch.stack(paths, dim=-1), self.embedding, mode="sum")  # (b n) d
        return rearrange(embedded, "(b n) d -> b n d", b=b)


class FactorizedHead(TreeEmbedding):
    """Reads and predicts mixed-radix codes digit by digit, along the tree that their prefixes form.

    Beside its embedding each node has the weights and bias of its own logit among its siblings, and digit i is
    predicted among the children of the node that the digits before it lead to. So features and prefix interact, and
    32**3 leaves cost 96 logits. With one radix this is an ordinary embedding and softmax.

    Softmax, losses and draws are float32 under autocast.
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
        without_class: Float[Tensor, "b n d"] | None = None,
        guidance: float = 1.0,
    ) -> tuple[Float[Tensor, "b n k"], Bool[Tensor, "b n"]]:
        """`digit_nll`, and where the likeliest digit at every turn leads to the very code; of the distribution that
        `sample` draws from with the same temperature and guidance."""
        child_logits = self._logits(features, temperature, without_class, guidance)
        nll, hits = [], []
        for i in range(len(self.radices)):
            digit = self.tree.digit(codes, i)
            logits = child_logits(i, self.tree.prefix(codes, i))
            nll.append(F.cross_entropy(rearrange(logits, "b n r -> (b n) r"), digit.flatten(), reduction="none"))
            hits.append(logits.argmax(-1) == digit)
        return torch.stack(nll, dim=-1).view(*codes.shape, -1), torch.stack(hits).all(0)

    def digit_nll(self, features: Float[Tensor, "b n d"], codes: Int64[Tensor, "b n"]) -> Float[Tensor, "b n k"]:
        """-log p(digit | features, the digits before it), nats."""
        return self.score(features, codes)[0]

    def nll(self, features: Float[Tensor, "b n d"], codes: Int64[Tensor, "b n"], **how: Any) -> Float[Tensor, "b n"]:
        """-log p(code | features), nats; `how` is for `score`."""
        return self.score(features, codes, **how)[0].sum(-1)

    @torch.no_grad()
    def sample(
        self,
        features: Float[Tensor, "b n d"],
        uniforms: Float[Tensor, "b n k"],
        temperature: float | Tensor = 1.0,
        *,
        without_class: Float[Tensor, "b n d"] | None = None,
        guidance: float = 1.0,
        top_p: float = 1.0,
    ) -> Int64[Tensor, "b n"]:
        """Draws a code at each position, digit after digit from softmax(logits / temperature); `uniforms` in [0, 1)
        decide.

        With the features of the same codes `without_class`, by classifier-free guidance (arXiv 2207.12598, Eq. 6, whose
        1 + w is `guidance`), digit by digit: logits = without + guidance (with - without).

        With `top_p` below 1 each digit is one of the fewest values that have that share together (arXiv 1904.09751).
        """
        child_logits = self._logits(features, temperature, without_class, guidance)
        codes = torch.zeros(uniforms.shape[:2], dtype=torch.int64, device=uniforms.device)
        for i, radix in enumerate(self.radices):
            probabilities = child_logits(i, codes).softmax(-1)
            if top_p < 1:
                probabilities = nucleus(probabilities, top_p)
            codes = codes * radix + inverse_cdf(probabilities, uniforms[..., i])
        return codes

    def log_probs(self, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b n leaves"]:
        """log p(code | features) of every code, nats: for enumeration, as it costs what the tree saves."""
        depths = F.linear(features, self.weight, self.bias).float().split(self.rows, dim=-1)
        total = features.new_zeros(*features.shape[:2], 1, dtype=torch.float32)
        for logits, radix in zip(depths, self.radices, strict=True):
            siblings = rearrange(logits, "b n (p r) -> b n p r", r=radix).log_softmax(-1)
            total = rearrange(total[..., None] + siblings, "b n p r -> b n (p r)")
        return total

    def random_codes(self, seeds: Int64[Tensor, " b"], *grid: int) -> Int64[Tensor, "b *grid"]:
        """Codes uniform over all leaves, decided by each row's seed."""
        return (uniform(seeds, *grid) * self.codebook_size).long()

    def _logits(
        self, features: Tensor, temperature: float | Tensor, without_class: Tensor | None, guidance: float
    ) -> Callable[[int, Tensor], Tensor]:
        """What `_reader` gives, guided, and divided by the temperature."""
        child_logits = self._reader(features)
        if without_class is None:
            if not isinstance(temperature, Tensor) and temperature == 1:
                return child_logits
            return lambda digit, parents: child_logits(digit, parents) / temperature
        other_logits = self._reader(without_class)
        return lambda i, parents: torch.lerp(other_logits(i, parents), child_logits(i, parents), guidance) / temperature

    def _reader(self, features: Tensor) -> Callable[[int, Tensor], Tensor]:
        """A function (digit, parents `(b, n)`) -> `(b, n, r)`: float32 logits of the parents' children. See
        `DENSE_NODES`."""
        split = [sum(self.rows[: self.dense_digits]), *self.rows[self.dense_digits :]]
        weights, biases = self.weight.split(split), self.bias.split(split)
        dense = F.linear(features, weights[0], biases[0]).split(self.rows[: self.dense_digits], dim=-1)

        @no_type_check  # made anew at every step of a sampler: shape checks under pytest would be made anew as well
        def child_logits(digit: int, parents: Tensor) -> Tensor:
            radix = self.radices[digit]
            if digit == 0:
                return dense[0].float()
            if digit < self.dense_digits:
                children = parents[..., None] * radix + torch.arange(radix, device=parents.device)
                return dense[digit].gather(-1, children).float()
            table = 1 + digit - self.dense_digits
            picked = F.embedding(parents, rearrange(weights[table], "(p r) d -> p (r d)", r=radix))
            # not in half precision: it would not be faster, and would sum the gradients of a much used node in it
            with torch.autocast(features.device.type, enabled=False):
                logits = einsum(
                    rearrange(picked, "b n (r d) -> b n r d", r=radix), features.float(), "b n r d, b n d -> b n r"
                )
            return logits + F.embedding(parents, rearrange(biases[table], "(p r) -> p r", r=radix))

        return child_logits


def nucleus(probabilities: Float[Tensor, "*n r"], top_p: float) -> Float[Tensor, "*n r"]:
    """The fewest likeliest values that reach `top_p` together; the others become 0 (arXiv 1904.09751)."""
    sorted_, order = probabilities.sort(dim=-1, descending=True, stable=True)
    above = sorted_.cumsum(-1) - sorted_  # what the likelier ones have
    return probabilities.masked_fill((above >= top_p).gather(-1, order.argsort(-1)), 0.0)


def inverse_cdf(probabilities: Float[Tensor, "*n r"], uniforms: Float[Tensor, "*n"]) -> Int64[Tensor, "*n"]:
    """The index whose share of [0, 1) holds the uniform number; shares that sum to less than 1 are enlarged alike.

    The shares are summed as integers of 2**-38: float sums need not grow on devices that add in parallel. So the index
    is always below r, and never one whose probability is zero (or below 2**-38).
    """
    cumulative = (probabilities * 2.0**38).long().cumsum(-1)
    threshold = (uniforms * 2.0**24).long() * cumulative[
        ..., -1
    ] >> 24  # below the last, since uniforms are at most 1 - 2**-24
    return (cumulative <= threshold[..., None]).sum(-1)
