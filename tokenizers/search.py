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
            equally near to within float32 rounding.
    """
    vectors, codebooks = vectors.detach().float(), [codebook.detach().float() for codebook in codebooks]
    halves = [_half_squares(codebook) for codebook in codebooks]
    if compiled is None:
        pairs = len(vectors) * codebooks[-1].shape[0] * codebooks[-1].shape[1]
        large = len(vectors) >= COMPILED_FROM_VECTORS and pairs >= COMPILED_FROM_PAIRS
        large = large and not all(_is_dense(codebook) for codebook in codebooks)
        compiled = large and vectors.device.type in ("cpu", "cuda")
    # both are part of what a compiled graph is made for: one graph for training and encoding alike
    with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
        if not compiled:
            return _eager(vectors, codebooks, halves)
        paths = [vectors.new_zeros(0, dtype=torch.long)]
        for block in vectors.split(BLOCK_VECTORS) if len(vectors) else ():
            missing = BLOCK_VECTORS - len(block)
            padded = F.pad(block, (0, 0, 0, missing)) if missing else block  # padding by nothing would be a copy
            paths.append(_fused()(padded, codebooks, halves)[: len(block)])
        return torch.cat(paths)


def nearest_children(
    vectors: Float[Tensor, "n d"], codebook: Float[Tensor, "_nodes _m d"], nodes: Int64[Tensor, " n"]
) -> Int64[Tensor, " n"]:
    """One layer of the search: for each vector the nearest codeword of its node, as `node * m + digit`."""
    with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
        half, size = _half_squares(codebook), _eager_block(vectors)
        blocks = zip(vectors.split(size), nodes.split(size), strict=True)
        return torch.cat([_children(block, codebook, half, node) for block, node in blocks])


def _half_squares(codebook: Tensor) -> Tensor:
    return codebook.square().sum(-1) / 2


def _is_dense(codebook: Tensor) -> bool:
    """Whether all of a layer's codewords are compared at once: they are few, or there is nothing to choose between."""
    nodes, m, _ = codebook.shape
    return nodes == 1 or nodes * m <= DENSE_CODEWORDS


def _eager_block(vectors: Tensor) -> int:
    return EAGER_VECTORS if vectors.device.type == "cpu" else BLOCK_VECTORS


def _eager(vectors: Tensor, codebooks: list[Tensor], halves: list[Tensor]) -> Tensor:
    paths = []
    for residual in vectors.split(_eager_block(vectors)):
        path = torch.zeros(len(residual), dtype=torch.long, device=vectors.device)
        for codebook, half in zip(codebooks, halves, strict=True):
            path = _children(residual, codebook, half, path)
            residual = residual - F.embedding(path, codebook.flatten(0, 1))
        paths.append(path)
    return torch.cat(paths)


def _children(residual: Tensor, codebook: Tensor, half: Tensor, path: Tensor) -> Tensor:
    """`F.embedding` and `min` for indexing and `argmin`: the same, and several times faster on CPUs."""
    nodes, m, d = codebook.shape
    # |r - c|^2 / 2 without the |r|^2 / 2 that all candidates share
    if _is_dense(codebook):
        scores = torch.addmm(half.view(-1), residual, codebook.view(-1, d).T, alpha=-1).view(-1, nodes, m)
        scores = scores.gather(1, path.view(-1, 1, 1).expand(-1, 1, m)).squeeze(1) if nodes > 1 else scores.squeeze(1)
    else:
        candidates = F.embedding(path, codebook.flatten(1)).view(-1, m, d)
        scores = torch.baddbmm(F.embedding(path, half)[..., None], candidates, residual[..., None], alpha=-1).squeeze(2)
    return path * m + scores.min(1).indices


@typing.no_type_check  # compiled whole: shape checks under pytest would break the graph
def _fusable(vectors, codebooks, halves):
    """The same as `_eager` in operations that the compiler fuses into one pass: nothing of size (n, m, d) is stored."""
    path = torch.zeros(vectors.shape[0], dtype=torch.long, device=vectors.device)
    residual = vectors
    for codebook, half in zip(codebooks, halves, strict=True):
        _, m, d = codebook.shape
        codewords, halved, first = codebook.reshape(-1, d), half.reshape(-1), path * m
        if m <= UNROLLED_BRANCHING:
            path, least = first, halved[first] - (residual * codewords[first]).sum(-1)
            for j in range(1, m):
                score = halved[first + j] - (residual * codewords[first + j]).sum(-1)
                path, least = torch.where(score < least, first + j, path), torch.minimum(score, least)
        else:
            path = first + (half[path] - (residual[:, None] * codebook[path]).sum(-1)).argmin(1)
        residual = residual - codewords[path]
    return path


@cache
def _fused() -> Callable[[Tensor, list[Tensor], list[Tensor]], Tensor]:
    """The compiled search, or the eager one where compiling fails (no C++ compiler, say): slower, never wrong."""
    from torch._dynamo.exc import TorchDynamoException  # here: the compiler takes seconds to import
    from torch._inductor.exc import InductorError

    compiled = torch.compile(_fusable, dynamic=False)
    broken = False

    def search(vectors: Tensor, codebooks: list[Tensor], halves: list[Tensor]) -> Tensor:
        nonlocal broken
        if not broken:
            try:
                return compiled(vectors, codebooks, halves)
            except (TorchDynamoException, InductorError) as error:
                broken = True
                reason = (str(error).splitlines() or ["unknown"])[0]
                warnings.warn(f"the linked search runs unfused: it could not be compiled ({reason})", stacklevel=3)
        return _eager(vectors, codebooks, halves)

    return search
