"""Entropy coding of codes with the exact probabilities of causal priors, by the range coder of `constriction`.

Encoder and decoder must compute the very same probabilities. So both decode the same grids stepwise, in the same
batches, in float64 on the CPU, and round each logit to `STEPS_PER_OCTAVE` steps for a factor of two in probability.
From there on all numbers are integers, or scaled by the coder alone. Another processor, number of threads or version of
torch changes the network's sums. In float64 it changes the logits by some 1e-15 (measured between instruction sets), so
one of the 16 probabilities of a digit in 10**11 digits: where a logit is that close to the border between two steps. In
float32 it would be one in 200 digits. Then the decoder returns other codes, which their digest reveals.

Legend: b batch, h w grid, r radix of a digit.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from smalti.core.codes import Codes
from smalti.core.errors import UserError
from smalti.priors.base import CausalPrior, Prior
from smalti.priors.methods.autoregressive import require_causal

BATCH_ROWS = 64
"""Images whose codes are coded side by side. Another number would change the order of the coded digits."""
STEPS_PER_OCTAVE = 64
"""Steps of the probabilities for a factor of two. The rounding costs about 4e-6 bits a digit."""
OCTAVES = 24
"""A digit's probability is at least 2**-24 times that of the likeliest, as the coder has 24 bits."""
WEIGHTS = torch.tensor([float(round(2 ** (OCTAVES - i / STEPS_PER_OCTAVE))) for i in range(OCTAVES * STEPS_PER_OCTAVE)])
"""Integer weights, in floats, of probabilities that are 0, 1, 2, ... steps below the largest.

None is so close to a half that another implementation of the power would round it to another integer.
"""

CodeDigits = Callable[[Float[np.ndarray, "b r"], Tensor | None], Tensor]
"""Encodes or decodes one digit of every row.

It receives the weights of the digit's values, and the true digits int64 `(b,)` when encoding; it returns the digits.
"""


def encode_codes(
    priors: Sequence[Prior],
    codes: Codes,
    labels: Int64[Tensor, " rows"] | None = None,
    callback: Callable[[int], object] | None = None,
) -> bytes:
    """Encodes codes with the probabilities of priors.

    Args:
        priors: one for each level, coarsest first, in evaluation mode.
        codes: int64 on the CPU.
        labels: classes of the images, -1 for none, which the priors are conditioned on and which are encoded too, with
            equal probabilities. Without them the images are coded as ones of no class.
        callback: called after each batch with its number of images.

    Returns:
        Whole words of 32 bits, little-endian.

    Raises:
        UserError: if a prior has no exact likelihoods, or `constriction` is not installed.
    """
    stream = _constriction()
    encoder, family = stream.queue.RangeEncoder(), stream.model.Categorical(perfect=False)

    def encode(weights: np.ndarray, digits: Tensor | None) -> Tensor:
        assert digits is not None
        encoder.encode(digits.numpy().astype(np.int32), family, weights)
        return digits

    grids = [(grid.shape[1], grid.shape[2]) for grid in codes]
    _code(priors, len(codes[0]), grids, encode, codes=codes, labels=labels, callback=callback)
    return encoder.get_compressed().astype("<u4").tobytes()


def decode_codes(
    priors: Sequence[Prior],
    payload: bytes,
    images: int,
    grids: Sequence[tuple[int, int]],
    *,
    labelled: bool = False,
    callback: Callable[[int], object] | None = None,
) -> Codes | None:
    """Decodes what `encode_codes` encoded with the same priors: its inverse.

    The result is other codes, or None if the bits are those of no codes at all, if the payload is damaged or this
    machine computes other probabilities than the one that encoded (see the head of this file). So compare the codes
    with a digest.

    Args:
        priors: as for `encode_codes`.
        payload: what it returned; zeros after it have no effect.
        images: number of images.
        grids: rows and columns of each level's grid.
        labelled: whether labels were encoded.
        callback: as for `encode_codes`.

    Raises:
        UserError: as `encode_codes` does.
    """
    stream = _constriction()
    words = np.frombuffer(payload.ljust(-(-len(payload) // 4) * 4, b"\0"), "<u4")
    decoder, family = stream.queue.RangeDecoder(words.astype(np.uint32)), stream.model.Categorical(perfect=False)

    def decode(weights: np.ndarray, digits: Tensor | None) -> Tensor:
        return torch.from_numpy(decoder.decode(family, weights).astype(np.int64))

    labels = torch.zeros(images, dtype=torch.int64) if labelled else None  # only their number is read
    try:
        return _code(priors, images, grids, decode, labels=labels, callback=callback)
    except AssertionError as error:
        if "compressed data" not in str(error):  # of the library, for bits that no encoder writes
            raise
        return None


def quantized_weights(logits: Float[Tensor, "b r"]) -> Float[np.ndarray, "b r"]:
    """Returns integer weights of the values of a digit, proportional to their probabilities, in float64.

    Each logit is rounded relative to the largest, which gets 2**24; the smallest weight is 1.
    """
    steps = (logits.amax(-1, keepdim=True) - logits) * (STEPS_PER_OCTAVE / math.log(2))
    return WEIGHTS[steps.round().clamp(max=len(WEIGHTS) - 1).long()].double().numpy()


@torch.no_grad()
def _code(
    priors: Sequence[Prior],
    images: int,
    grids: Sequence[tuple[int, int]],
    code_digits: CodeDigits,
    *,
    codes: Codes | None = None,
    labels: Tensor | None = None,
    callback: Callable[[int], object] | None = None,
) -> Codes:
    """Codes all digits in order: by batch, level, position, digit and row. Returns the codes."""
    exact = [copy.deepcopy(require_causal(prior)).cpu().double() for prior in priors]
    coded: list[Codes] = []
    for rows in torch.arange(images).split(BATCH_ROWS):
        batch_labels, upper = None, ()
        if labels is not None:
            classes = max(prior.classes for prior in exact) + 1  # -1, no class, is one of them
            batch_labels = code_digits(np.ones((len(rows), classes)), labels[rows] + 1) - 1
        for level, (prior, grid) in enumerate(zip(exact, grids, strict=True)):
            true = None if codes is None else codes[level][rows].flatten(1)
            upper += (_code_level(prior, len(rows), grid, code_digits, true, batch_labels, upper),)
        coded.append(upper)
        if callback is not None:
            callback(len(rows))
    return tuple(torch.cat(level) for level in zip(*coded, strict=True))


def _code_level(
    prior: CausalPrior,
    b: int,
    grid: tuple[int, int],
    code_digits: CodeDigits,
    true: Tensor | None,
    labels: Tensor | None,
    upper: Codes,
) -> Int64[Tensor, "b h w"]:
    """Codes the grids of one level, and returns them; `true` holds the codes `(b, n)` when encoding."""
    steps = prior.decode_stepwise(b, *grid, labels, cast(Any, upper))
    code, positions = None, []
    for position in range(grid[0] * grid[1]):
        features = next(steps) if code is None else steps.send(code)
        known = None if true is None else prior.head.tree.split(true[:, position])
        code = prior.head.choose(features, partial(_code_digit, code_digits, known))
        positions.append(code)
    return torch.cat(positions, dim=1).view(b, *grid)


def _code_digit(code_digits: CodeDigits, known: Tensor | None, digit: int, logits: Tensor) -> Tensor:
    return code_digits(quantized_weights(logits[:, 0]), None if known is None else known[:, digit])[:, None]


def _constriction() -> Any:
    """Returns the stream codes of `constriction`.

    Raises:
        UserError: if it is not installed, with the extra that installs it.
    """
    try:
        import constriction
    except ImportError as error:
        raise UserError(
            "--prior needs the entropy coder constriction: pip install -e '.[entropy]' in a checkout"
        ) from error
    return constriction.stream  # pyright: ignore[reportAttributeAccessIssue] - of the compiled module
