"""What the benchmark compares: for each hot path our way, the naive one, a peer, and the limit. No clocks but one.

Every section is a generator: what it makes on the disk goes when it is exhausted or closed.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from smalti.checkpoint import Checkpointed
from smalti.codes import Layout, Level
from smalti.devices import Precision, accelerator, autocast, best_device
from smalti.fit import fit
from smalti.fit_config import FitConfig, Phase
from smalti.images import ImageRows, open_images
from smalti.latentsets.format import Provenance
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.rows import LatentRows
from smalti.latentsets.writer import LatentSetWriter
from smalti.priors.hourglass import Hourglass, HourglassConfig
from smalti.priors.samplers import SundaeSampling, sample_sundae
from smalti.priors.sundae import Sundae, SundaeConfig
from smalti.randomness import row_seeds
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

DEMONSTRATION = HourglassConfig()


class Seconds(float):
    """What a way returns that holds its own clock, because the work has a start and an end that do not count."""


@dataclass(frozen=True)
class Way:
    """One way to do the work.

    Attributes:
        name: for the table.
        work: does it. What it returns is for tests, unless it is `Seconds`.
        units: how many units (batches, steps) one call does.
        target: how many times slower than ours this must be; None where nothing is promised.
    """

    name: str
    work: Callable[[], Any]
    units: int = 1
    target: float | None = None


@dataclass(frozen=True)
class Comparison:
    """One hot path: our way first, then the others."""

    path: str
    ways: Sequence[Way]


def synchronize() -> None:
    """Waits until the device has done what it was given."""
    if best_device().type == "cuda":
        torch.cuda.synchronize()


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


def latents(*, rows: int = 2**18, side: int = 16, batch: int = 256, batches: int = 50) -> Iterator[Comparison]:
    """Random batches of a latent set beside the same rows read by numpy and by h5py."""
    with synthetic_latents(rows, side) as path:
        latent_set = LatentSet(path)
        mapped, resident = LatentRows(latent_set, split="all"), LatentRows(latent_set, split="all").to(best_device())
        draw = np.random.default_rng(0)
        wanted = [draw.permutation(rows)[:batch].tolist() for _ in range(batches)]
        with h5py.File(path, "r") as file:
            stored = file["codes/0"]
            assert isinstance(stored, h5py.Dataset)
            bare = np.memmap(path, stored.dtype, "r", stored.id.get_offset(), stored.shape)

            def every(read: Callable[[list[int]], Any]) -> Callable[[], list[Any]]:
                return lambda: [read(numbers) for numbers in wanted]

            def one_by_one(numbers: list[int]) -> Tensor:
                return torch.from_numpy(np.stack([stored[number] for number in numbers]).astype(np.int64))

            yield Comparison(
                f"random batch of {batch} rows, {side}×{side} codes, {rows} rows",
                (
                    Way("smalti, memory map (with labels and row numbers)", every(mapped.__getitems__), batches),
                    Way("smalti, resident on the device", every(resident.__getitems__), batches),
                    Way("h5py, row by row", every(one_by_one), batches),
                    Way(
                        "limit: numpy.memmap",
                        every(lambda numbers: torch.from_numpy(bare[numbers].astype(np.int64))),
                        batches,
                    ),
                ),
            )


@contextmanager
def synthetic_latents(rows: int, side: int) -> Iterator[Path]:
    """A latent set of random codes of 8·8·8, in a temporary folder."""
    made_up = Provenance(
        tokenizer_kind="none",
        tokenizer_config={},
        tokenizer_digest="",
        tokenizer_source="",
        image_source="random",
        image_fingerprint="",
        preprocessing={},
    )
    with tempfile.TemporaryDirectory(prefix="smalti-benchmark-") as folder:
        path = Path(folder) / "latents.h5"
        with LatentSetWriter(path, Layout((Level(side, side, (8, 8, 8)),)), rows=rows, provenance=made_up) as writer:
            for start in range(0, rows, 2**14):
                ids = torch.arange(start, min(start + 2**14, rows))
                codes = torch.randint(512, (len(ids), side, side))
                writer.write(start, (codes,), torch.full_like(ids, -1), ids, torch.zeros(len(ids), dtype=torch.bool))
        yield path


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


def training(*, batch: int = 64, steps: int = 40) -> Iterator[Comparison]:
    """A step of `fit` beside a bare loop over the same model and batch: what the loop, data and logging add."""
    process, config = accelerator("auto"), FitConfig(steps=steps, batch_size=batch)
    images = ImageRows(open_images("emoji", height=32, width=32, channels=3), split="train", flips=True)
    with synthetic_latents(4096, 8) as path:
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


def _fit(process: Accelerator, model: Checkpointed, objective: nn.Module, data: RowData, config: FitConfig) -> Seconds:
    """Seconds a step of `fit`, from the first step to the last: without the start and the saving at the end."""
    clocked = _Clocked(data)
    with tempfile.TemporaryDirectory(prefix="smalti-benchmark-") as folder:
        phases = [Phase("benchmark", objective, config.optimizer_of(objective))]
        fit(process, phases, clocked, config, model=model, run=Run(Path(folder), {}), what="benchmark")
    return Seconds((clocked.asked[-1] - clocked.asked[0]) / (len(clocked.asked) - 1))


def _bare_loop(process: Accelerator, objective: nn.Module, data: RowData, config: FitConfig) -> Seconds:
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
    return Seconds((asked[-1] - asked[0]) / (len(asked) - 1))


def random_codes(network: Hourglass, batch: int) -> Tensor:
    """Codes for a network of one level, on its device."""
    level, device = network.level, network.norm.weight.device
    return torch.randint(level.codebook_size, (batch, level.height, level.width), device=device)
