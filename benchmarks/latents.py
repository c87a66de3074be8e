"""Benchmarks of latent sets: reading random rows, building a set, and the peak memory of building.

Each comparison uses files in a temporary folder, which is removed when the next comparison is requested.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from smalti.benchmarks.comparison import Comparison, Measured, Variant, in_mebibytes
from smalti.commands.build_latents import BuildLatents, job_of
from smalti.core.codes import Codes, Layout, Level
from smalti.core.devices import best_device
from smalti.encoding.build import encode
from smalti.encoding.encoder import Encoder, decoded, encode_block
from smalti.images.image_set import open_images
from smalti.images.sources import open_table
from smalti.images.splits import held_out
from smalti.latentsets.dataset import LatentRows
from smalti.latentsets.provenance import Provenance
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.table import to_dataset
from smalti.latentsets.writer import LatentSetWriter
from smalti.tokenizers.vq.hrvq import HRVQ, HRVQConfig

READ_TARGET = 0.9
"""Target: reading random batches takes at most 1 / 0.9 of the time of a bare `numpy.memmap`."""

SEVERAL_FILES_TARGET = 0.85
"""Target: reading random batches from many files takes at most 1 / 0.85 of the time of a bare `numpy.memmap`."""

BUILD_TARGET = 0.95
"""Target: building takes at most 1 / 0.95 of the time of decoding and encoding alone."""

MEMORY_ALLOWANCE_BYTES = 100 * 2**20
"""Memory that ten times the rows may add to the peak memory of building, besides the decoded images that are kept."""

BUILD_AND_PRINT_PEAK = """
import torch
from smalti.core.devices import peak_memory_bytes
from smalti.scripts.build_latents import main
main()
print(peak_memory_bytes(torch.device("cpu")))
"""

ROW_GROUP_ROWS = 1000

SMALL = HRVQConfig(widths=(16, 16), residual_blocks=1)
"""A tokenizer so small that memory that grows with the rows would dominate the peak."""


def latents(
    *,
    rows: int = 1_000_000,
    side: int = 16,
    batch: int = 256,
    batches: int = 50,
    files: int = 100,
    build_rows: int = 7_572,
    memory_rows: tuple[int, int] = (5_000, 50_000),
    config: HRVQConfig | None = None,
) -> Iterator[Comparison]:
    """Compares ways to read random batches, a build with a bare loop, and peak memory at two sizes."""
    for compare in (
        partial(reading, rows=rows, side=side, batch=batch, batches=batches),
        partial(reading_files, files=files, rows=rows // files, side=side, batch=batch, batches=batches),
        partial(building, rows=build_rows, config=config or HRVQConfig()),
        partial(memory, rows=memory_rows),
    ):
        with tempfile.TemporaryDirectory(prefix="smalti-benchmark-") as folder:
            yield compare(Path(folder))


def reading(folder: Path, *, rows: int, side: int, batch: int, batches: int) -> Comparison:
    """Compares ways to read random batches of codes below 1024, which FFHQ256 has."""
    path = folder / "latents.h5"
    write_random_latents(path, rows=rows, level=Level(side, side, (1024,)))
    latent_set = LatentSet(path)
    mapped, resident = LatentRows(latent_set, split="all"), LatentRows(latent_set, split="all").to(best_device())
    table = to_dataset(latent_set, cache=folder).select_columns("codes_0").with_format("numpy")
    stored: Any = h5py.File(path, "r")["codes/0"]
    bare = np.memmap(path, stored.dtype, "r", stored.id.get_offset(), stored.shape)
    rng = np.random.default_rng(0)
    requests = [rng.integers(0, rows, batch).tolist() for _ in range(batches)]

    def each(read: Callable[[list[int]], Any]) -> Callable[[], list[Any]]:
        return lambda: [read(numbers) for numbers in requests]

    def widen(codes: np.ndarray) -> Tensor:
        return torch.from_numpy(codes.astype(np.int64))

    return Comparison(
        f"random batch of {batch} rows, {side}×{side} codes, {rows} rows",
        (
            Variant("smalti, memory map (with labels and row numbers)", each(mapped.__getitems__), batches),
            Variant("smalti, resident on the device", each(resident.__getitems__), batches),
            Variant("h5py, row by row", each(lambda numbers: widen(np.stack([stored[n] for n in numbers]))), batches),
            Variant("datasets, Arrow table", each(lambda numbers: widen(table[numbers]["codes_0"])), batches),
            Variant("limit: numpy.memmap", each(lambda numbers: widen(bare[numbers])), batches, READ_TARGET),
        ),
    )


def reading_files(folder: Path, *, files: int, rows: int, side: int, batch: int, batches: int) -> Comparison:
    """Compares random batches from a set of many files, one file with the same codes, and a bare `numpy.memmap`."""
    level = Level(side, side, (1024,))
    for number in range(files):
        write_random_latents(folder / "set" / f"{number:05}.h5", rows=rows, level=level)
    several = LatentSet(folder / "set")
    plain = np.concatenate([codes for codes in several.codes_in_order(0, rows)])
    np.save(folder / "plain.npy", plain)
    write_random_latents(folder / "one.h5", rows=len(several), level=level, codes=plain)
    one, bare = LatentSet(folder / "one.h5"), np.load(folder / "plain.npy", mmap_mode="r")
    rng = np.random.default_rng(0)
    requests = [rng.integers(0, len(several), batch).tolist() for _ in range(batches)]

    def each(read: Callable[[list[int]], Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: [read(numbers) for numbers in requests]

    return Comparison(
        f"random batch of {batch} rows, {side}×{side} codes, {files} files of {rows} rows",
        (
            Variant("smalti, all files", each(lambda numbers: several.read(0, numbers)), batches),
            Variant("smalti, one file", each(lambda numbers: one.read(0, numbers)), batches),
            Variant(
                "limit: numpy.memmap of one file",
                each(lambda numbers: torch.from_numpy(bare[numbers].astype(np.int64))),
                batches,
                SEVERAL_FILES_TARGET,
            ),
        ),
    )


def building(folder: Path, *, rows: int, config: HRVQConfig) -> Comparison:
    """Compares building a set of emoji and mirror images with a bare loop that only decodes and encodes them."""
    images = open_images(str(write_emoji(folder / "images.parquet", rows // 2)))
    settings, process, path = BuildLatents(), PartialState(), folder / "built.h5"
    tokenizer = HRVQ(config).to(best_device()).eval()
    job = job_of(tokenizer, images, path, empty_provenance(), settings, None, device_type=tokenizer.device.type)
    encoder = Encoder(tokenizer, images, job, settings.random_crops, settings.device, settings.precision)

    def build() -> LatentSet:
        path.unlink(missing_ok=True)
        encode(encoder, empty_provenance(), process, settings.workers, skips=False)
        return LatentSet(path)

    @torch.no_grad()
    def bare_loop() -> list[Codes]:
        loader = decoded(encoder, range(job.blocks), settings.workers, best_device())
        return [encode_block(tokenizer, pixels, job) for _, pixels, _ in loader]

    return Comparison(
        f"building, a row ({settings.batch_size} at once, {settings.workers} workers, {rows} in all)",
        (
            Variant("smalti", build, rows),
            Variant("limit: decoding, encoder and search alone", bare_loop, rows, BUILD_TARGET),
        ),
    )


def memory(folder: Path, *, rows: tuple[int, int]) -> Comparison:
    """Compares the peak resident memory of the build command at two sizes, each in its own process."""
    tokenizer = HRVQ(SMALL)
    tokenizer.save(folder / "tokenizer")

    def peak(rows: int, allowance_bytes: int = 0) -> Measured:
        images = write_emoji(folder / f"{rows}.parquet", rows // 2)
        flags = ["--tokenizer", folder / "tokenizer", "--images", images, "--out", folder / f"{rows}.h5"]
        command = [sys.executable, "-c", BUILD_AND_PRINT_PEAK, *map(str, flags)]
        environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache")}
        process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return Measured(int(process.stdout.splitlines()[-1]) + allowance_bytes)

    few, many = rows
    decoded_bytes = (many - few) // 2 * 3 * 32 * 32  # kept up to CACHE_BYTES; half of the rows are flips
    return Comparison(
        f"peak memory of building {many} rows",
        (
            Variant("smalti", lambda: peak(many)),
            Variant(
                f"limit: that of {few} rows, the other decoded images and 100 MiB",
                lambda: peak(few, MEMORY_ALLOWANCE_BYTES + decoded_bytes),
                target=1.0,
            ),
        ),
        readable=in_mebibytes,
        varies=False,
    )


def write_random_latents(path: Path, *, rows: int, level: Level, codes: np.ndarray | None = None) -> None:
    """Writes a latent set of the given codes, or random ones; each row has its own source image."""
    ids, flipped = torch.arange(rows), torch.zeros(rows, dtype=torch.bool)
    labels = torch.full_like(ids, -1)
    columns: dict[str, Any] = {"labels": labels, "source_ids": ids, "held_out": held_out(ids), "flipped": flipped}
    with LatentSetWriter(path, Layout((level,)), **columns, provenance=empty_provenance()) as writer:
        for start in range(0, rows, 2**14):
            count = min(2**14, rows - start)
            drawn = torch.randint(level.codebook_size, (count, *level.shape))
            part = drawn if codes is None else torch.from_numpy(codes[start : start + count].astype(np.int64))
            writer.write(start, (part,))


def write_emoji(path: Path, images: int) -> Path:
    """Writes the embedded emoji as Parquet, repeated as often as needed.

    The row groups have a common size, because Parquet readers hold a whole group in memory.
    """
    table = open_table("emoji").rows
    table.select([index % len(table) for index in range(images)]).select_columns("image").to_parquet(
        path, batch_size=ROW_GROUP_ROWS
    )
    return path


def empty_provenance() -> Provenance:
    """Returns the provenance of random codes."""
    return Provenance(
        tokenizer_kind="none",
        tokenizer_config={},
        tokenizer_digest="",
        tokenizer_source="",
        image_source="random",
        image_fingerprint="",
        preprocessing={},
    )
