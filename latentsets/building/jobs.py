"""A build of a latent set: its images, divided into blocks and shards, the record of a block, and numbers of sources.

The records of finished blocks are kept in `blocks.py` until a file is written from them.
"""

import zlib
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor

from smalti.core.codes import Codes, Layout
from smalti.latentsets.hdf5.format import CONDITION_DTYPE, CONDITIONS, stored_dtype


@dataclass(frozen=True)
class Job:
    """A build: the images to encode, and their division into blocks.

    Attributes:
        path: The latent set's file, or the folder of its files.
        layout: The layout of one row's codes.
        images: The number of images.
        block_images: The number of images in a block; the last block may be shorter.
        flips: Whether each image, and each crop, makes two rows, the second of its mirror image.
        key: Everything that decides the codes, as JSON values. Blocks encoded under another key are never used.
        crops: The number of random crops of each image, which follow it as rows. Held-out images have none in the set.
        condition_width: Numbers in the vector of each image, which all of its rows get; 0 for none.
        shard_blocks: The number of blocks of each file of a set of several files; 0 for a set of one file.
        most_rows: The largest number of rows to encode at once; 0 for a block's.
    """

    path: Path
    layout: Layout
    images: int
    block_images: int
    flips: bool
    key: dict[str, Any]
    crops: int = 0
    condition_width: int = 0
    shard_blocks: int = 0
    most_rows: int = 0

    @property
    def rows_per_image(self) -> int:
        """The rows of each training image: itself and its crops, twice as many with flips."""
        return (1 + self.crops) * (1 + self.flips)

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return -(-self.images // self.block_images)

    @property
    def shards(self) -> list[range]:
        """The blocks of each file, in order."""
        step = self.shard_blocks or self.blocks
        return [range(start, min(start + step, self.blocks)) for start in range(0, self.blocks, step)]

    def shard_of(self, block: int) -> int:
        """Returns the number of the file that a block belongs to."""
        return block // self.shard_blocks if self.shard_blocks else 0

    def images_of(self, block: int) -> range:
        """Returns the images of one block."""
        return self.images_of_blocks(range(block, block + 1))

    def images_of_blocks(self, blocks: range) -> range:
        """Returns the images of adjacent blocks."""
        return range(blocks.start * self.block_images, min(blocks.stop * self.block_images, self.images))

    @property
    def record(self) -> np.dtype:
        """The dtype of a block's record."""
        grids = [
            (f"codes/{index}", stored_dtype(level), (self.block_images * self.rows_per_image, *level.shape))
            for index, level in enumerate(self.layout.levels)
        ]
        if self.condition_width:
            grids.append((CONDITIONS, CONDITION_DTYPE, (self.block_images, self.condition_width)))
        return np.dtype([("checksum", "<u4"), ("block", "<i8"), ("kept", "?", (self.block_images,)), *grids])

    def pack(
        self, block: int, codes: Codes, bad: Container[int], conditions: Float[Tensor, "images v"] | None = None
    ) -> bytes:
        """Returns the record of a finished block.

        Args:
            block: The block's number.
            codes: The codes of its rows; those of bad images are ignored.
            bad: The images that could not be decoded, by their number in the job.
            conditions: The vectors of its images, if the job has any; those of bad images are ignored.

        Raises:
            UserError: if codes are outside the layout.
        """
        self.layout.check(codes)
        images = self.images_of(block)
        record = np.zeros((), self.record)
        record["block"] = block
        record["kept"][: len(images)] = [image not in bad for image in images]
        for index, grid in enumerate(codes):
            assert len(grid) == len(images) * self.rows_per_image
            record[f"codes/{index}"][: len(grid)] = grid.cpu().numpy()
        if conditions is not None:
            record[CONDITIONS][: len(images)] = conditions.numpy()
        record["checksum"] = checksum(record)
        return record.tobytes()


class SourceNumbers:
    """Numbers the sources of a set in order of first appearance, while its images are added in order."""

    def __init__(self, source_ids: Int64[np.ndarray, " n"]) -> None:
        sources, self._dense = np.unique(source_ids, return_inverse=True)
        self._numbers = np.full(len(sources), -1)
        self._count = 0

    def add(self, images: Int64[np.ndarray, " k"]) -> Int64[np.ndarray, " sources"]:
        """Returns the numbers of the sources of some images, in order of first appearance among these."""
        sources, first = np.unique(self._dense[images], return_index=True)
        ordered = sources[np.argsort(first)]
        new = ordered[self._numbers[ordered] < 0]
        self._numbers[new] = np.arange(self._count, self._count + len(new))
        self._count += len(new)
        return self._numbers[ordered]


def checksum(record: np.ndarray | np.void) -> int:
    """Returns the CRC-32 of a record without its checksum field."""
    return zlib.crc32(record.tobytes()[4:])
