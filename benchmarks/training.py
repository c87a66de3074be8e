"""Benchmarks of codebook search and of the training loop, beside naive implementations, another library and a limit.

Each section is a generator that removes its files from the disk when it is exhausted or closed.
"""

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from smalti.benchmarks.comparison import Comparison, Measured, Variant, synchronize
from smalti.benchmarks.latents import write_random_latents
from smalti.core.codes import Level
from smalti.core.devices import best_device, resolve
from smalti.core.models import Checkpointed
from smalti.core.randomness import row_seeds
from smalti.images.image_set import ImageRows, open_images
from smalti.latentsets.dataset import LatentRows
from smalti.latentsets.reader import LatentSet
from smalti.priors.methods.sundae import Sundae, SundaeConfig
from smalti.priors.networks.hourglass import Hourglass, HourglassConfig
from smalti.tokenizers.layers.attention_blocks import GroupNorm
from smalti.tokenizers.quantizers.search import nearest_paths
from smalti.tokenizers.reconstruction import Reconstruction
from smalti.tokenizers.vq.hrvq import HRVQ, HRVQConfig
from smalti.training.accelerator import accelerator
from smalti.training.batches import Batch, RowData
from smalti.training.config import FitConfig, Phase
from smalti.training.loop import fit
from smalti.training.run_folder import Run

SEARCH_TREES = ((8, 8, 8), (16, 16, 16), (32, 32, 32), (32, 16, 8))
"""Branchings of the layers of the linked codebooks that are searched."""

SEARCH_TARGETS = {512: 10.0, 4_096: 25.0, 32_768: 120.0}
"""Target speed-up of the linked search over flat search, by number of leaves, on two CPU cores."""

LARGEST_OVERHEAD = 1.03
"""Target: a step of the training loop takes at most this many times as long as the bare step."""

FLAT_TILE = {"cpu": (256, 512), "cuda": (4096, 32_768), "mps": (4096, 32_768)}
"""Vectors and leaves per tile of the tuned flat search, by device; on CPUs the scores of a tile fit into the cache."""


def search(
    *, vectors: int = 65_536, width: int = 64, trees: Sequence[tuple[int, ...]] = SEARCH_TREES
) -> Iterator[Comparison]:
    """Compares the linked search with flat search over the same number of leaves."""
    device = best_device()
    z = torch.randn(vectors, width, device=device)
    for tree in trees:
        nodes = [math.prod(tree[:layer]) for layer in range(len(tree))]
        books = [
            torch.randn(n, m, width, device=device) * 0.5**i for i, (n, m) in enumerate(zip(nodes, tree, strict=True))
        ]
        leaves = books[0].view(-1, width)
        for book in books[1:]:
            leaves = (leaves[:, None] + book).view(-1, width)
        all_layers = torch.randn(width, sum(tree), device=device)
        product = torch.empty(vectors, sum(tree), device=device)
        shape = f"{tree[0]}³" if tree == (tree[0],) * 3 else "·".join(map(str, tree))
        yield Comparison(
            f"linked search, {shape} leaves, {vectors} vectors of width {width}",
            (
                Variant("smalti, in a large job", lambda books=books: nearest_paths(z, books, compiled=True)),
                Variant("smalti, else: without compiling", lambda books=books: nearest_paths(z, books, compiled=False)),
                Variant(
                    "flat search, product and argmin in blocks of 8192 vectors",
                    lambda leaves=leaves: plain_flat_search(z, leaves),
                    target=SEARCH_TARGETS.get(len(leaves)),
                ),
                Variant(
                    "flat search tuned: fused sum and minimum, in tiles that the cache holds",
                    lambda leaves=leaves: flat_search(z, leaves, *FLAT_TILE.get(device.type, FLAT_TILE["cpu"])),
                ),
                Variant(
                    "linked search, gathering each vector's candidates", lambda books=books: gathering_search(z, books)
                ),
                Variant(
                    "limit: one matrix product of the linked search's multiply-adds",
                    lambda product=product, all_layers=all_layers: torch.mm(z, all_layers, out=product),
                ),
                *peers(z, tree),
            ),
        )


def peers(vectors: Tensor, tree: tuple[int, ...], block: int = 8192) -> list[Variant]:
    """Returns variants of vector-quantize-pytorch, if it is installed.

    They are a flat search over as many leaves, and residual VQ with as many layers of one codebook each (no tree).
    """
    try:
        from vector_quantize_pytorch import ResidualVQ, VectorQuantize
    except ImportError:
        return []
    width = vectors.shape[1]
    flat = VectorQuantize(dim=width, codebook_size=math.prod(tree)).to(vectors.device).eval()
    residual = ResidualVQ(dim=width, codebook_size=tree, num_quantizers=len(tree)).to(vectors.device).eval()

    @torch.no_grad()
    def codes(module: nn.Module) -> Tensor:
        return torch.cat([module(rows[None])[1][0] for rows in vectors.split(block)])

    return [
        Variant("vector-quantize-pytorch, VectorQuantize, with its z_q", partial(codes, flat)),
        Variant("vector-quantize-pytorch, ResidualVQ, with its z_q", partial(codes, residual)),
    ]


def plain_flat_search(vectors: Tensor, leaves: Tensor, block: int = 8192) -> Tensor:
    """Finds the nearest of all leaves in the plain way: a matrix product and an argmin, block by block."""
    half = leaves.square().sum(1) / 2
    return torch.cat([(half - rows @ leaves.T).argmin(1) for rows in vectors.split(block)])


def flat_search(vectors: Tensor, leaves: Tensor, block: int, chunk: int) -> Tensor:
    """Finds the nearest of all leaves in tiles of `block` vectors and `chunk` leaves, in one reused buffer.

    |v|^2 is left out of the distances, as it does not change the minimum.
    """
    half, buffer = leaves.square().sum(1) / 2, torch.empty(block * chunk, device=vectors.device)
    nearest = []
    for rows in vectors.split(block):
        least = index = torch.empty(0)  # replaced in the first chunk
        for first in range(0, len(leaves), chunk):
            tile = leaves[first : first + chunk]
            scores = buffer[: len(rows) * len(tile)].view(len(rows), len(tile))
            minimum = torch.addmm(half[first : first + chunk], rows, tile.T, alpha=-1, out=scores).min(1)
            index = torch.where(minimum.values < least, minimum.indices + first, index) if first else minimum.indices
            least = torch.minimum(minimum.values, least) if first else minimum.values
        nearest.append(index)
    return torch.cat(nearest)


def gathering_search(vectors: Tensor, books: Sequence[Tensor]) -> Tensor:
    """Runs the linked search in the plain way: gathers each vector's candidates and squares the differences."""
    path, residual = torch.zeros(len(vectors), dtype=torch.long, device=vectors.device), vectors
    for book in books:
        distances = (residual[:, None] - book[path]).square().sum(-1)
        path = path * book.shape[1] + distances.argmin(1)
        residual = residual - book.view(-1, book.shape[2])[path]
    return path


def training(*, batch: int = 64, steps: int = 40) -> Iterator[Comparison]:
    """Compares a step of `fit` with a bare loop over the same model and batch: the cost of loop, data and logging."""
    process, config = accelerator("auto"), FitConfig(steps=steps, batch_size=batch)
    images = ImageRows(open_images("emoji", height=32, width=32, channels=3), split="train", flips=True)
    with tempfile.TemporaryDirectory(prefix="smalti-benchmark-") as folder:
        path = Path(folder) / "latents.h5"
        write_random_latents(path, rows=4096, level=Level(8, 8, (8, 8, 8)))
        tokenizer, network = HRVQ(HRVQConfig()), Hourglass(HourglassConfig())
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
                    Variant("smalti.training.loop", partial(_fit, process, model, objective, data, config)),
                    Variant(
                        "limit: forward, backward, optimizer",
                        partial(_bare_loop, process, objective, data, config),
                        target=1 / LARGEST_OVERHEAD,
                    ),
                ),
            )


def group_norm(*, batch: int = 16, channels: int = 32, side: int = 64) -> Iterator[Comparison]:
    """Compares GroupNorm and its gradients on channels-last maps, as VQ-GAN's first stage has them, with torch's.

    On the CPU, since on other devices smalti uses torch's.
    """
    dtype = torch.bfloat16 if resolve("auto", torch.device("cpu")) == "bf16" else torch.float32
    shape = (batch, channels, side, side)
    maps, gradient = (torch.randn(shape).to(dtype, memory_format=torch.channels_last) for _ in range(2))
    ours, theirs = GroupNorm(32, channels), nn.GroupNorm(32, channels)

    def pass_through(norm: nn.Module) -> tuple[Tensor, ...]:
        x = maps.detach().requires_grad_()
        return torch.autograd.grad(norm(x), (x, *norm.parameters()), gradient)

    yield Comparison(
        f"GroupNorm and its gradients, {batch} maps of {side}×{side} with {channels} channels, 32 groups",
        (
            Variant("smalti", partial(pass_through, ours)),
            Variant("torch", partial(pass_through, theirs)),
            Variant("limit: copying the maps six times", lambda: [maps.clone() for _ in range(6)]),
        ),
    )


@dataclass
class _Clocked:
    """A dataset that records the time of each request for a batch: one per step, as long as no workers prefetch."""

    data: RowData
    times: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, rows: list[int]) -> Batch:
        synchronize()
        self.times.append(time.perf_counter())
        return self.data.__getitems__(rows)


def _fit(process: Accelerator, model: Checkpointed, objective: nn.Module, data: RowData, config: FitConfig) -> Measured:
    return timed_fit(process, model, [Phase("benchmark", objective, config.optimizer_of(objective))], data, config)


def timed_fit(
    process: Accelerator, model: Checkpointed, phases: Sequence[Phase], data: RowData, config: FitConfig
) -> Measured:
    """Returns the seconds per step of `fit`, without its start and the saving at its end."""
    clocked = _Clocked(data)
    with tempfile.TemporaryDirectory(prefix="smalti-benchmark-") as folder:
        fit(process, phases, clocked, config, model=model, run=Run(Path(folder), {}), what="benchmark")
    return _seconds_per_step(clocked.times)


def _bare_loop(process: Accelerator, objective: nn.Module, data: RowData, config: FitConfig) -> Measured:
    """Returns the seconds per step of a minimal training loop over one batch."""
    batch = {
        name: tensor.to(process.device) for name, tensor in data.__getitems__(list(range(config.batch_size))).items()
    }
    batch["seeds"] = row_seeds(0, batch["rows"])
    optimizer, times = config.optimizer_of(objective), []
    objective.train()
    for _ in range(config.steps):
        synchronize()
        times.append(time.perf_counter())
        with process.autocast():
            loss, _ = objective(batch)
        loss.backward()
        optimizer.step()
        objective.zero_grad()
    return _seconds_per_step(times)


def _seconds_per_step(times: Sequence[float]) -> Measured:
    """Returns the mean interval between the starts of the steps."""
    return Measured((times[-1] - times[0]) / (len(times) - 1))
