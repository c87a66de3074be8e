"""The linked search of HR-VQVAE (Eq. 3): for each vector the greedy path through a tree of codebooks. No learning here, only the search.

The maths is n·m dot products a vector, but written as tensor operations it gathers each vector's m candidate codewords into memory, which costs
more than comparing with all the leaves at once. So: large searches run fused by `torch.compile`, where nothing is gathered; small ones,
and machines without a compiler, take whichever of a dense product and a gather is cheaper for each layer.
"""

import typing
import warnings
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

# One compiled shape serves every search: vectors go through in blocks of this many, the last one padded.
BLOCK_VECTORS = 16_384
# Compiling takes some 20 s once a machine, a search of this many vector-leaf pairs 10 ms: below it the eager search is as good.
COMPILED_FROM_PAIRS = 2**23
# Up to this many codewords, comparing with a layer's every codeword is one small matrix product and beats gathering the m candidates.
DENSE_CODEWORDS = 1_024
# Up to this branching the fused search keeps the candidates' scores in registers; measured 2-3x faster at 8, and slow to compile beyond.
UNROLLED_BRANCHING = 8


def nearest_paths(
    vectors: Float[Tensor, "n d"], codebooks: Sequence[Float[Tensor, "_nodes _m d"]], *, compiled: bool | None = None
) -> Int64[Tensor, " n"]:
    """The path that takes the nearest child at every layer (HR-VQVAE, Eq. 3), as one number below m**len(codebooks).

    Args:
        vectors: what to quantize, compared in float32 whatever their type.
        codebooks: layer i's m**(i-1) codebooks of m codewords, ordered by the path that leads to them.
        compiled: force the fused search or the eager one; None chooses by size. They differ only where two children are equally near
            to within float32 rounding.
    """
    vectors, codebooks = vectors.detach().float(), [codebook.detach().float() for codebook in codebooks]
    halves = [codebook.square().sum(-1) / 2 for codebook in codebooks]
    leaves = codebooks[-1].shape[0] * codebooks[-1].shape[1]
    if compiled is None:
        compiled = vectors.device.type in ("cpu", "cuda") and len(vectors) * leaves >= COMPILED_FROM_PAIRS
    search = _fused() if compiled else _eager
    blocks = []
    for block in vectors.split(BLOCK_VECTORS):
        padding = BLOCK_VECTORS - len(block) if compiled else 0
        blocks.append(search(F.pad(block, (0, 0, 0, padding)), codebooks, halves)[: len(block)])
    return torch.cat(blocks) if blocks else vectors.new_zeros(0, dtype=torch.long)


def _eager(vectors: Tensor, codebooks: list[Tensor], halves: list[Tensor]) -> Tensor:
    path = torch.zeros(len(vectors), dtype=torch.long, device=vectors.device)
    residual = vectors
    for codebook, half in zip(codebooks, halves, strict=True):
        nodes, m, d = codebook.shape
        # |r - c|^2 / 2 without the |r|^2 / 2 that all candidates share
        if nodes * m <= DENSE_CODEWORDS:
            scores = (half.view(-1) - residual @ codebook.view(-1, d).T).view(-1, nodes, m)
            scores = scores.gather(1, path.view(-1, 1, 1).expand(-1, 1, m)).squeeze(1)
        else:
            scores = half[path] - torch.einsum("nd,nmd->nm", residual, codebook[path])
        path = path * m + scores.argmin(1)
        residual = residual - codebook.view(-1, d)[path]
    return path


@typing.no_type_check  # compiled whole: shape checks under pytest would break the graph
def _fusable(vectors, codebooks, halves):
    """The same as `_eager` in operations that the compiler fuses into one pass over the vectors: nothing of size (n, m, d) is stored."""
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
