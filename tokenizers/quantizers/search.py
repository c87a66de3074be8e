"""Nearest-codeword search through linked codebooks (HR-VQVAE, Eq. 3): a greedy path down the tree. No learning here.

Mathematically the search is n·m dot products per vector. As plain tensor operations it would gather each vector's m
candidate codewords in memory. Large jobs (`part_of_job`) therefore fuse it with `torch.compile`, which gathers nothing.
All others, and machines without a compiler, run eagerly in blocks whose candidates fit the cache; small layers are
compared with a dense matrix product.

Legend: n vectors, d code width, m branching.
"""

import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

# Vectors per block of the compiled search. All blocks have one shape, the last one padded, so one graph serves all.
BLOCK_VECTORS = 16_384
# The fused search takes as long for one padded block as the eager search for half as many vectors.
COMPILED_FROM_VECTORS = BLOCK_VECTORS // 2
# Vectors of a job from which compiling pays: it takes 15 to 70 s once a machine, and saves 1 to 4 s per million vectors
# on two CPU cores.
COMPILED_FROM_JOB = 10_000_000
# Vectors per block of the eager search on CPUs: the candidates fit the cache, which is 2-8 times faster.
EAGER_VECTORS = 512
# Up to this many codewords in a layer, a dense product with all of them is faster than gathering candidates.
DENSE_CODEWORDS = 256
# Codewords per tile of a flat codebook on CPUs: the scores fit the cache (1.5-2.5 times faster at 32 768 codewords).
TILE_CODEWORDS = 2_048
# Up to this branching the fused search is unrolled, with scores in registers: 2-3 times faster at 8, slow to compile
# beyond.
UNROLLED_BRANCHING = 8


_job_vectors: ContextVar[int] = ContextVar("vectors of the job", default=0)


@contextmanager
def part_of_job(vectors: int) -> Iterator[None]:
    """Sets how many vectors the job searches in all, of which the block searches some: compiling pays for large jobs.

    The choice depends on nothing else, so that every process of a job, and one that resumes it, finds the same paths.
    """
    token = _job_vectors.set(vectors)
    try:
        yield
    finally:
        _job_vectors.reset(token)


def nearest_paths(
    vectors: Float[Tensor, "n d"], codebooks: Sequence[Float[Tensor, "_nodes _m d"]], *, compiled: bool | None = None
) -> Int64[Tensor, " n"]:
    """Returns each vector's path to the nearest child in every layer (HR-VQVAE, Eq. 3), below m**len(codebooks).

    Args:
        vectors: vectors to quantize. Distances are float32 whatever their dtype, also under autocast.
        codebooks: for layer i, m**(i-1) codebooks of m codewords, ordered by the path that leads to them.
        compiled: forces the fused or the eager search; None fuses large searches in large jobs. Their results differ
            only where two children are equally near to within float32 rounding.
    """
    vectors, codebooks = vectors.detach().float(), [codebook.detach().float() for codebook in codebooks]
    offsets = _offsets(codebooks)
    if compiled is None:
        large = _job_vectors.get() >= COMPILED_FROM_JOB and len(vectors) >= COMPILED_FROM_VECTORS
        large = large and not all(_is_dense(codebook) for codebook in codebooks)
        compiled = large and vectors.device.type in ("cpu", "cuda")
    # compiled graphs depend on both modes: fixing them lets training and encoding share one graph
    with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
        if not compiled:
            return _eager(vectors, codebooks, offsets)
        paths = [vectors.new_zeros(0, dtype=torch.long)]
        for block in vectors.split(BLOCK_VECTORS) if len(vectors) else ():
            missing = BLOCK_VECTORS - len(block)
            padded = F.pad(block, (0, 0, 0, missing)) if missing else block  # zero padding would copy
            paths.append(_fused()(padded, codebooks, offsets)[: len(block)])
        return torch.cat(paths)


def nearest_children(
    vectors: Float[Tensor, "n d"], codebook: Float[Tensor, "_nodes _m d"], nodes: Int64[Tensor, " n"]
) -> Int64[Tensor, " n"]:
    """Searches one layer: returns the nearest codeword of each vector's node, as `node * m + digit`."""
    with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
        (offset,), size = _offsets([codebook]), _eager_block(vectors)
        blocks = zip(vectors.split(size), nodes.split(size), strict=True)
        return torch.cat([_children(block, codebook, offset, node) for block, node in blocks])


def largest_products(vectors: Float[Tensor, "n d"], codewords: Float[Tensor, "k d"]) -> Int64[Tensor, " n"]:
    """Returns the codeword of largest inner product with each vector, the first of equal ones, in bounded memory.

    Products are float32 whatever the vectors' dtype, also under autocast.
    """
    vectors, codewords = vectors.detach().float(), codewords.detach().float()
    with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
        offset = codewords.new_zeros(len(codewords))
        blocks = vectors.split(_eager_block(vectors))
        return torch.cat([_nearest_of_many(block, codewords, offset) for block in blocks])


def _offsets(codebooks: Sequence[Tensor]) -> list[Tensor]:
    """Returns, for each codeword, the constant of its score, so that the search needs no residuals.

    With x the vector, w the sum of the path's codewords so far and r = x - w: |r - c|^2 / 2 = |r|^2 / 2 - x.c + offset,
    where |r|^2 / 2 is common to all children and offset = |c|^2 / 2 + w.c.
    """
    offsets, path_sums = [], codebooks[0].new_zeros(len(codebooks[0]), 1, codebooks[0].shape[-1])  # nodes 1 d
    for codebook in codebooks:
        offsets.append((codebook * (codebook / 2 + path_sums)).sum(-1))
        path_sums = (codebook + path_sums).flatten(0, 1).unsqueeze(1)
    return offsets


def _is_dense(codebook: Tensor) -> bool:
    """Returns whether vectors are compared with all codewords of a layer: they are few, or all belong to one node."""
    nodes, m, _ = codebook.shape
    return nodes == 1 or nodes * m <= DENSE_CODEWORDS


def _eager_block(vectors: Tensor) -> int:
    return EAGER_VECTORS if vectors.device.type == "cpu" else BLOCK_VECTORS


def _eager(vectors: Tensor, codebooks: list[Tensor], offsets: list[Tensor]) -> Tensor:
    paths = []
    for block in vectors.split(_eager_block(vectors)):
        path = torch.zeros(len(block), dtype=torch.long, device=vectors.device)
        for codebook, offset in zip(codebooks, offsets, strict=True):
            path = _children(block, codebook, offset, path)
        paths.append(path)
    return torch.cat(paths)


def _children(vectors: Tensor, codebook: Tensor, offset: Tensor, path: Tensor) -> Tensor:
    """Returns the nearest child of each path, as the longer path.

    Uses `F.embedding` and `min` where indexing and `argmin` give the same: they are several times faster on CPUs.
    """
    nodes, m, d = codebook.shape
    if nodes == 1 and m > TILE_CODEWORDS and vectors.device.type == "cpu":
        return _nearest_of_many(vectors, codebook[0], offset.view(-1))
    if _is_dense(codebook):
        scores = torch.addmm(offset.view(-1), vectors, codebook.view(-1, d).T, alpha=-1).view(-1, nodes, m)
        scores = scores.gather(1, path.view(-1, 1, 1).expand(-1, 1, m)).squeeze(1) if nodes > 1 else scores.squeeze(1)
    else:
        candidates = F.embedding(path, codebook.flatten(1)).view(-1, m, d)
        start = F.embedding(path, offset)[..., None]
        scores = torch.baddbmm(start, candidates, vectors[..., None], alpha=-1).squeeze(2)
    return path * m + scores.min(1).indices


def _nearest_of_many(vectors: Tensor, codewords: Tensor, offset: Tensor) -> Tensor:
    """Returns the codeword of each vector with the least offset - x.c, the first of equal ones, tile by tile."""
    nearest, least = offset.new_zeros(len(vectors), dtype=torch.long), offset.new_full((len(vectors),), torch.inf)
    for first in range(0, len(codewords), TILE_CODEWORDS):
        tile = slice(first, first + TILE_CODEWORDS)
        scores = torch.addmm(offset[tile], vectors, codewords[tile].T, alpha=-1).min(1)
        nearest = torch.where(scores.values < least, scores.indices + first, nearest)
        least = torch.minimum(scores.values, least)
    return nearest


@typing.no_type_check  # shape checks under pytest would break the compiled graph
def _fusable(vectors, codebooks, offsets):
    """Computes the same as `_eager` with operations that fuse into one pass, storing nothing of size (n, m, d)."""
    path = torch.zeros(vectors.shape[0], dtype=torch.long, device=vectors.device)
    for codebook, offset in zip(codebooks, offsets, strict=True):
        _, m, d = codebook.shape
        codewords, offsets_flat, first = codebook.reshape(-1, d), offset.reshape(-1), path * m
        if m <= UNROLLED_BRANCHING:
            path, least = first, offsets_flat[first] - (vectors * codewords[first]).sum(-1)
            for j in range(1, m):
                score = offsets_flat[first + j] - (vectors * codewords[first + j]).sum(-1)
                path, least = torch.where(score < least, first + j, path), torch.minimum(score, least)
        else:
            path = first + (offset[path] - (vectors[:, None] * codebook[path]).sum(-1)).argmin(1)
    return path


@cache
def _fused() -> Callable[[Tensor, list[Tensor], list[Tensor]], Tensor]:
    """Returns the compiled search. It falls back to the eager one if compiling fails, e.g. without a C++ compiler."""
    from torch._dynamo.exc import TorchDynamoException  # imported late: importing the compiler takes seconds
    from torch._inductor.exc import InductorError

    compiled = torch.compile(_fusable, dynamic=False)
    broken = False

    def search(vectors: Tensor, codebooks: list[Tensor], offsets: list[Tensor]) -> Tensor:
        nonlocal broken
        if not broken:
            try:
                return compiled(vectors, codebooks, offsets)
            except (TorchDynamoException, InductorError) as error:
                broken = True
                reason = (str(error).splitlines() or ["unknown"])[0]
                warnings.warn(f"the linked search runs eagerly: it could not be compiled ({reason})", stacklevel=3)
        return _eager(vectors, codebooks, offsets)

    return search
