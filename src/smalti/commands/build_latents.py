"""Builds a latent set: encodes every image with a tokenizer, on any number of processes.

Images are decoded and encoded here, one block at a time. Finished blocks wait in
`latentsets/shards.py` until the file is complete.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from smalti.commands.model_paths import LATENTS, images_for, layer_name, layer_source, load_tokenizer
from smalti.core import locks
from smalti.core.codes import Codes
from smalti.core.devices import Device, autocast, device
from smalti.core.errors import UserError
from smalti.core.progress import bar
from smalti.core.provenance import command, versions
from smalti.images.decoding import to_float
from smalti.images.fitting import SMALLEST_CROP, TEN_CROP_SIDE, recorded_fit, ten_crops
from smalti.images.formats.opening import BadImageError
from smalti.images.image_set import ImageSet
from smalti.images.reading import Reading
from smalti.images.sources import local_paths
from smalti.latentsets.captions import digest_of_captions
from smalti.latentsets.conditions import ConditionSource
from smalti.latentsets.provenance import Provenance
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.shards import Job, Shards
from smalti.latentsets.summary import describe
from smalti.tokenizers.base import Tokenizer
from smalti.training.accelerator import LONGEST_WAIT, main_first
from smalti.training.batches import leave_interrupts

T = TypeVar("T")
Block: TypeAlias = tuple[int, Tensor, dict[int, str]]
"""A block's number, its images (uint8), each followed by its crops, and errors of images by their numbers."""

SIDES = ("channels", "height", "width")
MOST_CROPS = 1_000
MOST_WORKERS = 4  # default limit: each worker holds a few blocks of images in memory


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class BuildLatents:
    """Settings of `build_latents`."""

    tokenizer: str = "hrvq"
    """A trained tokenizer: a kind (read from runs/tokenizers/KIND), a folder, or a hub id."""
    layer: int | None = None
    """Layer whose codes are stored, counted from 1 at the image; only for hqa and hams [default: the top layer]."""
    images: str | None = None
    """`portraits` or `emoji` (embedded), a folder of images, tar or zip archives such as 'shards-{000..127}.tar', a
    list of paths (.csv, .txt), arrays (.npz), Parquet files, or a data set's hub id [default: the images that the
    tokenizer was trained on]."""
    reading: Reading = field(default_factory=Reading)
    caption_column: str | None = None
    """Column of the captions to store, also of `metadata.csv` or in the `.json` beside an image [default: the `.txt`
    files beside images in shards]."""
    conditions: str | None = None
    """Vectors to store, for priors with `--condition vector`: FILE.npy with a vector for each image, in their order; or
    `module:function`, a function of yours that receives uint8 images `(b, c, h, w)` and returns `(b, width)` floats.
    Mirror images and crops get their image's vector."""
    height: int | None = None
    """Height of the images in pixels [default: as trained]."""
    width: int | None = None
    """Width of the images in pixels [default: as trained]."""
    flips: bool = True
    """Also store the mirror image of every image, as a row of its own."""
    crops: int = 0
    """Random crops of every training image to store too, as rows of their own, against overfitting of small sets."""
    ten_crop: bool = False
    """Also store the four corners and the centre of every training image, instead of random --crops; with their mirror
    images these are the ten crops that some priors are trained on."""
    batch_size: int = 256
    """Rows that each process encodes at once, mirror images and crops included. Lower it if memory runs out. A
    stopped build repeats at most one batch for each process."""
    workers: int = field(default_factory=lambda: min(MOST_WORKERS, _cores()))
    """Processes that decode images for each encoding process; 0 decodes in the encoding process itself [default: one
    for each core, at most 4]."""
    device: Device = "auto"
    """Device that encodes the images."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the networks; the codebook search is always fp32. Choose bf16 for speed on recent GPUs: a few codes
    then differ from those of fp32, and the latent set records it."""
    out: Path | None = None
    """The file to write [default: runs/latents/KIND.h5, or KIND-layer-N.h5 with --layer N]."""
    overwrite: bool = False
    """Replace an existing file. Without it, only a latent set of the same tokenizer and images is replaced."""

    @property
    def crops_per_image(self) -> int:
        """The number of crops of every training image, without mirror images."""
        return len(ten_crops()) if self.ten_crop else self.crops


def build_latents(config: BuildLatents) -> Path:
    """Encodes every image and stores the codes; returns the file.

    A file that already holds exactly these codes is left as it is. Several processes share the work
    under `accelerate launch` or `torchrun`. Finished blocks survive every kind of stop, `kill -9`
    included: the same call resumes from them, with any number of processes. Codes are computed in
    float32 unless the config sets bf16, so that they do not depend on the device's preferred
    precision.

    Raises:
        UserError: for an unsuitable tokenizer or unsuitable images, if the file is something else or
            another process writes it, or if the disk is full. The file is then unchanged.
    """
    if config.batch_size < 1 or config.workers < 0:
        raise UserError(
            f"--batch-size must be at least 1 and --workers 0, not {config.batch_size} and {config.workers}"
        )
    if not 0 <= config.crops <= MOST_CROPS:
        raise UserError(f"--crops must be from 0 to {MOST_CROPS}, not {config.crops}")
    if config.crops and config.ten_crop:
        raise UserError("--crops and --ten-crop are two choices of crops; leave one out")
    wanted = device(config.device)
    process = PartialState(cpu=wanted.type == "cpu", timeout=LONGEST_WAIT)
    own_device = process.device  # with several GPUs, each process has its own
    encoding_device = own_device if own_device is not None and own_device.type == wanted.type else wanted
    tokenizer_source = layer_source(config.tokenizer, config.layer)
    tokenizer = load_tokenizer(tokenizer_source).to(encoding_device)
    asked = (config.tokenizer, config.images, config.height, config.width, config.reading, config.caption_column)
    images = main_first(process, lambda: images_for(tokenizer, *asked, shown=process.is_main_process))
    captions = images.captions()
    one = torch.zeros(1, *(images.preprocessing[side] for side in SIDES), device=encoding_device)
    blank = one.int() if images.preprocessing.get("image_depth") == 16 else one.byte()
    conditions = ConditionSource(config.conditions, len(images), blank) if config.conditions else None
    name = tokenizer.kind if config.layer is None else f"{tokenizer.kind}-{layer_name(config.layer)}"
    path = config.out or LATENTS / f"{name}.h5"
    if config.crops_per_image and recorded_fit(images.preprocessing) == "pad":
        raise UserError("crops would cut into white borders; leave them out, or train the tokenizer with another --fit")
    crops = {"crops": config.crops, "smallest_crop": SMALLEST_CROP} if config.crops else {}
    crops |= {"ten_crop_side": TEN_CROP_SIDE} if config.ten_crop else {}
    other = {} if config.precision == "fp32" else {"precision": config.precision}
    other |= {"captions_digest": digest_of_captions(captions)} if captions else {}
    provenance = Provenance(
        tokenizer_kind=tokenizer.kind,
        tokenizer_config=dataclasses.asdict(tokenizer.config),
        tokenizer_digest=tokenizer.digest(),
        tokenizer_source=tokenizer_source,
        image_source=images.source,
        image_fingerprint=images.fingerprint,
        preprocessing={**images.preprocessing, "flips": config.flips, **crops, **other},
        label_names=images.label_names,
        condition_source=conditions.source if conditions else "",
        command=command(),
    )
    job = job_of(tokenizer, images, path, provenance, config, conditions)
    encode(tokenizer, images, job, provenance, config, process, conditions, captions)
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
    conditions: ConditionSource | None = None,
    captions: Sequence[str] | None = None,
) -> None:
    """Encodes opened images with a tokenizer that is on its device, and writes the finished file."""
    main, with_bad = process.is_main_process, config.reading.on_bad_image == "raise"
    checks = {"inputs": local_paths(provenance.image_source), "overwrite": config.overwrite, "required": True}
    claim = locks.claim([job.path], **checks, is_own=lambda path: provenance.is_rebuild_of(_provenance_of(path)))
    with ExitStack() as stack, Shards(job, process=process.process_index) as shards:
        _on_all_processes(process, lambda: stack.enter_context(claim) if main else None)
        stale = _on_all_processes(process, lambda: shards.claim() if main else None)
        before = _provenance_of(job.path)
        finished = before is not None and provenance.is_met_by(before) and not (with_bad and before.skipped)
        # every process lists the missing blocks before any process writes one
        missing = _on_all_processes(process, lambda: shards.missing(with_bad=with_bad), shards)
        if finished:
            process.print(f"{job.path} already holds these codes.")
            if main:
                shards.discard()
            return
        if stale:
            process.print(f"Discarding the blocks of an earlier build with another {stale}.")
        _on_all_processes(process, lambda: shards.require_room(len(missing)) if main else None, shards)
        share = missing[process.process_index :: process.num_processes]
        try:
            arguments = (tokenizer, images, shards, share, config, process, conditions)
            _on_all_processes(process, lambda: _encode(*arguments), shards)
        except KeyboardInterrupt:
            process.print("\nFinished blocks are kept: run the same command to resume.")
            raise
        columns = {"labels": images.labels, "source_ids": images.source_ids, "held_out": images.held_out}
        merge = partial(shards.merge, provenance, captions=captions, **columns)
        _on_all_processes(process, lambda: merge() if main else None, shards)


def job_of(
    tokenizer: Tokenizer,
    images: ImageSet,
    path: Path,
    provenance: Provenance,
    config: BuildLatents,
    conditions: ConditionSource | None = None,
) -> Job:
    """Divides the images into blocks, with a key of everything that decides their codes.

    Raises:
        UserError: if the tokenizer cannot encode images of this size.
    """
    encoding_device = _device_of(tokenizer)
    blank = torch.zeros(1, *(images.preprocessing[side] for side in SIDES), device=encoding_device)
    with torch.no_grad():
        codes = tokenizer.encode(blank)
    return Job(
        path,
        tokenizer.layout.resized([(grid.shape[-2], grid.shape[-1]) for grid in codes]),
        images=len(images),
        block_images=max(1, config.batch_size // ((1 + config.crops_per_image) * (1 + config.flips))),
        flips=config.flips,
        crops=config.crops_per_image,
        condition_width=conditions.width if conditions else 0,
        key={
            "tokenizer_digest": provenance.tokenizer_digest,
            "image_fingerprint": provenance.image_fingerprint,
            "preprocessing": provenance.preprocessing,
            "device": encoding_device.type,
            "software": versions(),
            **({"condition_source": conditions.source} if conditions else {}),
        },
    )


def _device_of(tokenizer: Tokenizer) -> torch.device:
    return next(tokenizer.parameters()).device


def _on_all_processes(process: PartialState, work: Callable[[], T], claimed: Shards | None = None) -> T:
    """Runs `work` on every process and waits for all; an error on one process is raised on all.

    So all processes stop together. After an error, `claimed` is abandoned: other processes that
    encode into its folder stop at their next block.
    """
    result, failure = None, None
    try:
        result = work()
    except (UserError, OSError) as error:
        failure = error
        if claimed:
            claimed.abandon()
    failures = [each for each in gather_object([failure]) if each]
    if failures:
        raise failures[0]
    return result  # pyright: ignore[reportReturnType] - None only if `work` returned None


@torch.no_grad()
def _encode(
    tokenizer: Tokenizer,
    images: ImageSet,
    shards: Shards,
    share: list[int],
    config: BuildLatents,
    process: PartialState,
    conditions: ConditionSource | None,
) -> None:
    """Encodes this process's `share` of the missing blocks."""
    job = shards.job
    several = process.num_processes > 1  # the bar then counts the first process's share alone
    progress = bar(
        what=f"encoding (process 1 of {process.num_processes})" if several else "encoding",
        total=len(share) if several else job.blocks,
        initial=0 if several else job.blocks - len(share),
        unit="block",
        shown=process.is_main_process,
    )
    encoding_device = _device_of(tokenizer)
    with progress, autocast(encoding_device, config.precision):
        for block, pixels, bad in decoded(images, job, share, config, encoding_device):
            if shards.abandoned:
                return
            if bad and config.reading.on_bad_image == "raise":
                raise BadImageError(f"{bad[min(bad)]}, or leave out such images with --on-bad-image skip")
            vectors = conditions(job.images_of(block), pixels[:: 1 + job.crops]) if conditions else None
            shards.append(block, encode_block(tokenizer, pixels, flips=job.flips), bad, vectors)
            progress.update()


def encode_block(tokenizer: Tokenizer, pixels: Tensor, *, flips: bool) -> Codes:
    """Returns the codes of uint8 images; with `flips`, each image is followed by its mirror image."""
    batch = to_float(pixels)
    return tokenizer.encode(torch.stack([batch, batch.flip(-1)], 1).flatten(0, 1) if flips else batch)


def decoded(
    images: ImageSet, job: Job, blocks: list[int], config: BuildLatents, device: torch.device
) -> Iterator[Block]:
    """Yields the blocks in the given order, decoded by worker processes and moved to the device."""
    loader = DataLoader(
        _Blocks(images, job, None if config.ten_crop else config.crops),
        batch_size=None,
        sampler=blocks,
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_interrupts,
    )
    for block, pixels, bad in loader:
        yield block, pixels.to(device, non_blocking=True), bad


class _Blocks(Dataset):
    """Decoded blocks of images. Errors are returned as text: an exception of a worker would arrive as a traceback."""

    def __init__(self, images: ImageSet, job: Job, crops: int | None) -> None:
        self.images, self.job, self.crops = images, job, crops  # None for the ten crops

    def __getitem__(self, block: int) -> Block:
        bad: dict[int, str] = {}
        numbers = self.job.images_of(block)
        pixels = self.images.pixels(numbers, bad=bad)
        if self.job.crops:
            pixels = torch.cat([pixels.unsqueeze(1), self.images.crops(numbers, self.crops)], 1).flatten(0, 1)
        return block, pixels, bad


def _provenance_of(path: Path) -> Provenance | None:
    """Returns the provenance of a latent set; None for any other file, or if there is none."""
    if not path.exists():  # otherwise it could be a hub id
        return None
    try:
        return LatentSet(path).provenance
    except UserError:
        return None
