"""Benchmark of the default prior beside a plain network, trained on the same codes.

It shows a regression of the loss or of the speed of a training step. All variants have the learning rate, warm-up and
decay of the defaults, which were chosen for the first one, without EMA. The plain network is written in torch
alone, with what arXiv 2206.12351 names: an hourglass (arXiv 2110.13711) without causal masks, whose downsampling
merges patches of the grid, and axial rotary embeddings. Linear resampling is our default.

Legend: b batch, h w grid, n positions, d width, a head's channels.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from smalti.benchmarks.comparison import Comparison, Measured, Variant, synchronize
from smalti.commands.model_paths import load_tokenizer
from smalti.commands.train_prior import TrainPrior
from smalti.core.devices import autocast, best_device
from smalti.core.randomness import row_seeds
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows, open_images
from smalti.priors.head import FactorizedHead
from smalti.priors.methods.sundae import Sundae, SundaeConfig, corrupt
from smalti.priors.networks.hourglass import Hourglass, HourglassConfig
from smalti.priors.networks.positions import ROTARY_THETA
from smalti.training.accelerator import subnormals_flushed
from smalti.training.config import FitConfig
from smalti.training.optimizers import clip

CORRUPTION = (0.25, 0.5, 0.75, 1.0)
"""Shares of corrupted codes at which the held-out loss is measured."""
PLAIN_STRUCTURE = {"absolute_positions": False, "qk_norm": False}
"""Settings with which smalti's network has the structure of the plain one."""


class PlainBlock(nn.Module):
    """A pre-norm transformer block: attention over all positions, then a feed-forward layer.

    Args:
        width: channels of a position.
        heads: attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.feedforward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """Maps features `(b, n, d)` to features; `angles`, `(n, a / 2)`, rotate queries and keys."""
        normed = self.norm1(x)
        q, k, v = (rearrange(map_(normed), "b n (h a) -> b h n a", h=self.heads) for map_ in (self.q, self.k, self.v))
        q, k = rotate(q, angles), rotate(k, angles)
        attention = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).to(v.dtype)
        x = x + self.out(rearrange(attention @ v, "b h n a -> b n (h a)"))
        return x + self.feedforward(self.norm2(x))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotates each pair of channels by its angle (rotary embeddings, arXiv 2104.09864, Eq. 34)."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2).to(x.dtype)


class PlainHourglass(nn.Module):
    """The plain network: blocks over 2x2 patches between a linear down- and upsampling, and logits of every code.

    Args:
        config: sizes of an `Hourglass` of one downsampling with blocks at the lowest resolution only.
    """

    def __init__(self, config: HourglassConfig) -> None:
        super().__init__()
        (_, blocks, _), (self.patch,), width = config.depth, config.shorten, config.model_width
        codes = math.prod(config.radices)
        self.axis_width = width // config.heads // 2
        self.embedding = nn.Embedding(codes, width)
        self.down, self.up = nn.Linear(self.patch**2 * width, width), nn.Linear(width, self.patch**2 * width)
        self.blocks = nn.ModuleList(PlainBlock(width, config.heads) for _ in range(blocks))
        self.valley_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.logits = nn.Linear(width, codes)
        nn.init.normal_(self.logits.weight, std=0.1 / width**0.5)

    def angles(self, h: int, w: int) -> Tensor:
        """Returns the angles of the first position of each patch, `(m, a / 2)`: half by its row, half by its column."""
        device = self.logits.weight.device
        frequencies = ROTARY_THETA ** (-torch.arange(0, self.axis_width, 2, device=device) / self.axis_width)
        rows, columns = (torch.arange(0, side, self.patch, device=device) for side in (h, w))
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)  # m 2
        return (grid[:, :, None] * frequencies).flatten(1)

    def features(self, codes: Tensor) -> Tensor:
        """Returns the features of each position, `(b, n, d)`, for codes `(b, h, w)`."""
        _, h, w = codes.shape
        x, p = self.embedding(codes), self.patch
        patches = self.down(rearrange(x, "b (y p) (x q) d -> b (y x) (p q d)", p=p, q=p))
        angles = self.angles(h, w)
        for block in self.blocks:
            patches = block(patches, angles)
        up = self.up(self.valley_norm(patches))
        x = x + rearrange(up, "b (y x) (p q d) -> b (y p) (x q) d", y=h // p, p=p, q=p)
        return self.norm(x.flatten(1, 2))

    def forward(self, codes: Tensor) -> Tensor:
        """Returns the logits of every code, `(b, n, codes)`."""
        return self.logits(self.features(codes)).float()


def plain_loss(network: PlainHourglass, corrupted: Tensor, codes: Tensor) -> Tensor:
    """Returns SUNDAE's loss in nats per code, unrolled for two steps (arXiv 2112.06749, Eq. 7)."""
    logits = network(corrupted)
    drawn = logits.detach().softmax(-1).flatten(0, 1).multinomial(1).view_as(codes)
    target = codes.flatten()
    return (F.cross_entropy(logits.flatten(0, 1), target) + F.cross_entropy(network(drawn).flatten(0, 1), target)) / 2


@dataclass(frozen=True)
class Trained:
    """The results of a training: seconds of a step, median, and the held-out loss in nats per code."""

    seconds: float
    loss: float


def parity(*, steps: int = 200, batch: int = 32, images: int = 2_500, held_out: int = 500) -> Iterator[Comparison]:
    """Compares seconds of a training step and held-out losses after equally many steps.

    The losses are the means over corruption rates of the cross-entropy of one denoising step.
    """
    codes, radices = portrait_codes(images + held_out)
    config = HourglassConfig(*codes.shape[1:], radices=radices)
    train_codes, held_out_codes = codes[:images], codes[images:]

    @cache
    def trained(name: str) -> Trained:
        torch.manual_seed(0)
        optimizer = "muon" if name == "defaults" else "adamw"
        fit = replace(
            TrainPrior(model=config, objective=SundaeConfig()).fit, optimizer=optimizer, steps=steps, batch_size=batch
        )
        head = FactorizedHead(radices, 4).to(codes.device)  # for its random codes
        if name == "plain":
            network = PlainHourglass(config).to(codes.device)

            def loss_of(rows: Tensor, seeds: Tensor) -> Tensor:
                return plain_loss(network, corrupt(head, rows, seeds), rows)

            def score(corrupted: Tensor, target: Tensor) -> Tensor:
                return F.cross_entropy(network(corrupted).flatten(0, 1), target.flatten())
        else:
            network = Hourglass(replace(config, **PLAIN_STRUCTURE) if name == "structure" else config).to(codes.device)
            objective = Sundae(network, SundaeConfig())

            def loss_of(rows: Tensor, seeds: Tensor) -> Tensor:
                return objective({"codes": rows, "seeds": seeds})[0]

            def score(corrupted: Tensor, target: Tensor) -> Tensor:
                return network.head.score(network.features(corrupted), target.flatten(1))[0].sum(-1).mean()

        seconds = train(network, fit, loss_of, train_codes)
        return Trained(seconds, held_out_loss(network, score, head, held_out_codes))

    names = {
        "smalti, the defaults (Muon, QK-norm, absolute positions)": "defaults",
        "smalti, the same with AdamW": "adamw",
        "smalti, the plain structure with AdamW": "structure",
        "plain torch, the plain structure with AdamW": "plain",
    }
    yield Comparison(
        f"training step of the default prior, batch of {batch}",
        [Variant(name, lambda key=key: Measured(trained(key).seconds)) for name, key in names.items()],
        varies=False,
    )
    yield Comparison(
        f"its held-out loss after {steps} steps",
        [Variant(name, lambda key=key: Measured(trained(key).loss)) for name, key in names.items()],
        readable=in_nats,
        varies=False,
    )


def in_nats(loss: float) -> str:
    """Formats a loss."""
    return f"{loss:.3f} nats a code"


@torch.no_grad()
def portrait_codes(count: int) -> tuple[Tensor, tuple[int, ...]]:
    """Returns codes of embedded portraits by the package's tokenizer, `(count, h, w)`, and their radices."""
    tokenizer = load_tokenizer("portraits").eval().to(best_device())
    portraits = open_images("portraits", height=tokenizer.config.height, width=tokenizer.config.width)
    images = ImageRows(portraits, split="all", flips=False).spread(count)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    parts = [tokenizer.encode(to_float(part.to(best_device())))[0] for part in images.split(100)]
    return torch.cat(parts), tokenizer.layout.levels[0].radices


def train(network: nn.Module, fit: FitConfig, loss_of: Callable[[Tensor, Tensor], Tensor], codes: Tensor) -> float:
    """Trains a network by a plain loop; returns the median seconds of a step."""
    optimizer, parameters = fit.optimizer_of(network), list(network.parameters())
    groups = [(group, group["lr"]) for group in optimizer.param_groups]
    generator, times = torch.Generator().manual_seed(0), []
    network.train()
    with subnormals_flushed():
        for step in range(fit.steps):
            synchronize()
            start = time.perf_counter()
            for group, rate in groups:
                group["lr"] = rate * fit.rate(step)
            rows = torch.randint(len(codes), (fit.batch_size,), generator=generator).to(codes.device)
            with autocast(codes.device, "auto"):
                loss = loss_of(codes[rows], row_seeds(step, rows))
            loss.backward()
            clip(parameters, fit.clip_norm)
            optimizer.step()
            network.zero_grad()
            synchronize()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.no_grad()
def held_out_loss(
    network: nn.Module, score: Callable[[Tensor, Tensor], Tensor], head: FactorizedHead, codes: Tensor
) -> float:
    """Returns the mean cross-entropy of one denoising step, in nats per code, over `CORRUPTION`."""
    network.eval()
    seeds = row_seeds(0, torch.arange(len(codes), device=codes.device))
    return float(torch.stack([score(corrupt(head, codes, seeds, rate), codes) for rate in CORRUPTION]).mean())
