"""A latent set in the making: finished blocks in a folder beside its place, until all are there and become the file.

A block is a fixed run of images, so its codes do not depend on which process encodes it or how many there are. Each
process appends the blocks that it finishes to a shard of its own: records of one size, each with a checksum. A record
that a kill or a full disk cut short is not finished, in whatever order the system wrote its pages; and no two processes
write to one file, which network file systems do not bear. How the file itself is written: `writer.py`.
"""

import errno
import json
import os
import shutil
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock, SoftFileLock, Timeout
from jaxtyping import Bool, Int64
from torch import Tensor

from smalti.core.codes import Codes, Layout
from smalti.core.errors import UserError
from smalti.core.files import write_json
from smalti.core.progress import SLOW_SECONDS, bar
from smalti.latentsets.format import Provenance, level_bytes, number_sources, stored_dtype
from smalti.latentsets.writer import LatentSetWriter, room

KEY_NAME, ABANDONED_NAME = "key.json", "abandoned"


@dataclass(frozen=True)
class Job:
    """What is to be encoded, and how it is cut into blocks.

    Attributes:
        path: where the latent set will be.
        layout: of the codes of one row.
        images: how many.
        block_images: how many make up a block; the last may be shorter.
        flips: whether each image is two rows, the second its mirror image.
        key: whatever decides the codes, JSON values. Blocks made under another key are never used.
    """

    path: Path
    layout: Layout
    images: int
    block_images: int
    flips: bool
    key: dict[str, Any]

    @property
    def rows_per_image(self) -> int:
        """1, or 2 with flips."""
        return 1 + self.flips

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return -(-self.images // self.block_images)

    def images_of(self, block: int) -> range:
        """The images that one block is made of."""
        return range(block * self.block_images, min((block + 1) * self.block_images, self.images))


class Shards:
    """The finished blocks of a job, on disk. One process, the main one, claims the folder and merges; all append.

    The system releases the locks when their process ends, also after `kill -9`.

    Args:
        job: what is built.
        process: number of this process; 0 is the main one.
    """

    def __init__(self, job: Job, *, process: int = 0) -> None:
        self.job, self.process = job, process
        self.folder = job.path.with_name(f".{job.path.name}.building")
        grids = [
            (f"codes/{index}", stored_dtype(level), (job.block_images * job.rows_per_image, *level.shape))
            for index, level in enumerate(job.layout.levels)
        ]
        self.record = np.dtype([("checksum", "<u4"), ("block", "<i8"), ("kept", "?", (job.block_images,)), *grids])
        self._lock: FileLock | None = None
        self._shard: BinaryIO | None = None

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._close()

    def claim(self) -> str | None:
        """Makes the folder this builder's, by the main process before any other looks. Stale blocks are thrown away.

        Returns:
            The name of the first thing in the key for which blocks of an earlier build are stale, if any.

        Raises:
            UserError: if another process builds the same file.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        (self.folder / ABANDONED_NAME).unlink(missing_ok=True)
        described, wanted = self.folder / KEY_NAME, {**self._shape(), **self.job.key}
        before = json.loads(described.read_text()) if described.exists() else {}
        changed = sorted(name for name in {*before, *wanted} if before.get(name) != wanted.get(name))
        if changed:  # blocks go before the new key comes: a kill in between must not leave them beside it
            for stale in (*self.folder.glob("*.shard"), *self.folder.glob("*.skipped")):
                stale.unlink()
            write_json(described, wanted)
        return changed[0] if before and changed else None

    def missing(self, *, with_bad: bool = False) -> list[int]:
        """The blocks not finished, ascending; with those, if asked, that lack an image. Reads every shard."""
        images = self.job.images_of
        there = [b for b, place in self._scan().items() if not with_bad or place.kept.sum() == len(images(b))]
        return sorted({*range(self.job.blocks)} - {*there})

    def require_room(self, blocks: int) -> None:
        """Tells of a full disk before the work, not after it.

        Raises:
            UserError: if the disk has no room for so many more blocks and the file.
        """
        rows = self.job.images * self.job.rows_per_image
        needed = blocks * self.record.itemsize + sum(level_bytes(level, rows) for level in self.job.layout.levels)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            sizes = f"{needed / 2**20:.1f} MiB while it is built, but {free / 2**20:.1f} MiB are free"
            raise UserError(f"no room for {self.job.path}: it takes {sizes}; free some, then do the same again")

    def append(self, block: int, codes: Codes, bad: Mapping[int, str]) -> None:
        """Adds a finished block to this process's shard.

        Args:
            block: its number.
            codes: of its rows; those of bad images do not count.
            bad: what is wrong with images that could not be decoded, by their number in the job.

        Raises:
            UserError: for codes outside the layout, another process at the same shard, or a full disk.
        """
        self.job.layout.check(codes)
        images = self.job.images_of(block)
        record = np.zeros((), self.record)
        record["block"] = block
        record["kept"][: len(images)] = [image not in bad for image in images]
        for index, grid in enumerate(codes):
            assert len(grid) == len(images) * self.job.rows_per_image
            record[f"codes/{index}"][: len(grid)] = grid.cpu().numpy()
        record["checksum"] = _checksum(record)
        with room(self.job.path):
            if bad:
                with self._file("skipped").open("a") as notes:
                    # The line ends come first: what a kill cuts short spoils no line but its own.
                    notes.writelines("\n" + json.dumps({"row": row, "reason": bad[row]}) for row in sorted(bad))
            self._shard = self._shard or self._open_shard()
            rest = memoryview(record.tobytes())
            while rest:
                rest = rest[self._shard.write(rest) :]

    def abandon(self) -> None:
        """Tells the other processes to stop at their next block; this one failed."""
        (self.folder / ABANDONED_NAME).touch()

    @property
    def abandoned(self) -> bool:
        """Whether a process failed."""
        return (self.folder / ABANDONED_NAME).exists()

    def merge(
        self,
        provenance: Provenance,
        *,
        labels: Int64[Tensor, " n"],
        source_ids: Int64[Tensor, " n"],
        held_out: Bool[Tensor, " n"],
    ) -> None:
        """Writes the file from the blocks, all finished, and removes the folder. Done by the main process.

        Images that could not be decoded are left out; the rest keep their order.

        Args:
            provenance: without the images skipped, which are added.
            labels: of each image, -1 for none.
            source_ids: of each image, any numbers.
            held_out: whether training must not see the image.

        Raises:
            UserError: if no image could be decoded, or the disk is full: the blocks then stay for another try.
        """
        places, job = self._scan(), self.job
        kept = torch.from_numpy(np.concatenate([places[block].kept for block in range(job.blocks)])[: job.images])
        if not kept.any():
            raise UserError(f"{job.path} was not written: none of the {job.images} images can be decoded")
        numbered = torch.from_numpy(number_sources(source_ids[kept].numpy()))
        of_images = (labels[kept], numbered, held_out[kept])
        labels, ids, out = (column.repeat_interleave(job.rows_per_image) for column in of_images)
        columns = {"labels": labels, "source_ids": ids, "held_out": out}
        flipped = torch.arange(len(labels)) % job.rows_per_image == 1
        provenance = replace(provenance, skipped=self._skipped(kept))
        with LatentSetWriter(job.path, job.layout, **columns, flipped=flipped, provenance=provenance) as writer:
            start = 0
            for block in bar(range(job.blocks), what="merging", unit="block", delay_seconds=SLOW_SECONDS):
                codes = self._codes(places[block])
                writer.write(start, codes)
                start += len(codes[0])
        self.discard()

    def discard(self) -> None:
        """Removes the folder."""
        if os.name == "nt":  # Windows does not remove open files
            self._close()
        shutil.rmtree(self.folder)

    def _close(self) -> None:
        """Closes the shard and releases the lock."""
        if self._shard:
            self._shard.close()
        if self._lock:
            self._lock.release(force=True)
        self._shard = self._lock = None

    def _shape(self) -> dict[str, Any]:
        job = self.job
        shape = {"images": job.images, "block_images": job.block_images, "flips": job.flips}
        return {"layout": job.layout.to_json(), **shape}

    def _file(self, suffix: str) -> Path:
        return self.folder / f"{self.process:05}.{suffix}"

    def _take_lock(self) -> None:
        """Locks this process's number; the second process with the same number is refused."""
        if self._lock is None:
            self._lock = FileLock(self._file("lock"))
        try:
            self._lock.acquire(blocking=False)
            if isinstance(self._lock, SoftFileLock):  # filelock's fallback, which a killed process would leave behind
                self._lock.release(force=True)
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            if self._file("lock").exists():  # otherwise the builder before removed the folder meanwhile
                return
        except (Timeout, FileNotFoundError):
            pass
        except (OSError, NotImplementedError) as error:  # the latter is older versions of filelock's
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"{self.folder} cannot be locked ({reason}); give --out on another disk") from error
        raise UserError(f"{self.job.path} is being built by another process; wait until it is done, or stop it")

    def _open_shard(self) -> BinaryIO:
        """This process's shard, without the record that a kill may have cut short at its end."""
        if self._lock is None:
            self._take_lock()
        shard = self._file("shard").open("ab", buffering=0)
        shard.truncate(shard.tell() // self.record.itemsize * self.record.itemsize)
        return shard

    def _scan(self) -> dict[int, "_Place"]:
        """Where each finished block lies; of one done twice, where most of its images could be decoded."""
        places: dict[int, _Place] = {}
        for shard in sorted(self.folder.glob("*.shard")):
            with shard.open("rb") as file:
                while len(read := file.read(self.record.itemsize)) == self.record.itemsize:
                    record = np.frombuffer(read, self.record)[0]
                    if record["checksum"] == _checksum(record):
                        place = _Place(shard, file.tell() - self.record.itemsize, record["kept"].copy())
                        block = int(record["block"])
                        places[block] = max(place, places.get(block, place), key=lambda found: found.kept.sum())
        return places

    def _codes(self, place: "_Place") -> Codes:
        """The codes of one block's images, without those that could not be decoded."""
        with place.shard.open("rb") as file:
            file.seek(place.offset)
            record = np.frombuffer(file.read(self.record.itemsize), self.record)[0]
        rows = np.repeat(place.kept, self.job.rows_per_image)
        wide = [np.int64 if level.radices else np.float32 for level in self.job.layout.levels]
        return tuple(torch.from_numpy(record[f"codes/{i}"][rows].astype(dtype)) for i, dtype in enumerate(wide))

    def _skipped(self, kept: Bool[Tensor, " n"]) -> tuple[dict[str, Any], ...]:
        """What is wrong with each image that is not kept. A note may be there twice, of a block that was redone."""
        reasons: dict[int, str] = {}
        for notes in sorted(self.folder.glob("*.skipped")):
            for line in notes.read_text().splitlines():
                with suppress(json.JSONDecodeError):  # cut short
                    note = json.loads(line)
                    reasons[note["row"]] = note["reason"]
        rows = (~kept).nonzero().squeeze(1).tolist()
        return tuple({"row": row, "reason": reasons.get(row, "it could not be decoded")} for row in rows)


@dataclass(frozen=True)
class _Place:
    shard: Path
    offset: int
    kept: np.ndarray


def _checksum(record: np.ndarray | np.void) -> int:
    return zlib.crc32(record.tobytes()[4:])
