"""Fig. 1 of HQA's paper: points around four modes, compressed to one bit by one layer and by two layers.

One layer with two codes averages modes: it decodes to points between them. If a layer with two codes is trained on the
latent space of a layer with four codes, it averages latents, and quantizing with the lower layer resolves the average
to a mode. Deterministic quantization drops modes, stochastic quantization covers them all.

Deviation: both rows of two layers are one model, trained with sampled codes, that decodes its most likely codes or
samples. The paper's deterministic hierarchy has a VQ-VAE as its first layer.

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
"""A point farther than this from every mode is unrealistic; one in 3000 real points is."""
POINTS, STEPS, RATE = 512, 200, 5e-3
CODE_WIDTH, HIDDEN, SCALE, LATENT_WEIGHT = 2, 32, 2.0, 0.02
SINGLE, DROPPING, COVERING = "one layer", "two layers, deterministic", "two layers, stochastic"


@dataclass(frozen=True)
class Decoded:
    """Points decoded from one bit each.

    Attributes:
        points: The decoded points.
        unrealistic: The share of points that are near no mode.
        modes: The number of modes that have points near them.
    """

    points: Float[Tensor, "n 2"]
    unrealistic: float
    modes: int


def evaluate_points(points: Float[Tensor, "n 2"]) -> Decoded:
    """Compares decoded points with the modes."""
    distance, mode = torch.cdist(points, MODES).min(1)
    near = distance <= REALISTIC
    return Decoded(points, float((~near).float().mean()), len(mode[near].unique()))


def real_points(seed: int = 0) -> Float[Tensor, "n 2"]:
    """Draws points around the modes in turn, equally many of each."""
    noise = torch.randn(POINTS, 2, generator=generator_for(seed))
    return MODES[torch.arange(POINTS) % len(MODES)] + SPREAD * noise


class _Layer(nn.Module):
    """Encoder, quantizer and decoder of vectors as wide as the codewords. Both networks start near a scaling."""

    def __init__(self, quantizer: LinkedQuantizer | StochasticQuantizer) -> None:
        super().__init__()
        self.up, self.down = (
            nn.Sequential(nn.Linear(CODE_WIDTH, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, CODE_WIDTH)) for _ in range(2)
        )
        self.quantizer = quantizer

    def encode(self, vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Returns z_e, scaled so that Eq. 3 can separate the codewords from the start."""
        return SCALE * vectors + self.up(vectors)

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


def _trained(layer: _Layer, data: Float[Tensor, "n d"]) -> _Layer:
    """Trains a layer to reconstruct the data; returns it frozen."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=RATE)
    rows = torch.arange(len(data))
    with torch.no_grad():
        start = _grid(layer.encode(data))
        if isinstance(layer.quantizer, LinkedQuantizer):
            layer.quantizer.init_from_data(start)
        else:
            layer.quantizer.codebook.copy_(
                linked_kmeans(_vectors(start), [layer.quantizer.codebook[None]], seed=0)[0][0]
            )
    for step in range(STEPS):
        seeds, z_e = row_seeds(step, rows), _grid(layer.encode(data))
        if isinstance(layer.quantizer, StochasticQuantizer):
            output = layer.quantizer(z_e, seeds, torch.full((len(data),), step / STEPS))
        else:
            output = layer.quantizer(z_e)
        loss = F.mse_loss(layer.decode(output.z_q), data) + torch.stack([*output.losses.values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        layer.quantizer.after_step(seeds)
    return layer.eval().requires_grad_(False)


def _stochastic(codes: int) -> StochasticQuantizer:
    return StochasticQuantizer(code_width=CODE_WIDTH, codebook_size=codes, weight=LATENT_WEIGHT)


def four_modes() -> dict[str, Decoded]:
    """Trains the three models of Fig. 1, of one bit each, and evaluates them on points outside their training set."""
    torch.manual_seed(0)
    train, points = real_points(), real_points(seed=1)
    single = _trained(_Layer(LinkedQuantizer(code_width=CODE_WIDTH, branching=2)), train)
    lower = _trained(_Layer(_stochastic(4)), train)
    upper = _trained(_Layer(_stochastic(2)), lower.encode(train))
    seeds = row_seeds(0, torch.arange(len(points)))

    def hierarchy(seeds_of: Callable[[int], Tensor | None]) -> Tensor:
        """Encodes and decodes the points through both layers (Algorithm 1)."""
        upper_codes = upper.codes(upper.encode(lower.encode(points)), seeds_of(0))
        lower_codes = lower.codes(upper.decode(upper.quantizer.lookup(upper_codes)), seeds_of(1))
        return lower.decode(lower.quantizer.lookup(lower_codes))

    return {
        SINGLE: evaluate_points(single.decode(single.quantizer.lookup(single.codes(single.encode(points))))),
        DROPPING: evaluate_points(hierarchy(lambda _: None)),
        COVERING: evaluate_points(hierarchy(lambda stream: derive(seeds, stream))),
    }
