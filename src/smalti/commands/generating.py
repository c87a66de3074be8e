"""Draws codes and images with a trained prior and tokenizer. Filling parts of given images is in `inpainting.py`.

The command, with its files, is in `sample.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from smalti.commands.class_labels import draw_conditions
from smalti.core.codes import Codes
from smalti.core.devices import Precision, autocast
from smalti.core.progress import bar, counting
from smalti.core.randomness import Stream, derive, row_seeds
from smalti.images.decoding import to_uint8
from smalti.priors.base import Prior
from smalti.priors.conditioning import Condition
from smalti.tokenizers.base import Tokenizer


def generate_images(
    priors: Sequence[Prior], tokenizer: Tokenizer, *, num: int, seed: int, sampling: Any, **options: Any
) -> UInt8[Tensor, "n c h w"]:
    """Generates the first `num` images of a seed at once; see `generate_batches`, also for the options."""
    return torch.cat([*generate_batches(priors, tokenizer, num=num, seed=seed, sampling=sampling, **options)])


@torch.no_grad()
def generate_batches(
    priors: Sequence[Prior],
    tokenizer: Tokenizer,
    *,
    num: int,
    seed: int,
    sampling: Any,
    grids: Sequence[tuple[int, int]] | None = None,
    conditions: Sequence[int] | Float[Tensor, "_n _v"] = (),
    batch_size: int = 64,
    precision: Precision = "auto",
    watch: Callable[[int, Codes], None] | None = None,
) -> Iterator[UInt8[Tensor, "_b _c _h _w"]]:
    """Generates the first `num` images of a seed, batch after batch on the CPU, with a progress bar.

    Args:
        priors: one for each level, coarsest first.
        tokenizer: decodes the priors' codes, on the same device.
        num: the number of images.
        seed: image i depends on it and on i alone.
        sampling: settings for priors of its kind; the others use their defaults.
        grids: rows and columns of each level, if not those of training.
        conditions: classes or vectors, see `draw_conditions`.
        batch_size: images generated at once.
        precision: the priors' precision.
        watch: called after each step of the last level, with the batch's first image and the codes of all levels.
    """
    grids = grids or [(prior.level.height, prior.level.width) for prior in priors]
    samplings = [sampling_for(prior, sampling) for prior in priors]
    batches = range(0, num, batch_size)
    calls = sum(each.calls(*grid) for each, grid in zip(samplings, grids, strict=True))
    with bar(what="sampling", total=len(batches) * calls, unit="step") as progress:
        for index, start in enumerate(batches):
            rows = torch.arange(start, min(start + batch_size, num))
            with autocast(priors[0].device, precision):
                codes = generate_levels(
                    priors,
                    rows,
                    draw_conditions(priors, conditions, rows, seed),
                    grids=grids,
                    seed=seed,
                    samplings=samplings,
                    callback=counting(progress),
                    watch=partial(watch, start) if watch else None,
                )
            seeds = derive(row_seeds(seed, rows), Stream.IMAGE_DETAILS).to(codes[0].device)
            with torch.autocast(codes[0].device.type, enabled=False):  # the caller's own, too
                images = to_uint8(tokenizer.draw(codes, seeds).cpu())
            progress.update((index + 1) * calls - progress.n)  # counts the steps saved by stopping early
            yield images


@torch.no_grad()
def generate_levels(
    priors: Sequence[Prior],
    rows: Int64[Tensor, " b"],
    condition: Condition | None,
    *,
    grids: Sequence[tuple[int, int]],
    seed: int,
    samplings: Sequence[Any],
    callback: Callable[[int, Tensor], None] | None = None,
    watch: Callable[[Codes], None] | None = None,
) -> Codes:
    """Generates the codes of all levels, coarsest first, each conditioned on the coarser levels' codes.

    See `generate_codes`. `watch` is called after each step of the last level with the current codes
    of all levels.
    """
    codes: tuple[Tensor, ...] = ()
    for prior, grid, sampling in zip(priors, grids, samplings, strict=True):

        def after_step(step: int, sampled: Tensor, upper: Codes = codes) -> None:
            if callback is not None:
                callback(step, sampled)
            if watch is not None and len(upper) == len(priors) - 1:
                watch((*upper, sampled.clone()))  # samplers may change their tensor in place

        options = {"grid": grid, "sampling": sampling, "upper": codes, "callback": after_step}
        codes += (generate_codes(prior, rows, condition, seed=seed, **options),)
    return codes


@torch.no_grad()
def generate_codes(
    prior: Prior,
    rows: Int64[Tensor, " b"],
    condition: Condition | None,
    *,
    seed: int,
    sampling: Any,
    upper: Codes = (),
    grid: tuple[int, int] | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Int64[Tensor, "b h w"] | Float[Tensor, "b _c h w"]:
    """Generates codes, or real-valued latents, of one level for the samples `rows` of a seed.

    Each sample is conditioned on its class or vector and on the codes of its coarser levels. This is
    inpainting with nothing known. `grid` is the number of rows and columns, if not that of training.
    """
    height, width = grid or (prior.level.height, prior.level.width)
    level = replace(prior.level, height=height, width=width)
    dtype = torch.int64 if level.radices else torch.float32
    known = torch.zeros(len(rows), *level.shape, dtype=dtype, device=prior.device)
    seeds = row_seeds(seed, rows.to(prior.device))
    return prior.method.sampler(
        prior,
        known=known,
        known_mask=torch.zeros(len(rows), height, width, dtype=torch.bool, device=prior.device),
        seeds=derive(seeds, Stream.LEVEL, len(upper)) if upper else seeds,
        condition=condition.to(prior.device) if condition is not None and prior.conditional else None,
        upper=upper,
        sampling=sampling,
        callback=callback,
    )


def sampling_for(prior: Prior, requested: Any, *, inpainting: bool = False) -> Any:
    """Returns the requested settings of the sampler if they are for the prior's kind, else that kind's defaults.

    The defaults are those for generation, or those for inpainting.
    """
    if isinstance(requested, prior.method.sampling):
        return requested
    return prior.method.filling() if inpainting else prior.method.sampling()
