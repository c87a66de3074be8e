"""Blocks of images, decoded and encoded: in this process with worker processes that decode, or on an engine.

An engine, such as Ray Data or `datasets`, runs `EncodeBatches` on its own processes. `build.py` passes it the blocks
that are missing and keeps those that come back, so that a set built on an engine is the same.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from smalti.core.codes import Codes
from smalti.core.devices import Device, Precision, autocast, device
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageSet
from smalti.latentsets.building.jobs import Job
from smalti.latentsets.conditions import ConditionSource
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.quantizers.search import part_of_job
from smalti.training.batches import leave_signals

Block: TypeAlias = tuple[int, Tensor, dict[int, str]]
"""A block's number, its images (uint8), each followed by its crops, and errors of images by their numbers."""


@dataclass(frozen=True)
class Encoder:
    """Everything that encodes the blocks of a build. It can be pickled and sent to other processes.

    Attributes:
        tokenizer: The tokenizer.
        images: The images, which must be readable under the same paths where they are decoded.
        job: The division of the images into blocks.
        crops: The number of random crops of each image; None for the ten crops.
        device: The device that encodes; `auto` is the best one of the process.
        precision: The precision of the networks.
        conditions: The vectors of the images, if the set is to have any.
    """

    tokenizer: Tokenizer
    images: ImageSet
    job: Job
    crops: int | None
    device: Device
    precision: Precision
    conditions: ConditionSource | None = None

    def vectors(self, block: int, pixels: Tensor) -> Float[Tensor, "images v"] | None:
        """Returns the vectors of a block's images, given these with their crops."""
        if self.conditions is None:
            return None
        return self.conditions(self.job.images_of(block), pixels[:: 1 + self.job.crops])


class EncodeBatches:
    """Encodes batches of blocks, as a callable for `map_batches` of Ray Data and for `map` of `datasets`.

    A batch is a dict whose column `block` has numbers of blocks. The result has the same column, `record`, the packed
    blocks (`Job.pack`), and `bad`, the errors of images that could not be decoded, as JSON. Ray Data creates an object
    in each actor, `datasets` calls one in each process:

        rows.map_batches(EncodeBatches, fn_constructor_args=(encoder,), batch_size=1, concurrency=8, num_gpus=1)
        rows.map(EncodeBatches(encoder), batched=True, batch_size=1)

    The numbers of one batch decide nothing: each block is encoded by itself, so the codes are those of every other way
    to build the set.

    Args:
        encoder: What encodes, which `build_latents` passes to its engine.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Encodes the blocks of a batch; see the class."""
        encoder = self._encoder
        encoding_device = device(encoder.device)
        tokenizer = encoder.tokenizer.to(encoding_device).eval()
        decoded_blocks = _DecodedBlocks(encoder)
        result: dict[str, list[Any]] = {"block": [], "record": [], "bad": []}
        with torch.no_grad(), autocast(encoding_device, encoder.precision):
            for number in map(int, batch["block"]):
                _, pixels, bad = decoded_blocks[number]
                pixels = pixels.to(encoding_device)
                codes = encode_block(tokenizer, pixels, encoder.job)
                result["block"].append(number)
                result["record"].append(encoder.job.pack(number, codes, bad, encoder.vectors(number, pixels)))
                result["bad"].append(json.dumps(bad))
        return result


def results(batch: Mapping[str, Any]) -> Iterator[tuple[int, bytes, dict[int, str]]]:
    """Yields the blocks in a result of `EncodeBatches`: number, record, and errors of images by their numbers."""
    for block, record, bad in zip(batch["block"], batch["record"], batch["bad"], strict=True):
        yield int(block), bytes(record), {int(image): reason for image, reason in json.loads(str(bad)).items()}


def encode_block(tokenizer: Tokenizer, pixels: Tensor, job: Job) -> Codes:
    """Returns the codes of uint8 images of a job; if it has flips, each image is followed by its mirror image."""
    positions = sum(level.height * level.width for level in tokenizer.layout.levels)
    parts, size = [], max(1, job.most_rows // (1 + job.flips)) if job.most_rows else len(pixels)
    with part_of_job(job.images * job.rows_per_image * positions):
        for part in map(to_float, pixels.split(size)):
            rows = torch.stack([part, part.flip(-1)], 1).flatten(0, 1) if job.flips else part
            parts.append(tokenizer.encode(rows))
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def decoded(encoder: Encoder, blocks: Sequence[int], workers: int, device: torch.device) -> Iterator[Block]:
    """Yields the blocks in the given order, decoded by worker processes and moved to the device."""
    loader = DataLoader(
        _DecodedBlocks(encoder),
        batch_size=None,
        sampler=list(blocks),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals,
    )
    for block, pixels, bad in loader:
        yield block, pixels.to(device, non_blocking=True), bad


class _DecodedBlocks(Dataset):
    """Decoded blocks of images. Errors are returned as text: an exception of a worker would arrive as a traceback."""

    def __init__(self, encoder: Encoder) -> None:
        self._images, self._job, self._crops = encoder.images, encoder.job, encoder.crops

    def __getitem__(self, block: int) -> Block:
        bad: dict[int, str] = {}
        numbers = self._job.images_of(block)
        pixels = self._images.pixels(numbers, bad=bad)
        if self._job.crops:
            pixels = torch.cat([pixels.unsqueeze(1), self._images.crops(numbers, self._crops)], 1).flatten(0, 1)
        return block, pixels, bad
