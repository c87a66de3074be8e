"""The linked search of HR-VQVAE (Eq. 3): for each vector the greedy path through a tree of codebooks. No learning here.

The maths is n·m dot products a vector, but as tensor operations it gathers each vector's m candidate codewords into
memory. So: large searches run fused by `torch.compile`, where nothing is gathered; small ones, and machines without a
compiler, run in blocks whose candidates stay in the cache, and take a dense product for layers that are small.
"""

import typing
import warnings
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

# One compiled shape serves every search: vectors go through in blocks of this many, the last one padded.
BLOCK_VECTORS = 16_384
# A padded block costs the fused search what half as many vectors cost the eager one.
COMPILED_FROM_VECTORS = BLOCK_VECTORS // 2
# Compiling costs some 20 s once a machine; a search of this many vectors times leaves, some 100 ms eager and 10 fused.
COMPILED_FROM_PAIRS = 2**25
# On CPUs the eager search works in blocks this small: their candidates stay in the cache, which is 2-8 times faster.
EAGER_VECTORS = 512
# Up to this many codewords, comparing with a layer's every codeword is one small matrix product and beats gathering.
DENSE_CODEWORDS = 256
# More codewords than this are compared in turn: on CPUs their scores leave the cache (at 32 768, 1.5-2.5 times faster).
TILE_CODEWORDS = 2_048
# Up to this branching the fused search keeps the scores in registers; 2-3x faster at 8, slow to compile beyond.
UNROLLED_BRANCHING = 8


def nearest_paths(
    vectors: Float[Tensor, "n d"], codebooks: Sequence[Float[Tensor, "_nodes _m d"]], *, compiled: bool | None = None
) -> Int64[Tensor, " n"]:
    """The path that takes the nearest child at every layer (HR-VQVAE, Eq. 3), one number below m**len(codebooks).

    Args:
        vectors: what to quantize, compared in float32 whatever their type and whatever autocast says.
        codebooks: layer i's m**(i-1) codebooks of m codewords, ordered by the path that leads to them.
        compiled: force the fused search or the eager one; None chooses by size. They differ only where two children are
            equally near to within float32 rounding of the vector.
    """
    vectors, codebooks = vectors.detach().float(), [codebook.detach().float() for codebook in codebooks]
    offsets = _offsets(codebooks)
    if compiled is None:
        pairs = len(vectors) * codebooks[-1].shape[0] * codebooks[-1].shape[1]
        large = len(vectors) >= COMPILED_FROM_VECTORS and pairs >= COMPILED_FROM_PAIRS
        large = large and not all(_is_dense(codebook) for codebook in codebooks)
        compiled = large and vectors.device.type in ("cpu", "cuda")
    # both are part of what a compiled graph is made for: one graph for training and encoding alike
    with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
        if not compiled:
            return _eager(vectors, codebooks, offsets)
        paths = [vectors.new_zeros(0, dtype=torch.long)]
        for block in vectors.split(BLOCK_VECTORS) if len(vectors) else ():
            missing = BLOCK_VECTORS - len(block)
            padded = F.pad(block, (0, 0, 0, missing)) if missing else block  # padding by nothing would be a copy
            paths.append(_fused()(padded, codebooks, offsets)[: len(block)])
        return torch.cat(paths)


def nearest_children(
    vectors: Float[Tensor, "n d"], codebook: Float[Tensor, "_nodes _m d"], nodes: Int64[Tensor, " n"]
) -> Int64[Tensor, " n"]:
    """One layer of the search: for each vector the nearest codeword of its node, as `node * m + digit`."""
    with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
        (offset,), size = _offsets([codebook]), _eager_block(vectors)
        blocks = zip(vectors.split(size), nodes.split(size), strict=True)
        return torch.cat([_children(block, codebook, offset, node) for block, node in blocks])


def _offsets(codebooks: Sequence[Tensor]) -> list[Tensor]:
    """What makes a child's score of its product with the whole vector, so that no residual need be kept.

    With x the vector, w the sum of the path's codewords so far and r = x - w: |r - c|^2 / 2 = |r|^2 / 2 - x.c + offset,
    where |r|^2 / 2 is common to all children and offset = |c|^2 / 2 + w.c.
    """
    offsets, path_sums = [], codebooks[0].new_zeros(len(codebooks[0]), 1, codebooks[0].shape[-1])  # nodes 1 d
    for codebook in codebooks:
        offsets.append((codebook * (codebook / 2 + path_sums)).sum(-1))
        path_sums = (codebook + path_sums).flatten(0, 1).unsqueeze(1)
    return offsets


def _is_dense(codebook: Tensor) -> bool:
    """Whether all of a layer's codewords are compared at once: they are few, or there is nothing to choose between."""
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
    """`F.embedding` and `min` for indexing and `argmin`: the same, and several times faster on CPUs."""
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
    """The nearest codeword of each vector, the first of equally near ones, some of the codewords at a time."""
    nearest, least = offset.new_zeros(len(vectors), dtype=torch.long), offset.new_full((len(vectors),), torch.inf)
    for first in range(0, len(codewords), TILE_CODEWORDS):
        some = slice(first, first + TILE_CODEWORDS)
        found = torch.addmm(offset[some], vectors, codewords[some].T, alpha=-1).min(1)
        nearest = torch.where(found.values < least, found.indices + first, nearest)
        least = torch.minimum(found.values, least)
    return nearest


@typing.no_type_check  # compiled whole: shape checks under pytest would break the graph
def _fusable(vectors, codebooks, offsets):
    """The same as `_eager` in operations that the compiler fuses into one pass: nothing of size (n, m, d) is stored."""
    path = torch.zeros(vectors.shape[0], dtype=torch.long, device=vectors.device)
    for codebook, offset in zip(codebooks, offsets, strict=True):
        _, m, d = codebook.shape
        codewords, of_codeword, first = codebook.reshape(-1, d), offset.reshape(-1), path * m
        if m <= UNROLLED_BRANCHING:
            path, least = first, of_codeword[first] - (vectors * codewords[first]).sum(-1)
            for j in range(1, m):
                score = of_codeword[first + j] - (vectors * codewords[first + j]).sum(-1)
                path, least = torch.where(score < least, first + j, path), torch.minimum(score, least)
        else:
            path = first + (offset[path] - (vectors[:, None] * codebook[path]).sum(-1)).argmin(1)
    return path


@cache
def _fused() -> Callable[[Tensor, list[Tensor], list[Tensor]], Tensor]:
    """The compiled search, or the eager one where compiling fails (no C++ compiler, say): slower, never wrong."""
    from torch._dynamo.exc import TorchDynamoException  # here: the compiler takes seconds to import
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
                warnings.warn(f"the linked search runs unfused: it could not be compiled ({reason})", stacklevel=3)
        return _eager(vectors, codebooks, offsets)

    return search
