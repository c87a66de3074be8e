"""What the benchmark compares: for each hot path our way, the naive one, a peer, and the limit. No clocks but one.

Every section is a generator: what it makes on the disk goes when it is exhausted or closed. Latent sets have a file of
their own, `benchmark_latents.py`; what a way and a comparison are is in `comparison.py`.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from smalti.checkpoint import Checkpointed
from smalti.codes import Level
from smalti.devices import Precision, accelerator, autocast, best_device
from smalti.fit import fit
from smalti.fit_config import FitConfig, Phase
from smalti.images import ImageRows, open_images
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.rows import LatentRows
from smalti.pipeline.benchmark_latents import write_random_latents
from smalti.pipeline.comparison import Comparison, Measured, Way, synchronize
from smalti.priors.ancestral import DRAW, PARTICLE, AncestralSampling, sample_ancestral
from smalti.priors.hourglass import Hourglass, HourglassConfig
from smalti.priors.pixelcnn import PixelCNN, PixelCNNConfig
from smalti.priors.prior import CausalPrior, Prior
from smalti.priors.samplers import SundaeSampling, sample_sundae
from smalti.priors.sundae import Sundae, SundaeConfig
from smalti.randomness import derive, row_seeds, uniform
from smalti.rows import Batch, RowData
from smalti.runs import Run
from smalti.tokenizers.hrvq import HRVQ, HRVQConfig
from smalti.tokenizers.objective import Reconstruction
from smalti.tokenizers.search import nearest_paths

SEARCH_TARGETS = {8: 10.0, 16: 25.0, 32: 120.0}
"""How many times faster than flat search the linked search is to be, by branching, on two CPU cores."""

LARGEST_OVERHEAD = 1.03
"""How many times as long as the bare step a step of the training loop may take."""

FLAT_TILE = {"cpu": (256, 512), "cuda": (4096, 32_768), "mps": (4096, 32_768)}
"""Vectors and leaves that flat search compares at once: on CPUs the scores stay in the cache until their minimum."""

CACHED_TARGET = 100.0
"""How many times faster than the naive way drawing codes one by one is to be, at 32x32 and 16 samples."""

DEMONSTRATION = HourglassConfig()

DEMONSTRATION_ONE_BY_ONE = PixelCNNConfig()


def search(*, vectors: int = 65_536, width: int = 64, branchings: Sequence[int] = (8, 16, 32)) -> Iterator[Comparison]:
    """The linked search of three layers beside flat search over the same number of leaves."""
    device = best_device()
    z = torch.randn(vectors, width, device=device)
    for m in branchings:
        books = [torch.randn(m**i, m, width, device=device) * 0.5**i for i in range(3)]
        leaves = books[0].view(-1, width)
        for book in books[1:]:
            leaves = (leaves[:, None] + book).view(-1, width)
        all_layers = torch.randn(width, 3 * m, device=device)
        product = torch.empty(vectors, 3 * m, device=device)
        yield Comparison(
            f"linked search, {m}³ leaves, {vectors} vectors of width {width}",
            (
                Way("smalti", lambda books=books: nearest_paths(z, books)),
                Way(
                    "flat search, product and argmin in blocks of 8192 vectors",
                    lambda leaves=leaves: plain_flat_search(z, leaves),
                    target=SEARCH_TARGETS.get(m),
                ),
                Way(
                    "flat search tuned: fused sum and minimum, in tiles that the cache holds",
                    lambda leaves=leaves: flat_search(z, leaves, *FLAT_TILE[device.type]),
                ),
                Way(
                    "linked search, gathering each vector's candidates", lambda books=books: gathering_search(z, books)
                ),
                Way(
                    "limit: one matrix product of the linked search's multiply-adds",
                    lambda product=product, all_layers=all_layers: torch.mm(z, all_layers, out=product),
                ),
            ),
        )


def plain_flat_search(vectors: Tensor, leaves: Tensor, block: int = 8192) -> Tensor:
    """The nearest of all leaves as one writes it: a matrix product and an argmin, block by block."""
    half = leaves.square().sum(1) / 2
    return torch.cat([(half - rows @ leaves.T).argmin(1) for rows in vectors.split(block)])


def flat_search(vectors: Tensor, leaves: Tensor, block: int, chunk: int) -> Tensor:
    """The nearest of all leaves, `block` vectors and `chunk` leaves at a time; the |v|^2 left out, one buffer."""
    half, buffer = leaves.square().sum(1) / 2, torch.empty(block * chunk, device=vectors.device)
    nearest = []
    for rows in vectors.split(block):
        least = index = torch.empty(0)  # the first chunk's are taken as they are
        for first in range(0, len(leaves), chunk):
            some = leaves[first : first + chunk]
            scores = buffer[: len(rows) * len(some)].view(len(rows), len(some))
            found = torch.addmm(half[first : first + chunk], rows, some.T, alpha=-1, out=scores).min(1)
            index = torch.where(found.values < least, found.indices + first, index) if first else found.indices
            least = torch.minimum(found.values, least) if first else found.values
        nearest.append(index)
    return torch.cat(nearest)


def gathering_search(vectors: Tensor, books: Sequence[Tensor]) -> Tensor:
    """The linked search as one writes it first: each vector's candidates gathered, differences squared."""
    path, residual = torch.zeros(len(vectors), dtype=torch.long, device=vectors.device), vectors
    for book in books:
        distances = (residual[:, None] - book[path]).square().sum(-1)
        path = path * book.shape[1] + distances.argmin(1)
        residual = residual - book.view(-1, book.shape[2])[path]
    return path


def prior(*, batch: int = 64, config: HourglassConfig = DEMONSTRATION) -> Iterator[Comparison]:
    """Loss and gradients of the demonstration's prior beside those of its body alone, as often as SUNDAE unrolls."""
    device = best_device()
    network, unrolled = Hourglass(config).to(device), SundaeConfig().unrolled_steps
    objective, codes = Sundae(network, SundaeConfig()), random_codes(network, batch)
    seeds = row_seeds(0, torch.arange(batch, device=device))

    def ours(precision: Precision) -> None:
        network.zero_grad()
        with autocast(device, precision):
            loss, _ = objective({"codes": codes, "seeds": seeds})
        loss.backward()

    def body(precision: Precision) -> None:
        network.zero_grad()
        for _ in range(unrolled):
            with autocast(device, precision):
                loss = network.features(codes).float().square().mean()
            loss.backward()

    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    for precision in precisions:
        yield Comparison(
            f"prior, loss and gradients of a batch of {batch}, {precision}",
            (
                Way("smalti, SUNDAE", lambda precision=precision: ours(precision)),
                Way(f"limit: features alone, {unrolled} times", lambda precision=precision: body(precision)),
            ),
        )


def sampler(*, batch: int = 64, steps: int = 10, config: HourglassConfig = DEMONSTRATION) -> Iterator[Comparison]:
    """A step of the sampler beside a bare forward pass."""
    device = best_device()
    network = Hourglass(config).to(device).eval()
    codes, seeds = random_codes(network, batch), row_seeds(0, torch.arange(batch, device=device))
    nothing, chain = torch.zeros_like(codes, dtype=torch.bool), SundaeSampling(steps=steps, min_steps=steps)

    def ours() -> Tensor:
        with autocast(device, "auto"):
            return sample_sundae(network, known=codes, known_mask=nothing, seeds=seeds, sampling=chain)

    @torch.no_grad()
    def forward() -> None:
        with autocast(device, "auto"):
            for _ in range(steps):
                F.linear(network.features(codes), network.head.weight, network.head.bias)

    yield Comparison(
        f"sampler, one step of {batch} samples",
        (Way("smalti", ours, steps), Way("limit: features and the logits of every node", forward, steps)),
    )


def ancestral(
    *,
    batches: Sequence[int] = (16, 1, 64),
    side: int = 32,
    positions: int = 1,
    config: PixelCNNConfig = DEMONSTRATION_ONE_BY_ONE,
) -> Iterator[Comparison]:
    """Codes drawn one by one, what was computed before kept, beside computing the whole grid for each.

    The naive way takes as long for every position, so it draws the first `positions` only.
    """
    device = best_device()
    network = PixelCNN(replace(config, height=side, width=side)).to(device).eval()
    for batch in batches:
        codes, seeds = random_codes(network, batch), row_seeds(0, torch.arange(batch, device=device))
        nothing = torch.zeros_like(codes, dtype=torch.bool)
        rest = (torch.arange(side * side, device=device) >= positions).view(side, side).expand(batch, -1, -1)
        yield Comparison(
            f"codes of a {side}x{side} grid drawn one by one, a position of {batch} samples",
            (
                Way(
                    "smalti",
                    partial(sample_ancestral, network, known=codes, known_mask=nothing, seeds=seeds),
                    side * side,
                ),
                Way(
                    f"the whole grid anew for each position ({positions} of {side * side} timed)",
                    partial(sample_naively, network, codes, rest, seeds, AncestralSampling()),
                    positions,
                    target=CACHED_TARGET if batch == 16 else None,
                ),
            ),
        )


@torch.no_grad()
def sample_naively(
    prior: CausalPrior,
    known: Tensor,
    known_mask: Tensor,
    seeds: Tensor,
    sampling: AncestralSampling,
    labels: Tensor | None = None,
    upper: tuple[Tensor, ...] = (),
) -> Tensor:
    """Drawing as one writes it: at each position the features of the whole grid. The same draws as ours.

    Positions known in every row cost nothing.
    """
    head, (b, h, w) = prior.head, known.shape
    codes = torch.where(known_mask, known, 0)
    first = derive(derive(seeds, PARTICLE, torch.zeros_like(seeds)), DRAW)
    draws = uniform(first, h * w, len(head.radices))
    for position in (~known_mask).flatten(1).any(0).nonzero().flatten().tolist():
        features, without = prior.features(codes, labels, upper), None
        if labels is not None and sampling.guidance != 1:
            without = prior.features(codes, torch.full_like(labels, -1), upper)
        drawn = head.sample(features, draws, sampling.temperature, without_class=without, guidance=sampling.guidance)
        here = torch.zeros_like(known_mask).view(b, -1)
        here[:, position] = True
        codes = torch.where(here.view_as(known_mask) & ~known_mask, drawn.view_as(codes), codes)
    return codes


def training(*, batch: int = 64, steps: int = 40) -> Iterator[Comparison]:
    """A step of `fit` beside a bare loop over the same model and batch: what the loop, data and logging add."""
    process, config = accelerator("auto"), FitConfig(steps=steps, batch_size=batch)
    images = ImageRows(open_images("emoji", height=32, width=32, channels=3), split="train", flips=True)
    with tempfile.TemporaryDirectory(prefix="smalti-benchmark-") as folder:
        path = Path(folder) / "latents.h5"
        write_random_latents(path, rows=4096, level=Level(8, 8, (8, 8, 8)))
        tokenizer, network = HRVQ(HRVQConfig()), Hourglass(DEMONSTRATION)
        rows = LatentRows(LatentSet(path), split="train")
        models: tuple[tuple[str, Checkpointed, nn.Module, RowData], ...] = (
            ("tokenizer", tokenizer, Reconstruction(tokenizer), images),
            ("prior", network, Sundae(network, SundaeConfig()), rows),
        )
        for name, model, objective, data in models:
            objective.to(process.device)
            yield Comparison(
                f"training step of the {name}, batch of {batch}",
                (
                    Way("smalti.fit", partial(_fit, process, model, objective, data, config)),
                    Way(
                        "limit: forward, backward, optimiser",
                        partial(_bare_loop, process, objective, data, config),
                        target=1 / LARGEST_OVERHEAD,
                    ),
                ),
            )


@dataclass
class _Clocked:
    """Rows that note when each batch is asked for: once a step, where no workers prefetch."""

    data: RowData
    asked: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, rows: list[int]) -> Batch:
        synchronize()
        self.asked.append(time.perf_counter())
        return self.data.__getitems__(rows)


def _fit(process: Accelerator, model: Checkpointed, objective: nn.Module, data: RowData, config: FitConfig) -> Measured:
    """Seconds a step of `fit`, from the first step to the last: without the start and the saving at the end."""
    clocked = _Clocked(data)
    with tempfile.TemporaryDirectory(prefix="smalti-benchmark-") as folder:
        phases = [Phase("benchmark", objective, config.optimizer_of(objective))]
        fit(process, phases, clocked, config, model=model, run=Run(Path(folder), {}), what="benchmark")
    return Measured((clocked.asked[-1] - clocked.asked[0]) / (len(clocked.asked) - 1))


def _bare_loop(process: Accelerator, objective: nn.Module, data: RowData, config: FitConfig) -> Measured:
    """Seconds a step of the least that trains: one batch, over and over."""
    batch = {
        name: tensor.to(process.device) for name, tensor in data.__getitems__(list(range(config.batch_size))).items()
    }
    batch["seeds"] = row_seeds(0, batch["rows"])
    optimizer, asked = config.optimizer_of(objective), []
    objective.train()
    for _ in range(config.steps):
        synchronize()
        asked.append(time.perf_counter())
        with process.autocast():
            loss, _ = objective(batch)
        loss.backward()
        optimizer.step()
        objective.zero_grad()
    return Measured((asked[-1] - asked[0]) / (len(asked) - 1))


def random_codes(network: Prior, batch: int) -> Tensor:
    """Codes for a network of one level, on its device."""
    level, device = network.level, network.head.weight.device
    return torch.randint(level.codebook_size, (batch, level.height, level.width), device=device)
