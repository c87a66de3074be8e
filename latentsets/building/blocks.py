"""The finished blocks of an unfinished latent set, in a folder beside the target, from which its files are written.

A block is a fixed range of images, so its codes do not depend on which process encodes it, or on the number of
processes. Each process appends its finished blocks to its own file, as records of fixed size, each with a checksum. A
record that was cut short by a kill or a full disk has a wrong checksum, in whatever order the system wrote its pages,
and the block is encoded again when the build resumes. No two processes write to the same file, which network file
systems do not support.

A set of several files is built shard by shard, each from a fixed range of blocks, which are deleted when it is written.
A set of one file is built in the same way, as its only shard. The files are written by `writer.py`.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from smalti.core import locks
from smalti.core.codes import Codes
from smalti.core.config import read_json
from smalti.core.errors import UserError
from smalti.core.files import sync, write_json
from smalti.core.progress import SLOW_SECONDS, bar
from smalti.latentsets.building.jobs import Job, SourceNumbers, checksum
from smalti.latentsets.hdf5.format import CONDITIONS, arrays_of, number_sources, read_header
from smalti.latentsets.hdf5.sharded import INDEX_NAME, write_index
from smalti.latentsets.provenance import Provenance, shortened
from smalti.latentsets.summary import size_text
from smalti.latentsets.writer import LatentSetWriter, reporting_full_disk

KEY_NAME, ABANDONED_NAME, SHARDS_NAME, REPLACED_NAME = "key.json", "abandoned", "shards", "replaced"
_SHARD = re.compile(r"\d{5,}\.h5")


class BlockStore:
    """The finished blocks of a job, on disk. All processes append; only the main process claims the folder and merges.

    The caller locks the latent set. Every process also locks its file of blocks, because a process may survive its
    killed main process. A disk without locks is refused.

    Args:
        job: What is built.
        process: The number of this process; 0 is the main process.
    """

    def __init__(self, job: Job, *, process: int = 0) -> None:
        self.job, self.process, self.record = job, process, job.record
        self.folder = job.path.with_name(f".{job.path.name}.building")
        self._open: dict[int, tuple[BinaryIO, ExitStack]] = {}  # the file of blocks of each shard, and its lock
        self._numbers: SourceNumbers | None = None

    def __enter__(self) -> "BlockStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def claim(self, *, with_bad: bool = False) -> str | None:
        """Creates the folder and deletes stale blocks. The main process calls it before all others start.

        With `with_bad`, finished shards that lack an image are deleted too.

        Returns:
            The first entry of the key that differs from an earlier build, whose blocks were deleted; or None.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / ABANDONED_NAME).unlink(missing_ok=True)
        key_file, key = self.folder / KEY_NAME, {**self._shape(), **self.job.key}
        before = read_json(key_file) if key_file.exists() else {}
        changed = sorted(name for name in {*before, *key} if before.get(name) != key.get(name))
        if changed:  # old blocks are deleted before the new key is written: a kill in between must not mix them
            self._delete_blocks("*")
            shutil.rmtree(self.folder / SHARDS_NAME, ignore_errors=True)
            write_json(key_file, key)
        if with_bad:
            for shard in self._finished():
                if read_header(self._shard_path(shard)).provenance.skipped:
                    self._shard_path(shard).unlink()  # and later ones count as unfinished too
        return changed[0] if before and changed else None

    def unfinished(self) -> list[int]:
        """Returns the shards that are still to be written, ascending. A set of one file is a single shard."""
        return sorted({*range(len(self.job.shards))} - {*self._finished()})

    def missing(self, shard: int = 0, *, with_bad: bool = False) -> list[int]:
        """Returns the unfinished blocks of a shard, ascending. With `with_bad`, also those that lack an image.

        The blocks of all processes are read.
        """
        images = self.job.images_of
        finished = [b for b, record in self._scan(shard).items() if not with_bad or record.kept.sum() == len(images(b))]
        return sorted({*self.job.shards[shard]} - {*finished})

    def require_room(self, blocks: int, shards: Sequence[int] = (0,)) -> None:
        """Checks the free disk space before the work starts.

        Raises:
            UserError: if the disk has no room for that many more blocks and the files of the given shards.
        """
        images = sum(len(self.job.images_of_blocks(self.job.shards[shard])) for shard in shards)
        rows = images * self.job.rows_per_image
        arrays = arrays_of(self.job.layout, rows, self.job.condition_width).values()
        needed = blocks * self.record.itemsize + sum(dtype.itemsize * math.prod(shape) for dtype, shape in arrays)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            sizes = f"{size_text(needed)} while it is built, but {size_text(free)} are free"
            raise UserError(f"no room for {self.job.path}: it takes {sizes}; free some space, then run it again")

    def append(
        self, block: int, codes: Codes, bad: Mapping[int, str], conditions: Float[Tensor, "images v"] | None = None
    ) -> None:
        """Appends a finished block to this process's file of blocks.

        Args:
            block: The block's number.
            codes: The codes of its rows; those of bad images are ignored.
            bad: The reason for each image that could not be decoded, by its number in the job.
            conditions: The vectors of its images, if the job has any; those of bad images are ignored.

        Raises:
            UserError: if codes are outside the layout, another process uses the same file, or the disk is full.
        """
        self.append_record(block, self.job.pack(block, codes, bad, conditions), bad)

    def append_record(self, block: int, record: bytes, bad: Mapping[int, str]) -> None:
        """Appends a block that was packed elsewhere (`Job.pack`); see `append`."""
        shard = self.job.shard_of(block)
        with reporting_full_disk(self.job.path):
            if bad:
                with self._file(shard, "skipped").open("a") as notes:
                    # Each note starts with its line break, so that a truncated note damages only its own line.
                    notes.writelines("\n" + json.dumps({"row": row, "reason": bad[row]}) for row in sorted(bad))
            if shard not in self._open:
                self._open[shard] = self._open_blocks(shard)
            blocks, _ = self._open[shard]
            rest = memoryview(record)
            while rest:
                rest = rest[blocks.write(rest) :]

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
        shard: int = 0,
    ) -> None:
        """Writes a shard from its blocks, and deletes them. Only the main process calls it, shard after shard.

        Images that could not be decoded are left out; the others keep their order.

        Args:
            provenance: The provenance without skipped images, which are added.
            labels: The label of each image, -1 for none.
            source_ids: Any number that identifies each image's source.
            held_out: Whether the image is held out from training.
            captions: The text of each image, "" for none; None for a set without captions.
            shard: The number of the shard.

        Raises:
            UserError: if no image could be decoded, or the disk is full. The blocks then stay for another attempt.
        """
        records, job, blocks = self._scan(shard), self.job, self.job.shards[shard]
        images = job.images_of_blocks(blocks)
        kept = torch.from_numpy(np.concatenate([records[block].kept for block in blocks])[: len(images)])
        if not kept.any():
            which = f"images {images.start} to {images.stop - 1}" if job.shard_blocks else f"the {job.images} images"
            raise UserError(f"{job.path} was not written: none of {which} can be decoded")
        rows_of_kept = kept.nonzero().squeeze(1) + images.start
        numbers = self._source_numbers(shard, rows_of_kept, source_ids) if job.shard_blocks else None
        labels, source_ids, held_out_of_kept = labels[rows_of_kept], source_ids[rows_of_kept], held_out[rows_of_kept]
        numbered = torch.from_numpy(number_sources(source_ids.numpy()))
        per_image = {"labels": labels, "source_ids": numbered, "held_out": held_out_of_kept}
        rows = self._kept_rows(held_out_of_kept)
        columns = {name: column.repeat_interleave(job.rows_per_image)[rows] for name, column in per_image.items()}
        columns["flipped"] = (torch.arange(len(rows)) % (1 + job.flips) == 1)[rows]
        provenance = replace(provenance, skipped=self._skipped(shard, kept, images.start))
        added: dict[str, Any] = {"provenance": provenance, "condition_width": job.condition_width}
        if captions is not None:
            image_of_row = rows_of_kept.repeat_interleave(job.rows_per_image)[rows]
            added["captions"] = [captions[image] for image in image_of_row.tolist()]
        path = self._shard_path(shard)
        with LatentSetWriter(path, job.layout, **columns, **added, source_numbers=numbers) as writer:
            start = 0
            for block in bar(blocks, what="merging", unit="block", delay_seconds=SLOW_SECONDS):
                codes, conditions = self._read(records[block], held_out[torch.tensor(job.images_of(block))])
                writer.write(start, codes, conditions)
                start += len(codes[0])
        if job.shard_blocks:
            self.close()
            self._delete_blocks(f"{shard:05}")

    def finish(self) -> None:
        """Completes a set whose shards are all written, and removes the folder. Only the main process calls it."""
        if self.job.shard_blocks:
            shards = self.folder / SHARDS_NAME
            write_index(shards)
            if self.job.path.exists():  # a kill between the two leaves the complete shards, for another attempt
                self._remove_replaced()  # that of an earlier build which was killed as it cleaned up
                self.job.path.rename(self.folder / REPLACED_NAME)
            shards.rename(self.job.path)
            sync(self.job.path.parent)
        self.discard()

    def discard(self) -> None:
        """Removes the folder with all blocks. What else was in the folder of a replaced set is moved to the new one."""
        self._remove_replaced()
        if os.name == "nt":  # Windows does not remove open files
            self.close()
        shutil.rmtree(self.folder)

    def discard_empty(self) -> None:
        """Removes the folder after a failed build if it holds no work. Only the main process does."""
        if self.process == 0 and {each.name for each in self.folder.iterdir()} <= {KEY_NAME, ABANDONED_NAME}:
            shutil.rmtree(self.folder)

    def _remove_replaced(self) -> None:
        """Removes a replaced set, if there is one, after its other files were moved to the set at the path."""
        replaced = self.folder / REPLACED_NAME
        if replaced.exists():
            for other in replaced.iterdir():
                if not _SHARD.fullmatch(other.name) and other.name != INDEX_NAME:
                    other.rename(self.job.path / other.name)
            shutil.rmtree(replaced)

    def close(self) -> None:
        """Closes this process's files of blocks and releases their locks, after the last block of a shard."""
        for blocks, lock in self._open.values():
            blocks.close()
            lock.close()
        self._open = {}

    def _shard_path(self, shard: int) -> Path:
        return self.folder / SHARDS_NAME / f"{shard:05}.h5" if self.job.shard_blocks else self.job.path

    def _finished(self) -> list[int]:
        """Returns the shards that are written, up to the first one that is not: the numbers of sources depend on it.

        An earlier file at the path of a set of one file is another set.
        """
        shards = range(len(self.job.shards)) if self.job.shard_blocks else ()
        return [*takewhile(lambda shard: self._shard_path(shard).exists(), shards)]

    def _delete_blocks(self, shard: str) -> None:
        """Deletes the blocks of a shard, or with `*` all."""
        for stale in (*self.folder.glob(f"{shard}-*.blocks"), *self.folder.glob(f"{shard}-*.skipped")):
            stale.unlink()

    def _source_numbers(
        self, shard: int, images: Int64[Tensor, " k"], source_ids: Int64[Tensor, " n"]
    ) -> Int64[Tensor, " sources"]:
        """Returns the number in the whole set of each source of a shard. Earlier shards are numbered first."""
        if self._numbers is None:
            self._numbers = SourceNumbers(source_ids.numpy())
            for earlier in range(shard):
                of_earlier = np.array(self.job.images_of_blocks(self.job.shards[earlier]))
                skipped = [image["row"] for image in read_header(self._shard_path(earlier)).provenance.skipped]
                self._numbers.add(np.setdiff1d(of_earlier, skipped, assume_unique=True))
        return torch.from_numpy(self._numbers.add(images.numpy()))

    def _shape(self) -> dict[str, Any]:
        job = self.job
        shape = {"images": job.images, "block_images": job.block_images, "flips": job.flips}
        added = {"crops": job.crops, "condition_width": job.condition_width, "shard_blocks": job.shard_blocks}
        return {"layout": job.layout.to_json(), **shape, **{name: value for name, value in added.items() if value}}

    def _file(self, shard: int, suffix: str) -> Path:
        return self.folder / f"{shard:05}-{self.process:05}.{suffix}"

    def _open_blocks(self, shard: int) -> tuple[BinaryIO, ExitStack]:
        """Opens this process's file for appending and truncates an incomplete record at its end, if there is one."""
        lock = locks.hold(self._file(shard, "blocks"), required=True)
        blocks = self._file(shard, "blocks").open("ab", buffering=0)
        blocks.truncate(blocks.tell() // self.record.itemsize * self.record.itemsize)
        return blocks, lock

    def _scan(self, shard: int) -> dict[int, "_Record"]:
        """Locates the record of each finished block of a shard; of several, that with the most decoded images."""
        records: dict[int, _Record] = {}
        for blocks in sorted(self.folder.glob(f"{shard:05}-*.blocks")):
            with blocks.open("rb") as file:
                while len(content := file.read(self.record.itemsize)) == self.record.itemsize:
                    values = np.frombuffer(content, self.record)[0]
                    if values["checksum"] == checksum(values):
                        record = _Record(blocks, file.tell() - self.record.itemsize, values["kept"].copy())
                        block = int(values["block"])
                        records[block] = max(record, records.get(block, record), key=lambda each: each.kept.sum())
        return records

    def _kept_rows(self, held_out: Bool[Tensor, " n"]) -> Bool[Tensor, " rows"]:
        """Marks the rows of images that go into the set: all but the crops of held-out images."""
        is_crop = torch.arange(self.job.rows_per_image) > self.job.flips
        return ~(held_out[:, None] & is_crop).flatten()

    def _read(self, record: "_Record", held_out: Bool[Tensor, " n"]) -> tuple[Codes, Float[Tensor, "rows v"] | None]:
        """Reads the codes and vectors of one block's rows in the set, without images that could not be decoded."""
        with record.file.open("rb") as file:
            file.seek(record.offset)
            values = np.frombuffer(file.read(self.record.itemsize), self.record)[0]
        rows = np.repeat(record.kept, self.job.rows_per_image)
        rows[: len(held_out) * self.job.rows_per_image] &= self._kept_rows(held_out).numpy()
        dtypes = [np.int64 if level.radices else np.float32 for level in self.job.layout.levels]
        codes = tuple(torch.from_numpy(values[f"codes/{i}"][rows].astype(dtype)) for i, dtype in enumerate(dtypes))
        if not self.job.condition_width:
            return codes, None
        return codes, torch.from_numpy(np.repeat(values[CONDITIONS], self.job.rows_per_image, axis=0)[rows])

    def _skipped(self, shard: int, kept: Bool[Tensor, " n"], first: int) -> tuple[dict[str, Any], ...]:
        """Returns the reason for each image from `first` on that is not kept. A redone block may have notes twice."""
        reasons: dict[int, str] = {}
        for notes in sorted(self.folder.glob(f"{shard:05}-*.skipped")):
            for line in notes.read_text().splitlines():
                with suppress(json.JSONDecodeError):  # a truncated note
                    note = json.loads(line)
                    reasons[note["row"]] = note["reason"]
        rows = ((~kept).nonzero().squeeze(1) + first).tolist()
        return shortened({"row": row, "reason": reasons.get(row, "it could not be decoded")} for row in rows)


@dataclass(frozen=True)
class _Record:
    """The location of a finished block's record, and which of its images could be decoded."""

    file: Path
    offset: int
    kept: np.ndarray
