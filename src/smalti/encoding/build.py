"""Encodes the blocks of a build and writes the files, on any number of processes or on an engine.

What encodes a block is in `encoder.py`. Finished blocks are kept in `latentsets/blocks.py`, so a stopped build resumes.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from smalti.core import locks
from smalti.core.devices import autocast
from smalti.core.errors import UserError
from smalti.core.progress import bar
from smalti.encoding.encoder import Encoder, decoded, encode_block, results
from smalti.images.formats.opening import BadImageError
from smalti.images.sources import local_paths
from smalti.latentsets.blocks import BlockStore
from smalti.latentsets.provenance import Provenance
from smalti.latentsets.reader import LatentSet

T = TypeVar("T")
Engine: TypeAlias = Callable[[Encoder, list[int]], Iterable[Mapping[str, Any]]]
"""Encodes blocks in other processes: yields results of `encoder.EncodeBatches` for the given blocks, in any order."""


def encode(
    encoder: Encoder,
    provenance: Provenance,
    process: PartialState,
    workers: int,
    *,
    skips: bool,
    overwrite: bool = False,
    engine: Engine | None = None,
) -> None:
    """Encodes opened images with a tokenizer that is on its device, and writes the finished set.

    Args:
        encoder: What is encoded, and how.
        provenance: The provenance of the set, without skipped images.
        process: This process.
        workers: The number of processes that decode images for this one.
        skips: Whether images that cannot be decoded are left out; otherwise they are an error.
        overwrite: Whether to replace any file.
        engine: Encodes in other processes than those of this command.

    Raises:
        UserError: as `build_latents` does.
    """
    job, images, main = encoder.job, encoder.images, process.is_main_process
    checks = {"inputs": local_paths(provenance.image_source), "overwrite": overwrite, "required": True}
    claim = locks.claim([job.path], **checks, is_own=lambda path: provenance.is_rebuild_of(_provenance_of(path)))
    with ExitStack() as stack, BlockStore(job, process=process.process_index) as store:
        _on_all_processes(process, lambda: stack.enter_context(claim) if main else None)
        stale = _on_all_processes(process, lambda: store.claim(with_bad=not skips) if main else None)
        before = _provenance_of(job.path)
        finished = before is not None and provenance.has_codes_of(before) and not (before.skipped and not skips)
        # every process lists what is missing before any process writes it
        unfinished = _on_all_processes(process, store.unfinished, store)
        if finished and len(LatentSet(job.path).files.extents) == len(job.shards):
            process.print(f"{job.path} already holds these codes.")
            if main:
                store.discard()
            return
        if stale:
            process.print(f"Discarding the blocks of an earlier build with another {stale}.")
        columns = {"labels": images.labels, "source_ids": images.source_ids, "held_out": images.held_out}
        for shard in unfinished:

            def missing_blocks(shard: int = shard) -> list[int]:
                missing = store.missing(shard, with_bad=not skips)
                if main:
                    store.require_room(len(missing), [each for each in unfinished if each >= shard])
                return missing

            missing = _on_all_processes(process, missing_blocks, store)
            share = missing[process.process_index :: process.num_processes]

            def encode_share(shard: int = shard, share: list[int] = share) -> None:
                _encode_share(encoder, store, shard, share, process, workers, skips=skips, engine=engine)

            def merge(shard: int = shard) -> None:
                if main:
                    store.merge(provenance, **columns, shard=shard)

            try:
                _on_all_processes(process, encode_share, store)
            except KeyboardInterrupt:
                process.print("\nFinished blocks are kept: run the same command to resume.")
                raise
            _on_all_processes(process, merge, store)
        _on_all_processes(process, lambda: store.finish() if main else None, store)


def _on_all_processes(process: PartialState, work: Callable[[], T], claimed: BlockStore | None = None) -> T:
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
def _encode_share(
    encoder: Encoder,
    store: BlockStore,
    shard: int,
    share: list[int],
    process: PartialState,
    workers: int,
    *,
    skips: bool,
    engine: Engine | None,
) -> None:
    """Encodes this process's `share` of the missing blocks of a file, or passes it to the engine."""
    job, shards = encoder.job, len(encoder.job.shards)
    several = process.num_processes > 1  # the bar then counts the first process's share alone
    blocks = len(job.shards[shard])
    progress = bar(
        what=f"encoding{f' file {shard + 1} of {shards}' if shards > 1 else ''}"
        f"{f' (process 1 of {process.num_processes})' if several else ''}",
        total=len(share) if several else blocks,
        initial=0 if several else blocks - len(share),
        unit="block",
        shown=process.is_main_process,
    )

    def keep(record: bytes, bad: Mapping[int, str]) -> None:
        if bad and not skips:
            raise BadImageError(f"{bad[min(bad)]}, or leave out such images with --on-bad-image skip")
        store.append_record(record, bad)
        progress.update()

    tokenizer, encoding_device = encoder.tokenizer, next(encoder.tokenizer.parameters()).device
    with progress, autocast(encoding_device, encoder.precision):
        if engine and share:
            for batch in engine(encoder, share):
                for record, bad in results(batch):
                    keep(record, bad)
        elif share:
            for block, pixels, bad in decoded(encoder, share, workers, encoding_device):
                if store.abandoned:
                    return
                keep(job.pack(block, encode_block(tokenizer, pixels, flips=job.flips), bad), bad)
    store.close()


def _provenance_of(path: Path) -> Provenance | None:
    """Returns the provenance of a latent set; None for any other file, or if there is none."""
    if not path.exists():  # otherwise it could be a hub id
        return None
    try:
        return LatentSet(path).provenance
    except UserError:
        return None
