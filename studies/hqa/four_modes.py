"""Fig. 1 of HQA's paper: points around four modes, kept in one bit, by one layer and by two.

One layer of two codes covers modes: what it decodes to lies between them. On top of a layer of four codes, one of two
covers modes of its latent space instead, and quantizing there resolves it: deterministically modes are dropped,
stochastically none is.

Legend: n points, d code width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.core.randomness import derive, generator_for, row_seeds
from smalti.tokenizers.quantizers.kmeans import linked_kmeans
from smalti.tokenizers.quantizers.linked import LinkedQuantizer
from smalti.tokenizers.quantizers.stochastic import StochasticQuantizer

MODES = torch.tensor([[-1.0, -1.5], [1.0, -1.5], [-1.0, 1.5], [1.0, 1.5]])
SPREAD = 0.1
REALISTIC = 4 * SPREAD
"""A point farther than this from every mode is unrealistic; of real ones, 1 in 3000 is."""
POINTS, STEPS, RATE = 512, 200, 5e-3
CODE_WIDTH, HIDDEN, SCALE, LATENT_WEIGHT = 2, 32, 2.0, 0.02
SINGLE, DROPPING, COVERING = "one layer", "two layers, deterministic", "two layers, stochastic"


@dataclass(frozen=True)
class Decoded:
    """What points come back as from one bit each.

    Attributes:
        points: decoded.
        unrealistic: the share of them that is near no mode.
        modes: how many of the four modes some are near.
    """

    points: Float[Tensor, "n 2"]
    unrealistic: float
    modes: int


def judged(points: Float[Tensor, "n 2"]) -> Decoded:
    """Points, held against the modes."""
    distance, mode = torch.cdist(points, MODES).min(1)
    near = distance <= REALISTIC
    return Decoded(points, float((~near).float().mean()), len(mode[near].unique()))


def real_points(count: int = POINTS, seed: int = 0) -> Float[Tensor, "n 2"]:
    """As many of each mode, in turn."""
    noise = torch.randn(count, 2, generator=generator_for(seed))
    return MODES[torch.arange(count) % len(MODES)] + SPREAD * noise


class _Layer(nn.Module):
    """Encoder, quantizer and decoder of vectors of the width of codewords, which both networks begin by scaling."""

    def __init__(self, quantizer: LinkedQuantizer | StochasticQuantizer) -> None:
        super().__init__()
        self.up, self.down = (
            nn.Sequential(nn.Linear(CODE_WIDTH, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, CODE_WIDTH)) for _ in range(2)
        )
        self.quantizer = quantizer

    def encode(self, given: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """z_e; from the start codewords are far enough apart to be told apart by Eq. 3."""
        return SCALE * given + self.up(given)

    def codes(self, z_e: Float[Tensor, "n d"], seeds: Int64[Tensor, " n"] | None = None) -> Int64[Tensor, "n 1 1"]:
        if isinstance(self.quantizer, StochasticQuantizer):
            return self.quantizer.encode(_grid(z_e), seeds)
        return self.quantizer.encode(_grid(z_e))

    def decode(self, z_q: Float[Tensor, "n d 1 1"]) -> Float[Tensor, "n d"]:
        return _vectors(z_q) / SCALE + self.down(_vectors(z_q))


def _grid(vectors: Tensor) -> Tensor:
    return rearrange(vectors, "n d -> n d 1 1")


def _vectors(grid: Tensor) -> Tensor:
    return rearrange(grid, "n d 1 1 -> n d")


def _trained(layer: _Layer, given: Float[Tensor, "n d"]) -> _Layer:
    optimizer = torch.optim.Adam(layer.parameters(), lr=RATE)
    rows = torch.arange(len(given))
    with torch.no_grad():
        start = _grid(layer.encode(given))
        if isinstance(layer.quantizer, LinkedQuantizer):
            layer.quantizer.init_from_data(start)
        else:
            layer.quantizer.codebook.copy_(
                linked_kmeans(_vectors(start), [layer.quantizer.codebook[None]], seed=0)[0][0]
            )
    for step in range(STEPS):
        seeds, z_e = row_seeds(step, rows), _grid(layer.encode(given))
        if isinstance(layer.quantizer, StochasticQuantizer):
            output = layer.quantizer(z_e, seeds, torch.full((len(given),), step / STEPS))
        else:
            output = layer.quantizer(z_e)
        loss = F.mse_loss(layer.decode(output.z_q), given) + torch.stack([*output.losses.values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        layer.quantizer.after_step(seeds)
    return layer.eval().requires_grad_(False)


def _stochastic(codes: int) -> StochasticQuantizer:
    return StochasticQuantizer(code_width=CODE_WIDTH, codebook_size=codes, weight=LATENT_WEIGHT)


def four_modes(seed: int = 0) -> dict[str, Decoded]:
    """The three models of Fig. 1, each of one bit, trained anew, on points that they were not trained on."""
    torch.manual_seed(seed)
    given, points = real_points(seed=seed), real_points(seed=seed + 1)
    single = _trained(_Layer(LinkedQuantizer(code_width=CODE_WIDTH, branching=2)), given)
    lower = _trained(_Layer(_stochastic(4)), given)
    upper = _trained(_Layer(_stochastic(2)), lower.encode(given))
    seeds = row_seeds(seed, torch.arange(len(points)))

    def hierarchy(seeds_of: Callable[[int], Tensor | None]) -> Tensor:
        """Algorithm 1."""
        kept = upper.codes(upper.encode(lower.encode(points)), seeds_of(0))
        resolved = lower.codes(upper.decode(upper.quantizer.lookup(kept)), seeds_of(1))
        return lower.decode(lower.quantizer.lookup(resolved))

    return {
        SINGLE: judged(single.decode(single.quantizer.lookup(single.codes(single.encode(points))))),
        DROPPING: judged(hierarchy(lambda _: None)),
        COVERING: judged(hierarchy(lambda stream: derive(seeds, stream))),
    }
