"""Encodes the blocks of a build and writes the files, on any number of processes or on an engine.

What encodes a block is in `encoder.py`. Finished blocks are kept in `latentsets/building/blocks.py`, so a
stopped build resumes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
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
from smalti.latentsets.building.blocks import BlockStore
from smalti.latentsets.provenance import Provenance
from smalti.latentsets.reader import LatentSet

T = TypeVar("T")
Engine: TypeAlias = Callable[[Encoder, list[int]], Iterable[Mapping[str, Any]]]
"""Encodes blocks in other processes: yields results of `encoder.EncodeBatches` for given blocks, in any order."""


def encode(
    encoder: Encoder,
    provenance: Provenance,
    process: PartialState,
    workers: int,
    *,
    skips: bool,
    overwrite: bool = False,
    engine: Engine | None = None,
    captions: Sequence[str] | None = None,
) -> None:
    """Encodes opened images with a tokenizer that is on its device, and writes the finished set.

    Args:
        encoder: What is encoded, and how.
        provenance: The provenance of the set, without skipped images.
        process: This process.
        workers: The number of processes that decode images for this one.
        skips: Whether images that cannot be decoded are left out; otherwise they are an error.
        overwrite: Whether to replace any file, also a set that has the same codes.
        engine: Encodes in other processes than those of this command.
        captions: The text of each image, "" for none; None for a set without captions.

    Raises:
        UserError: as `build_latents` does.
    """
    job, images, main = encoder.job, encoder.images, process.is_main_process
    provenance.require_readable(job.path, indexed=bool(job.shard_blocks))
    checks = {"inputs": local_paths(provenance.image_source), "overwrite": overwrite, "required": True}
    claim = locks.claim([job.path], **checks, is_own=lambda path: provenance.is_rebuild_of(_provenance_of(path)))
    with ExitStack() as stack, BlockStore(job, process=process.process_index) as store:
        _on_all_processes(lambda: stack.enter_context(claim) if main else None)
        stale = _on_all_processes(lambda: store.claim(with_bad=not skips) if main else None)
        before = _provenance_of(job.path)
        same = before is not None and provenance.is_met_by(before) and not (before.skipped and not skips)
        finished = same and not overwrite
        # every process lists what is missing before any process writes it
        unfinished = _on_all_processes(store.unfinished, store)
        if finished and len(LatentSet(job.path).files.extents) == len(job.shards):
            process.print(f"{job.path} already holds these codes.")
            if main:
                store.discard()
            return
        if stale:
            process.print(f"Discarding the blocks of an earlier build with another {stale}.")
        columns = {"labels": images.labels, "source_ids": images.source_ids, "held_out": images.held_out}
        merged = partial(store.merge, provenance, captions=captions, **columns)
        # An engine encodes the blocks of all files, so that it starts its processes once.
        for shards in [unfinished] if engine and unfinished else [[shard] for shard in unfinished]:

            def missing_blocks(shards: list[int] = shards) -> dict[int, list[int]]:
                missing = {shard: store.missing(shard, with_bad=not skips) for shard in shards}
                if main:
                    rest = [shard for shard in unfinished if shard >= shards[0]]
                    store.require_room(max(map(len, missing.values())), rest)
                return missing

            missing = _on_all_processes(missing_blocks, store)
            try:
                if engine:
                    for shard in _encoded_by(engine, encoder, store, missing, skips=skips):
                        merged(shard=shard)
                    continue
                share = missing[shards[0]][process.process_index :: process.num_processes]
                work = partial(_encode_share, encoder, store, shards[0], share, process, workers, skips=skips)
                _on_all_processes(work, store)
            except KeyboardInterrupt:
                process.print("\nFinished blocks are kept: run the same command to resume.")
                raise
            merge = partial(merged, shard=shards[0])
            _on_all_processes(merge if main else _nothing, store)
        _on_all_processes(store.finish if main else _nothing, store)


def _nothing() -> None:
    """Stands for work of the main process on all others."""


def _on_all_processes(work: Callable[[], T], claimed: BlockStore | None = None) -> T:
    """Runs `work` on every process and waits for all; an error on one process is raised on all.

    So all processes stop together. After an error, `claimed` is abandoned: other processes that
    encode into its folder stop at their next block. The folder stays if it holds finished work.
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
        if claimed:
            claimed.discard_empty()
        raise failures[0]
    return result  # pyright: ignore[reportReturnType] - None only if `work` returned None


def _encoded_by(
    engine: Engine, encoder: Encoder, store: BlockStore, missing: Mapping[int, list[int]], *, skips: bool
) -> Iterator[int]:
    """Has an engine encode blocks; yields the shards in order, each as soon as it and all before it have all blocks."""
    job, waiting = encoder.job, {shard: set(blocks) for shard, blocks in missing.items()}
    blocks = [block for of_shard in missing.values() for block in of_shard]
    total = sum(len(job.shards[shard]) for shard in missing)
    with bar(what="encoding", total=total, initial=total - len(blocks), unit="block") as progress:
        for batch in engine(encoder, blocks) if blocks else ():
            for block, record, bad in results(batch):
                _require_whole(bad, skips=skips)
                store.append_record(block, record, encoder.images.without_folder(bad))
                waiting[job.shard_of(block)].discard(block)
                progress.update()
            while waiting and not waiting[first := min(waiting)]:
                del waiting[first]
                yield first
    for shard, blocks_left in waiting.items():
        assert not blocks_left, f"the engine returned no result for the blocks {sorted(blocks_left)}"
        yield shard


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
) -> None:
    """Encodes this process's `share` of the missing blocks of a file."""
    job, blocks = encoder.job, len(encoder.job.shards[shard])
    several = process.num_processes > 1  # the bar then counts the first process's share alone
    file = f" file {shard + 1} of {len(job.shards)}" if job.shard_blocks else ""
    progress = bar(
        what=f"encoding{file}{f' (process 1 of {process.num_processes})' if several else ''}",
        total=len(share) if several else blocks,
        initial=0 if several else blocks - len(share),
        unit="block",
        shown=process.is_main_process,
    )
    tokenizer, encoding_device = encoder.tokenizer, encoder.tokenizer.device
    with progress, autocast(encoding_device, encoder.precision):
        for block, pixels, bad in decoded(encoder, share, workers, encoding_device):
            if store.abandoned:
                return
            _require_whole(bad, skips=skips)
            codes = encode_block(tokenizer, pixels, job)
            store.append(block, codes, encoder.images.without_folder(bad), encoder.vectors(block, pixels))
            progress.update()
    store.close()


def _require_whole(bad: Mapping[int, str], *, skips: bool) -> None:
    if bad and not skips:
        raise BadImageError(f"{bad[min(bad)]}, or leave out such images with --on-bad-image skip")


def _provenance_of(path: Path) -> Provenance | None:
    """Returns the provenance of a latent set; None for any other file, or if there is none."""
    if not path.exists():  # otherwise it could be a hub id
        return None
    try:
        return LatentSet(path).provenance
    except UserError:
        return None
