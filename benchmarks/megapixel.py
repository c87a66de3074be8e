"""Benchmarks of 1024x1024 images (arXiv 2206.12351): sampling, decoding and training, time and peak memory.

They need a GPU, so they only run if requested. Weights and images are random, as speed and memory depend on neither.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from smalti.benchmarks.comparison import Comparison, Measured, Variant, in_mebibytes
from smalti.benchmarks.priors import random_codes, shape_of, ways_to_draw
from smalti.benchmarks.training import timed_fit
from smalti.commands.presets import f32_megapixel
from smalti.core.devices import autocast, best_device, peak_memory_bytes
from smalti.core.randomness import generator_for
from smalti.priors.networks.hourglass import Hourglass, HourglassConfig
from smalti.tokenizers.vqgan.vqgan import VQGAN, VQGANConfig
from smalti.training.accelerator import accelerator
from smalti.training.batches import Batch
from smalti.training.config import FitConfig

PRIOR = HourglassConfig(32, 32, model_width=1024, heads=16, depth=(2, 12, 2))
"""A network of the width and depth that the paper's authors published for a megapixel, with 16 heads where they have 8.
Grid and codebook are replaced by those of the tokenizer."""
BATCHES = (1, 4)


def megapixel(
    *,
    config: VQGANConfig | None = None,
    prior: HourglassConfig = PRIOR,
    batches: Sequence[int] = BATCHES,
    steps: int = 100,
    training_steps: int = 6,
    compiled: bool = True,
) -> Iterator[Comparison]:
    """Measures time and memory of sampling, decoding and training, by default of the preset `f32-megapixel`."""
    config = config or cast(VQGANConfig, f32_megapixel("vqgan").model)
    yield from _sampling(config, prior, batches, steps, compiled)
    yield from _training(replace(config, discriminator_start=0), batches, training_steps)


def _sampling(
    config: VQGANConfig, shape: HourglassConfig, batches: Sequence[int], steps: int, compiled: bool
) -> Iterator[Comparison]:
    device = best_device()
    tokenizer = VQGAN(config).to(device).eval()
    (level,) = tokenizer.layout.levels
    shape = replace(shape, height=level.height, width=level.width, radices=level.radices)
    network = Hourglass(shape).to(device).eval()
    size = f"{config.height}×{config.width}"

    @torch.no_grad()
    def decode(codes: Tensor) -> Tensor:
        with autocast(device, "auto"):
            return tokenizer.decode((codes,))

    for batch in batches:
        grid = f"{steps} steps of {level.height}×{level.width}"
        yield Comparison(
            f"codes of a {size} sample, {batch} at once: {grid}, {shape_of(shape)}",
            ways_to_draw(network, batch, steps, units=batch, compiled=compiled),
        )

        decoding = partial(decode, random_codes(network, batch))
        yield Comparison(f"decoding a {size} image, {batch} at once", (Variant("smalti", decoding, batch),))
        yield _peak(f"decoding {batch} of {size}, the prior in memory too", {"smalti": decoding})


def _training(config: VQGANConfig, batches: Sequence[int], steps: int) -> Iterator[Comparison]:
    """Measures training steps of both networks in `fit`, with perceptual and adversarial losses and both optimizers.

    Only the smallest batch is also measured without gradient checkpointing: larger ones may run out of memory, which
    would end the benchmark.
    """
    process = accelerator("auto")
    for batch in batches:
        rows = RandomImages(batch, config.height, config.width)
        variants: dict[str, Callable[[], Measured]] = {}
        for checkpointing in (True, False) if batch == min(batches) else (True,):
            fit_config = FitConfig(steps=steps, batch_size=batch, gradient_checkpointing=checkpointing)

            def train(fit_config: FitConfig = fit_config, rows: RandomImages = rows) -> Measured:
                model = VQGAN(config)
                seconds = timed_fit(process, model, model.phases(fit_config), rows, fit_config)
                return Measured(seconds / fit_config.batch_size)

            variants["smalti, --gradient-checkpointing" if checkpointing else "smalti"] = train
        images = f"{batch} of {config.height}×{config.width}"
        yield Comparison(f"training on {images}, an image", [Variant(name, work) for name, work in variants.items()])
        yield _peak(f"training on {images}", variants)


def _peak(name: str, variants: dict[str, Callable[[], Any]]) -> Comparison:
    """Compares peak memory: of tensors during each run on a CUDA device, elsewhere of the process so far."""

    def peak(work: Callable[[], Any]) -> Measured:
        if best_device().type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        work()
        return Measured(peak_memory_bytes(best_device()))

    measured = [Variant(variant, partial(peak, work)) for variant, work in variants.items()]
    return Comparison(f"{name}: peak memory", measured, readable=in_mebibytes, varies=False)


class RandomImages:
    """A dataset of random images, uint8 `(count, 3, height, width)`, kept in memory so that fetching costs nothing."""

    def __init__(self, count: int, height: int, width: int) -> None:
        self._images = torch.randint(256, (count, 3, height, width), dtype=torch.uint8, generator=generator_for(0))

    def __len__(self) -> int:
        return len(self._images)

    def __getitems__(self, rows: list[int]) -> Batch:
        return {"images": self._images[rows], "rows": torch.tensor(rows)}
