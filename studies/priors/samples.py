"""Measurements of samples in the study of priors: Fréchet distance and time by sampling steps, and seams of canvases.

Which priors there are is in `study.py`, the written report in `report.py`.

Legend: b canvases, c channels, h w pixels, t tiles.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from smalti.commands.class_labels import draw_labels
from smalti.commands.generating import generate_codes, generate_images
from smalti.commands.model_paths import load_prior_with_tokenizer
from smalti.core.devices import autocast, best_device
from smalti.evaluation.config import EvaluationSettings
from smalti.evaluation.real_images import RealImages, real_for
from smalti.metrics.extractors import find_extractor
from smalti.priors.base import Prior
from smalti.priors.methods.autoregressive import AncestralSampling
from smalti.priors.methods.canvas import window_starts
from smalti.priors.methods.masked import MaskedSampling
from smalti.priors.methods.sundae import SundaeSampling
from smalti.studies.experiment import FrechetEvaluator, Trial
from smalti.studies.priors.study import SETUPS, ReproducePriors
from smalti.studies.priors.training import digest_of, keyed, tokenizer_of
from smalti.tokenizers.base import Tokenizer

ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Draw:
    """A model and the settings of its sampler.

    Attributes:
        model: the model's name in the part.
        variant: the name of the sampler's variant in the table.
        steps: sampling steps; None for one step per code.
        sampling: the sampler's config.
    """

    model: str
    variant: str
    steps: int | None
    sampling: Any


HUNDRED_STEPS = SundaeSampling(steps=100, proportion=(0.3, 0.1), order="random")
"""The sampler that fewer steps are compared with: the default when the study was made."""


def draws(config: ReproducePriors) -> list[Draw]:
    """Returns all settings that are compared. SUNDAE with fewer steps also keeps the proportions of 100 steps."""
    result = []
    for steps in config.step_counts:
        sundae = replace(HUNDRED_STEPS, steps=steps, guidance=config.guidance)
        result.append(Draw("SUNDAE", "SUNDAE", steps, replace(sundae, proportion=proportion(steps))))
        if steps < HUNDRED_STEPS.steps:
            result.append(Draw("SUNDAE", "SUNDAE, proportions of 100 steps", steps, sundae))
        masked = MaskedSampling(steps=steps, guidance=config.guidance)
        result.append(Draw("masked codes", "masked codes", steps, masked))
    result.append(Draw("PixelCNN", "PixelCNN", None, AncestralSampling(guidance=config.guidance)))
    return result


def proportion(steps: int) -> tuple[float, float]:
    """Returns the proportions for which SUNDAE updates each code as often in `steps` as `HUNDRED_STEPS` does.

    They are at most 1: with too few steps, all codes are updated at every step.
    """
    first, last = (min(1.0, share * HUNDRED_STEPS.steps / steps) for share in HUNDRED_STEPS.proportion)
    return first, last


class SampleEvaluator(FrechetEvaluator):
    """Measures Fréchet distances to real images; results are kept in the runs' folders.

    Args:
        config: of the study.
    """

    def __init__(self, config: ReproducePriors) -> None:
        folder = tokenizer_of(SETUPS["samplers"].grid, config).out
        assert folder is not None
        self._config, self._trial = config, Trial(folder)
        self._settings = {name: getattr(config, name) for name in ("images", "num", "reference", "precision")}
        super().__init__(digest_of(self._settings), self._read_real)

    def _read_real(self) -> RealImages:
        config = self._config
        settings = EvaluationSettings(images=config.images, num=config.num, reference=config.reference)
        return real_for(settings, self._trial.tokenizer(), find_extractor("lite0", best_device()))

    def floors(self) -> dict[str, float]:
        """Returns the distances of held-out images and of their reconstructions by the tokenizer."""

        def measure() -> dict[str, float]:
            decoded = self.reconstruction_scores(self._trial.tokenizer(), ROWS_AT_ONCE)
            return {
                "held-out images": self.held_out_scores()["frechet"],
                "their reconstructions": decoded["frechet"],
            }

        return self.result(self._trial, "floors", measure)

    def evaluate(self, draw: Draw, folder: Path) -> dict[str, float]:
        """Returns the Fréchet distance of a prior's samples, and the seconds per image.

        Without a GPU the seconds are CPU time, so that other work on the machine does not count.
        """

        def measure() -> dict[str, float]:
            clock = time.perf_counter if best_device().type == "cuda" else time.process_time
            pair, count = loaded(folder), len(self.real.judged)
            start = clock()
            images = sample_images(draw, pair, count, self._config)
            seconds = (clock() - start) / count
            return {**self.scores(images), "seconds": seconds, "images": count}

        return Trial(folder).result(keyed("samples", {**self._settings, "sampling": repr(draw.sampling)}), measure)


def loaded(folder: Path) -> tuple[Prior, Tokenizer]:
    """Returns a trained prior and its tokenizer, on the best device."""
    prior, tokenizer = load_prior_with_tokenizer(str(folder), None)
    return prior.to(best_device()), tokenizer.to(best_device())


@torch.no_grad()
def sample_images(
    draw: Draw, pair: tuple[Prior, Tokenizer], count: int, config: ReproducePriors
) -> UInt8[Tensor, "b c h w"]:
    """Returns the first `count` samples of seed 0, on the CPU."""
    prior, tokenizer = pair
    return generate_images([prior], tokenizer, num=count, seed=0, sampling=draw.sampling, precision=config.precision)


@dataclass(frozen=True)
class Canvases:
    """Wide images of one prior, and masks over their columns of pixels but the last.

    Attributes:
        windows: sampled through overlapping windows.
        tiles: samples side by side, decoded as one image.
        borders: whether a window starts or ends after the column.
        tile_borders: whether a tile does.
        code_borders: whether a code does, but no window and no tile.
    """

    windows: Float[Tensor, "b c h w"]
    tiles: Float[Tensor, "b c h w"]
    borders: Bool[Tensor, " w1"]
    tile_borders: Bool[Tensor, " w1"]
    code_borders: Bool[Tensor, " w1"]


@torch.no_grad()
def canvases(folder: Path, config: ReproducePriors) -> Canvases:
    """Samples canvases of the trained height and a width of `canvas_codes`, with seed 0."""
    prior, tokenizer = loaded(folder)
    level, width = prior.level, config.canvas_codes
    tiles = -(-width // level.width)
    windowed = _codes(prior, config.canvases, (level.height, width), config)
    tiled = _codes(prior, config.canvases * tiles, (level.height, level.width), config)
    tiled = rearrange(tiled, "(b t) h w -> b h (t w)", t=tiles)[..., :width]
    starts = window_starts(width, level.width)
    edges = (torch.cat([starts, starts + level.width]), torch.arange(tiles) * level.width)
    borders, tile_borders = (columns(positions, width, tokenizer.downsampling) for positions in edges)
    return Canvases(
        windows=tokenizer.decode((windowed,)).cpu(),
        tiles=tokenizer.decode((tiled,)).cpu(),
        borders=borders,
        tile_borders=tile_borders,
        code_borders=columns(torch.arange(width), width, tokenizer.downsampling) & ~borders & ~tile_borders,
    )


def _codes(prior: Prior, count: int, grid: tuple[int, int], config: ReproducePriors) -> Int64[Tensor, "b h w"]:
    batches, sampling = [], replace(HUNDRED_STEPS, steps=config.canvas_steps, guidance=config.guidance)
    for rows in torch.arange(count).split(ROWS_AT_ONCE):
        with autocast(best_device(), config.precision):
            labels = draw_labels(prior, (), rows, 0)
            batches.append(generate_codes(prior, rows, labels, seed=0, sampling=sampling, grid=grid))
    return torch.cat(batches)


def columns(edges: Int64[Tensor, " n"], width: int, downsampling: int) -> Bool[Tensor, " w1"]:
    """Returns for each column of pixels but the last whether one of the edges lies right after it.

    `edges` are counted in codes from the left, `width` is the width of the canvas in codes.
    """
    result = torch.zeros(width * downsampling - 1, dtype=torch.bool)
    result[edges[(edges > 0) & (edges < width)] * downsampling - 1] = True
    return result


def differences_across(images: Float[Tensor, "b c h w"], selected: Bool[Tensor, " w1"]) -> Float[Tensor, " b"]:
    """Returns each image's mean absolute difference of pixels across the right edges of the selected columns.

    The unit is that of pixels in [0, 1].
    """
    differences = (images[..., 1:] - images[..., :-1]).abs() / 2
    return differences[..., selected].mean((1, 2, 3))
