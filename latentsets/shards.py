"""Shards of an unfinished latent set: encoded blocks in a folder beside the target, which are merged into the file.

A block is a fixed range of images, so its codes do not depend on which process encodes it, or on the number of
processes. Each process appends its finished blocks to its own shard, as records of fixed size, each with a checksum. A
record that was cut short by a kill or a full disk has a wrong checksum, in whatever order the system wrote its pages,
and the block is encoded again when the build resumes. No two processes write to the same file, which network file
systems do not support. The merged file is written by `writer.py`.
"""

import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from smalti.core import locks
from smalti.core.codes import Codes, Layout
from smalti.core.errors import UserError
from smalti.core.files import write_json
from smalti.core.progress import SLOW_SECONDS, bar
from smalti.latentsets.format import (
    CONDITION_DTYPE,
    CONDITIONS,
    level_bytes,
    number_sources,
    stored_dtype,
)
from smalti.latentsets.provenance import Provenance
from smalti.latentsets.summary import size_text
from smalti.latentsets.writer import LatentSetWriter, reporting_full_disk

KEY_NAME, ABANDONED_NAME = "key.json", "abandoned"


@dataclass(frozen=True)
class Job:
    """A build: the images to encode, and their division into blocks.

    Attributes:
        path: The latent set's file.
        layout: The layout of one row's codes.
        images: The number of images.
        block_images: The number of images in a block; the last block may be shorter.
        flips: Whether each image, and each crop, makes two rows, the second of its mirror image.
        key: Everything that decides the codes, as JSON values. Blocks encoded under another key are never used.
        crops: The number of random crops of each image, which follow it as rows. Held-out images have none in the set.
        condition_width: Numbers in the vector of each image, which all of its rows get; 0 for none.
    """

    path: Path
    layout: Layout
    images: int
    block_images: int
    flips: bool
    key: dict[str, Any]
    crops: int = 0
    condition_width: int = 0

    @property
    def rows_per_image(self) -> int:
        """The rows of each training image: itself and its crops, twice as many with flips."""
        return (1 + self.crops) * (1 + self.flips)

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return -(-self.images // self.block_images)

    def images_of(self, block: int) -> range:
        """Returns the images of one block."""
        return range(block * self.block_images, min((block + 1) * self.block_images, self.images))


class Shards:
    """The finished blocks of a job, on disk. All processes append; only the main process claims the folder and merges.

    The caller locks the latent set's file. Every process also locks its shard, because a process may survive its killed
    main process. A disk without locks is refused.

    Args:
        job: What is built.
        process: The number of this process; 0 is the main process.
    """

    def __init__(self, job: Job, *, process: int = 0) -> None:
        self.job, self.process = job, process
        self.folder = job.path.with_name(f".{job.path.name}.building")
        grids = [
            (f"codes/{index}", stored_dtype(level), (job.block_images * job.rows_per_image, *level.shape))
            for index, level in enumerate(job.layout.levels)
        ]
        if job.condition_width:
            grids.append((CONDITIONS, CONDITION_DTYPE, (job.block_images, job.condition_width)))
        self.record = np.dtype([("checksum", "<u4"), ("block", "<i8"), ("kept", "?", (job.block_images,)), *grids])
        self._locked = ExitStack()
        self._shard: BinaryIO | None = None

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._close()

    def claim(self) -> str | None:
        """Creates the folder and deletes stale blocks. The main process calls it before all others start.

        Returns:
            The first entry of the key that differs from an earlier build, whose blocks were deleted; None if there
            is none.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / ABANDONED_NAME).unlink(missing_ok=True)
        key_file, key = self.folder / KEY_NAME, {**self._shape(), **self.job.key}
        before = json.loads(key_file.read_text()) if key_file.exists() else {}
        changed = sorted(name for name in {*before, *key} if before.get(name) != key.get(name))
        if changed:  # old blocks are deleted before the new key is written: a kill in between must not mix them
            for stale in (*self.folder.glob("*.shard"), *self.folder.glob("*.skipped")):
                stale.unlink()
            write_json(key_file, key)
        return changed[0] if before and changed else None

    def missing(self, *, with_bad: bool = False) -> list[int]:
        """Returns the unfinished blocks, ascending. With `with_bad`, blocks that lack an image count as unfinished.

        Every shard is read.
        """
        images = self.job.images_of
        finished = [b for b, record in self._scan().items() if not with_bad or record.kept.sum() == len(images(b))]
        return sorted({*range(self.job.blocks)} - {*finished})

    def require_room(self, blocks: int) -> None:
        """Checks the free disk space before the work starts.

        Raises:
            UserError: if the disk has no room for that many more blocks and the merged file.
        """
        rows = self.job.images * self.job.rows_per_image
        needed = blocks * self.record.itemsize + sum(level_bytes(level, rows) for level in self.job.layout.levels)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            sizes = f"{size_text(needed)} while it is built, but {size_text(free)} are free"
            raise UserError(f"no room for {self.job.path}: it takes {sizes}; free some space, then run it again")

    def append(
        self, block: int, codes: Codes, bad: Mapping[int, str], conditions: Float[Tensor, "images v"] | None = None
    ) -> None:
        """Appends a finished block to this process's shard.

        Args:
            block: The block's number.
            codes: The codes of its rows; those of bad images are ignored.
            bad: The reason for each image that could not be decoded, by its number in the job.
            conditions: The vectors of its images, if the job has any; those of bad images are ignored.

        Raises:
            UserError: if codes are outside the layout, another process uses the same shard, or the disk is full.
        """
        self.job.layout.check(codes)
        images = self.job.images_of(block)
        record = np.zeros((), self.record)
        record["block"] = block
        record["kept"][: len(images)] = [image not in bad for image in images]
        for index, grid in enumerate(codes):
            assert len(grid) == len(images) * self.job.rows_per_image
            record[f"codes/{index}"][: len(grid)] = grid.cpu().numpy()
        if conditions is not None:
            record[CONDITIONS][: len(images)] = conditions.numpy()
        record["checksum"] = _checksum(record)
        with reporting_full_disk(self.job.path):
            if bad:
                with self._file("skipped").open("a") as notes:
                    # Each note starts with its line break, so that a truncated note damages only its own line.
                    notes.writelines("\n" + json.dumps({"row": row, "reason": bad[row]}) for row in sorted(bad))
            self._shard = self._shard or self._open_shard()
            rest = memoryview(record.tobytes())
            while rest:
                rest = rest[self._shard.write(rest) :]

    def abandon(self) -> None:
        """Marks the build as failed, so that the other processes stop at their next block."""
        (self.folder / ABANDONED_NAME).touch()

    @property
    def abandoned(self) -> bool:
        """True if a process of this build failed."""
        return (self.folder / ABANDONED_NAME).exists()

    def merge(
        self,
        provenance: Provenance,
        *,
        labels: Int64[Tensor, " n"],
        source_ids: Int64[Tensor, " n"],
        held_out: Bool[Tensor, " n"],
        captions: Sequence[str] | None = None,
    ) -> None:
        """Merges the finished blocks into the latent set's file and removes the folder. Only the main process calls it.

        Images that could not be decoded are left out; the others keep their order.

        Args:
            provenance: The provenance without skipped images, which are added.
            labels: The label of each image, -1 for none.
            source_ids: Any number that identifies each image's source.
            held_out: Whether the image is held out from training.
            captions: The text of each image, "" for none; None for a set without captions.

        Raises:
            UserError: if no image could be decoded, or the disk is full. The blocks then stay for another attempt.
        """
        records, job = self._scan(), self.job
        kept = torch.from_numpy(np.concatenate([records[block].kept for block in range(job.blocks)])[: job.images])
        if not kept.any():
            raise UserError(f"{job.path} was not written: none of the {job.images} images can be decoded")
        numbered = torch.from_numpy(number_sources(source_ids[kept].numpy()))
        per_image = {"labels": labels[kept], "source_ids": numbered, "held_out": held_out[kept]}
        rows = self._kept_rows(held_out[kept])
        columns = {name: column.repeat_interleave(job.rows_per_image)[rows] for name, column in per_image.items()}
        flipped = (torch.arange(len(rows)) % (1 + job.flips) == 1)[rows]
        provenance = replace(provenance, skipped=self._skipped(kept))
        added: dict[str, Any] = {"provenance": provenance, "condition_width": job.condition_width}
        if captions is not None:
            image_of_row = kept.nonzero()[:, 0].repeat_interleave(job.rows_per_image)[rows]
            added["captions"] = [captions[image] for image in image_of_row.tolist()]
        with LatentSetWriter(job.path, job.layout, **columns, flipped=flipped, **added) as writer:
            start = 0
            for block in bar(range(job.blocks), what="merging", unit="block", delay_seconds=SLOW_SECONDS):
                codes, conditions = self._read(records[block], held_out[torch.tensor(job.images_of(block))])
                writer.write(start, codes, conditions)
                start += len(codes[0])
        self.discard()

    def discard(self) -> None:
        """Removes the folder with all shards."""
        if os.name == "nt":  # Windows does not remove open files
            self._close()
        shutil.rmtree(self.folder)

    def _close(self) -> None:
        """Closes the shard and releases the locks."""
        if self._shard:
            self._shard.close()
        self._shard = None
        self._locked.close()

    def _shape(self) -> dict[str, Any]:
        job = self.job
        shape = {"images": job.images, "block_images": job.block_images, "flips": job.flips}
        optional = {"crops": job.crops, "condition_width": job.condition_width}
        return {"layout": job.layout.to_json(), **shape, **{name: value for name, value in optional.items() if value}}

    def _file(self, suffix: str) -> Path:
        return self.folder / f"{self.process:05}.{suffix}"

    def _open_shard(self) -> BinaryIO:
        """Opens this process's shard for appending and truncates an incomplete record at its end, if there is one."""
        self._locked.enter_context(locks.writing(self._file("shard"), required=True))
        shard = self._file("shard").open("ab", buffering=0)
        shard.truncate(shard.tell() // self.record.itemsize * self.record.itemsize)
        return shard

    def _scan(self) -> dict[int, "_Record"]:
        """Locates the record of each finished block; of several, the one in which the most images were decoded."""
        records: dict[int, _Record] = {}
        for shard in sorted(self.folder.glob("*.shard")):
            with shard.open("rb") as file:
                while len(content := file.read(self.record.itemsize)) == self.record.itemsize:
                    values = np.frombuffer(content, self.record)[0]
                    if values["checksum"] == _checksum(values):
                        record = _Record(shard, file.tell() - self.record.itemsize, values["kept"].copy())
                        block = int(values["block"])
                        records[block] = max(record, records.get(block, record), key=lambda each: each.kept.sum())
        return records

    def _kept_rows(self, held_out: Bool[Tensor, " n"]) -> Bool[Tensor, " rows"]:
        """Marks the rows of images that go into the set: all but the crops of held-out images."""
        is_crop = torch.arange(self.job.rows_per_image) > self.job.flips
        return ~(held_out[:, None] & is_crop).flatten()

    def _read(self, record: "_Record", held_out: Bool[Tensor, " n"]) -> tuple[Codes, Float[Tensor, "rows v"] | None]:
        """Reads the codes and vectors of one block's rows in the set, without images that could not be decoded."""
        with record.shard.open("rb") as file:
            file.seek(record.offset)
            values = np.frombuffer(file.read(self.record.itemsize), self.record)[0]
        rows = np.repeat(record.kept, self.job.rows_per_image)
        rows[: len(held_out) * self.job.rows_per_image] &= self._kept_rows(held_out).numpy()
        dtypes = [np.int64 if level.radices else np.float32 for level in self.job.layout.levels]
        codes = tuple(torch.from_numpy(values[f"codes/{i}"][rows].astype(dtype)) for i, dtype in enumerate(dtypes))
        if not self.job.condition_width:
            return codes, None
        return codes, torch.from_numpy(np.repeat(values[CONDITIONS], self.job.rows_per_image, axis=0)[rows])

    def _skipped(self, kept: Bool[Tensor, " n"]) -> tuple[dict[str, Any], ...]:
        """Returns the reason for each image that is not kept. A block that was redone may have its notes twice."""
        reasons: dict[int, str] = {}
        for notes in sorted(self.folder.glob("*.skipped")):
            for line in notes.read_text().splitlines():
                with suppress(json.JSONDecodeError):  # a truncated note
                    note = json.loads(line)
                    reasons[note["row"]] = note["reason"]
        rows = (~kept).nonzero().squeeze(1).tolist()
        return tuple({"row": row, "reason": reasons.get(row, "it could not be decoded")} for row in rows)


@dataclass(frozen=True)
class _Record:
    """The location of a finished block's record, and which of its images could be decoded."""

    shard: Path
    offset: int
    kept: np.ndarray


def _checksum(record: np.ndarray | np.void) -> int:
    """Returns the CRC-32 of a record without its checksum field."""
    return zlib.crc32(record.tobytes()[4:])
