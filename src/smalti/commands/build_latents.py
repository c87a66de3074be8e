"""The boundary: a tokenizer's codes of every image, stored as a latent set, by any number of processes.

Images are decoded and encoded here, a block at a time; what finished blocks are kept in until the file is whole is
`latentsets/shards.py`.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from smalti.commands.model_paths import LATENTS, layer_name, load_tokenizer, of_layer
from smalti.core.codes import Codes
from smalti.core.devices import Device, autocast, device
from smalti.core.errors import UserError
from smalti.core.progress import bar
from smalti.core.provenance import command, versions
from smalti.images.decoding import BadImageError, to_float
from smalti.images.image_set import ImageSet, open_images
from smalti.images.splits import held_out
from smalti.latentsets.format import Provenance
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.shards import Job, Shards
from smalti.latentsets.summary import describe
from smalti.tokenizers.base import Tokenizer
from smalti.training.batches import leave_interrupts

T = TypeVar("T")
OnBadImage: TypeAlias = Literal["raise", "skip"]
Block: TypeAlias = tuple[int, Tensor, dict[int, str]]
"""Its number, its images (uint8), and what is wrong with those that could not be decoded, by their row."""

MOST_WORKERS = 4  # unless more are asked for: each holds a few blocks of images
LONGEST_WAIT = timedelta(days=30)  # for a slower process; the libraries' own, minutes, is for hung communication


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class BuildLatents:
    """How to build a latent set."""

    tokenizer: str = "hrvq"
    """A trained tokenizer: a kind (the one in runs/tokenizers/KIND), a folder, or a hub id."""
    layer: int | None = None
    """Of hqa and hams, the layer whose codes are stored [default: the top]."""
    images: str | None = None
    """`emoji` (embedded), a folder of images, Parquet files, or a data set's hub id [default: what the tokenizer was
    trained on]."""
    height: int | None = None
    """Height of the images in pixels, if not the tokenizer's own."""
    width: int | None = None
    """Width of the images in pixels, if not the tokenizer's own."""
    flips: bool = True
    """Store the mirror images too, as rows of their own."""
    on_bad_image: OnBadImage = "raise"
    """What to do about an image that cannot be decoded: stop and name it, or leave it out and record it in the file."""
    batch_size: int = 256
    """Rows encoded at once by each process, mirror images included: the block that a stopped build redoes."""
    workers: int = field(default_factory=lambda: min(MOST_WORKERS, _cores()))
    """Processes that decode images beside each encoding process; 0 decodes in between [default: as many as cores, but
    no more than 4]."""
    device: Device = "auto"
    """Where to encode."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the networks; the search of codebooks stays in fp32. bf16 is for hardware that is fast in it; it
    gives some codes other than those of fp32, so the set says so."""
    out: Path | None = None
    """The file [default: runs/latents/KIND.h5, and of a layer KIND-layer-N.h5]."""


def build_latents(config: BuildLatents) -> Path:
    """Encodes every image and stores the codes; returns the file. One that already holds exactly this is left as it is.

    The processes are those of `accelerate launch` or `torchrun`. Finished blocks survive anything, `kill -9` included:
    the same call, by any number of processes, goes on from them. Codes are computed in float32 unless bf16 is asked
    for, so that they do not depend on what precision a device is fast in.

    Raises:
        UserError: for a tokenizer or images that will not do, another builder of the same file, or a full disk. The
            file is then as it was.
    """
    if config.batch_size < 1 or config.workers < 0:
        raise UserError(
            f"--batch-size must be at least 1 and --workers 0, not {config.batch_size} and {config.workers}"
        )
    wanted = device(config.device)
    process = PartialState(cpu=wanted.type == "cpu", timeout=LONGEST_WAIT)
    of_process = process.device  # of several GPUs, its own
    where = of_process if of_process is not None and of_process.type == wanted.type else wanted
    tokenizer_source = of_layer(config.tokenizer, config.layer)
    tokenizer = load_tokenizer(tokenizer_source).to(where)
    with process.main_process_first():  # which fills the cache of hashes that the others read
        images = images_for(tokenizer, config.tokenizer, config.images, config.height, config.width)
    name = tokenizer.kind if config.layer is None else f"{tokenizer.kind}-{layer_name(config.layer)}"
    path = config.out or LATENTS / f"{name}.h5"
    precision = {} if config.precision == "fp32" else {"precision": config.precision}
    provenance = Provenance(
        tokenizer_kind=tokenizer.kind,
        tokenizer_config=dataclasses.asdict(tokenizer.config),
        tokenizer_digest=tokenizer.digest(),
        tokenizer_source=tokenizer_source,
        image_source=images.source,
        image_fingerprint=images.fingerprint,
        preprocessing={**images.preprocessing, "flips": config.flips, **precision},
        label_names=images.label_names,
        command=command(),
    )
    encode(tokenizer, images, job_of(tokenizer, images, path, provenance, config), provenance, config, process)
    if process.is_main_process:
        print(describe(LatentSet(path)))
    return path


def encode(
    tokenizer: Tokenizer,
    images: ImageSet,
    job: Job,
    provenance: Provenance,
    config: BuildLatents,
    process: PartialState,
) -> None:
    """The work itself, from opened images and a tokenizer on its device to the finished file."""
    with Shards(job, process=process.process_index) as shards:
        main = process.is_main_process
        stale = _in_step(process, lambda: shards.claim() if main else None)
        finished = _is_of(job.path, provenance, config.on_bad_image)
        with_bad = config.on_bad_image == "raise"  # what an earlier build skipped, this one names
        missing = _in_step(process, lambda: shards.missing(with_bad=with_bad), shards)  # all look before any writes
        if finished:
            process.print(f"{job.path} holds these codes already.")
            if main:
                shards.discard()
            return
        if stale:
            process.print(f"Blocks of an earlier build are thrown away: they are of another {stale}.")
        _in_step(process, lambda: shards.require_room(len(missing)) if main else None, shards)
        share = missing[process.process_index :: process.num_processes]
        try:
            _in_step(process, lambda: _encode(tokenizer, images, shards, share, config, process), shards)
        except KeyboardInterrupt:
            process.print("\nWhat is finished is kept: the same command goes on from there.")
            raise
        out = held_out(images.source_ids)
        columns = {"labels": images.labels, "source_ids": images.source_ids, "held_out": out}
        _in_step(process, lambda: shards.merge(provenance, **columns) if main else None, shards)


def job_of(tokenizer: Tokenizer, images: ImageSet, path: Path, provenance: Provenance, config: BuildLatents) -> Job:
    """What is to be done, in blocks.

    Raises:
        UserError: if the tokenizer cannot encode images of this size.
    """
    size, where = images.preprocessing, _device_of(tokenizer)
    with torch.no_grad():
        blank = tokenizer.encode(torch.zeros(1, size["channels"], size["height"], size["width"], device=where))
    return Job(
        path,
        tokenizer.layout.resized([(grid.shape[-2], grid.shape[-1]) for grid in blank]),
        images=len(images),
        block_images=max(1, config.batch_size // (1 + config.flips)),
        flips=config.flips,
        key={
            "tokenizer_digest": provenance.tokenizer_digest,
            "image_fingerprint": provenance.image_fingerprint,
            "preprocessing": provenance.preprocessing,
            "device": where.type,
            "software": versions(),
        },
    )


def _device_of(tokenizer: Tokenizer) -> torch.device:
    return next(tokenizer.parameters()).device


def images_for(tokenizer: Tokenizer, name: str, source: str | None, height: int | None, width: int | None) -> ImageSet:
    """Images as a tokenizer sees them: unless others are named, those that it was trained on, at its own size.

    Raises:
        UserError: if there are none, or the tokenizer, by its `name`, does not say on which it was trained.
    """
    source = source or tokenizer.provenance.get("image_source")
    if source is None:
        raise UserError(f"{name} does not say what images it was trained on; give --images")
    return open_images(
        source,
        height=height or tokenizer.config.height,
        width=width or tokenizer.config.width,
        channels=tokenizer.image_channels,
    )


def _in_step(process: PartialState, work: Callable[[], T], claimed: Shards | None = None) -> T:
    """Does the same on all processes and waits for all; what failed on one, all raise, so that they leave together.

    Those that work on a folder claimed before stop at their next block.
    """
    result, failure = None, None
    try:
        result = work()
    except (UserError, OSError) as error:
        failure = error
        if claimed:
            claimed.abandon()
    failures = [found for found in gather_object([failure]) if found]
    if failures:
        raise failures[0]
    return result  # pyright: ignore[reportReturnType] - None only where `work` gave None


@torch.no_grad()
def _encode(
    tokenizer: Tokenizer,
    images: ImageSet,
    shards: Shards,
    share: list[int],
    config: BuildLatents,
    process: PartialState,
) -> None:
    """Encodes this process's share of the blocks that are missing."""
    job = shards.job
    of = f" (process 1 of {process.num_processes})" if process.num_processes > 1 else ""
    progress = bar(
        what=f"encoding{of}",
        total=len(share) if of else job.blocks,
        initial=0 if of else job.blocks - len(share),
        unit="block",
        shown=process.is_main_process,
    )
    where = _device_of(tokenizer)
    with progress, autocast(where, config.precision):
        for block, pixels, bad in decoded(images, job, share, config, where):
            if shards.abandoned:
                return
            if bad and config.on_bad_image == "raise":
                raise BadImageError(f"{bad[min(bad)]}, or leave out such images with --on-bad-image skip")
            shards.append(block, encode_block(tokenizer, pixels, flips=job.flips), bad)
            progress.update()


def encode_block(tokenizer: Tokenizer, pixels: Tensor, *, flips: bool) -> Codes:
    """The codes of images, uint8; with flips each is followed by its mirror image."""
    batch = to_float(pixels)
    return tokenizer.encode(torch.stack([batch, batch.flip(-1)], 1).flatten(0, 1) if flips else batch)


def decoded(
    images: ImageSet, job: Job, blocks: list[int], config: BuildLatents, device: torch.device
) -> Iterator[Block]:
    """Blocks of images in the order asked for, decoded by workers, on their way to the device."""
    loader = DataLoader(
        _Blocks(images, job),
        batch_size=None,
        sampler=blocks,
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_interrupts,
    )
    for block, pixels, bad in loader:
        yield block, pixels.to(device, non_blocking=True), bad


class _Blocks(Dataset):
    """Errors come as text: what a worker raises arrives wrapped in its traceback."""

    def __init__(self, images: ImageSet, job: Job) -> None:
        self.images, self.job = images, job

    def __getitem__(self, block: int) -> Block:
        bad: dict[int, str] = {}
        return block, self.images.pixels(self.job.images_of(block), bad=bad), bad


def _is_of(path: Path, provenance: Provenance, on_bad_image: OnBadImage) -> bool:
    """Whether the set at `path` was made by the same tokenizer from the same images in the same way."""
    try:
        found = LatentSet(path).provenance
    except UserError:
        return False
    same = ("tokenizer_digest", "image_fingerprint", "preprocessing", "label_names")
    return all(getattr(found, name) == getattr(provenance, name) for name in same) and (
        on_bad_image == "skip" or not found.skipped
    )
