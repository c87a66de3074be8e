"""What is measured of samples in the study of priors: distance and time by steps of sampling, and seams of canvases.

Which priors there are: `reproduce_priors.py`; what is written: `reproduce_priors_report.py`.

Legend: b canvases, c channels, h w pixels, t tiles.
"""

import json
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from smalti.commands.class_labels import draw_labels
from smalti.commands.model_paths import load_prior, load_tokenizer
from smalti.commands.sample import generate_codes, generate_images
from smalti.core.devices import autocast, best_device
from smalti.core.files import write_json
from smalti.evaluation.config import EvaluationSettings
from smalti.evaluation.real_images import Real, real_for
from smalti.images.decoding import to_float, to_uint8
from smalti.metrics.extractors import find_extractor
from smalti.priors.base import Prior
from smalti.priors.methods.autoregressive import AncestralSampling
from smalti.priors.methods.canvas import window_starts
from smalti.priors.methods.masked import MaskedSampling
from smalti.priors.methods.sundae import SundaeSampling
from smalti.studies.priors.study import SETUPS, ReproducePriors
from smalti.studies.priors.training import keyed, tokenizer_of
from smalti.tokenizers.base import Tokenizer

ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Draw:
    """One way to draw.

    Attributes:
        model: whose samples, by its name in the part.
        way: for the table.
        steps: of the network; None where it is one for each code.
        sampling: the sampler's config.
    """

    model: str
    variant: str
    steps: int | None
    sampling: Any


def draws(config: ReproducePriors) -> list[Draw]:
    """All that are compared, by steps; SUNDAE's in two ways where there are fewer than its default has."""
    found, default = [], SundaeSampling()
    for steps in config.step_counts:
        of_default = SundaeSampling(steps=steps, guidance=config.guidance)
        found.append(Draw("SUNDAE", "SUNDAE", steps, replace(of_default, proportion=proportion(steps))))
        if steps < default.steps:
            found.append(Draw("SUNDAE", "SUNDAE, proportions of 100 steps", steps, of_default))
        found.append(Draw("masked codes", "masked codes", steps, MaskedSampling(steps=steps, guidance=config.guidance)))
    found.append(Draw("PixelCNN", "PixelCNN", None, AncestralSampling(guidance=config.guidance)))
    return found


def proportion(steps: int) -> tuple[float, float]:
    """Of SUNDAE's repairs, that gives each code as many turns as the default does in its own steps; all codes at every
    step, where there are too few for that."""
    default = SundaeSampling()
    first, last = (min(1.0, share * default.steps / steps) for share in default.proportion)
    return first, last


class Judge:
    """Real images, and how far others are from them; what is measured is kept in a folder."""

    def __init__(self, config: ReproducePriors) -> None:
        self._config, self._where = config, best_device()
        folder = tokenizer_of(SETUPS["samplers"].grid, config).out
        assert folder is not None
        self._folder: Path = folder

    @cached_property
    def _extractor(self) -> Any:
        return find_extractor("lite0", self._where)

    @cached_property
    def _real(self) -> Real:
        config = self._config
        settings = EvaluationSettings(images=config.images, num=config.num, reference=config.reference)
        return real_for(settings, load_tokenizer(str(self._folder)), self._extractor)

    @torch.no_grad()
    def floors(self) -> dict[str, float]:
        """Distances of held-out images, and of what the tokenizer makes of them."""
        path = self._folder / f"{keyed('floors', self._decides())}.json"
        if not path.exists():
            tokenizer = load_tokenizer(str(self._folder)).to(self._where)
            batches = to_float(self._real.judged).split(ROWS_AT_ONCE)
            made = torch.cat([to_uint8(tokenizer.decode(tokenizer.encode(of.to(self._where)))).cpu() for of in batches])
            held_out = self._real.distance(self._real.judged)
            write_json(path, {"held-out images": held_out, "their reconstructions": self._real.distance(made)})
        return json.loads(path.read_text())

    def of_draw(self, draw: Draw, folder: Path) -> dict[str, float]:
        """Fréchet distance of what a prior draws, and seconds an image: without a GPU those of the processor, as other
        work on the machine would else count."""
        path = folder / f"{keyed('samples', {**self._decides(), 'sampling': repr(draw.sampling)})}.json"
        if not path.exists():
            clock = time.perf_counter if self._where.type == "cuda" else time.process_time
            pair, count = loaded(folder), len(self._real.judged)
            start = clock()
            images = to_uint8(drawn(draw, pair, count, self._config))
            seconds = (clock() - start) / count
            write_json(path, {"frechet": self._real.distance(images), "seconds": seconds, "images": count})
        return json.loads(path.read_text())

    def _decides(self) -> dict[str, Any]:
        return {name: getattr(self._config, name) for name in ("images", "num", "reference", "precision")}


def loaded(folder: Path) -> tuple[Prior, Tokenizer]:
    """A trained prior and its tokenizer, on the best device."""
    prior, tokenizer = load_prior(str(folder), None)
    return prior.to(best_device()), tokenizer.to(best_device())


@torch.no_grad()
def drawn(draw: Draw, pair: tuple[Prior, Tokenizer], count: int, config: ReproducePriors) -> Float[Tensor, "b c h w"]:
    """The first `count` images of seed 0, on the CPU."""
    prior, tokenizer = pair
    return generate_images([prior], tokenizer, num=count, seed=0, sampling=draw.sampling, precision=config.precision)


@dataclass(frozen=True)
class Canvases:
    """Wide images of one prior.

    Attributes:
        windows: painted through overlapping windows.
        tiles: samples side by side, decoded as one image.
        borders: of their columns of pixels but the last, whether a window begins or ends after it.
        tile_borders: whether a tile does.
        code_borders: whether a code does, and neither window nor tile.
    """

    windows: Float[Tensor, "b c h w"]
    tiles: Float[Tensor, "b c h w"]
    borders: Bool[Tensor, " w1"]
    tile_borders: Bool[Tensor, " w1"]
    code_borders: Bool[Tensor, " w1"]


@torch.no_grad()
def canvases(folder: Path, config: ReproducePriors) -> Canvases:
    """As high as the prior was trained on, and `canvas_codes` wide, of seed 0."""
    prior, tokenizer = loaded(folder)
    level, wide = prior.level, config.canvas_codes
    tiles = -(-wide // level.width)
    painted = _codes(prior, config.canvases, (level.height, wide), config)
    tiled = _codes(prior, config.canvases * tiles, (level.height, level.width), config)
    tiled = rearrange(tiled, "(b t) h w -> b h (t w)", t=tiles)[..., :wide]
    starts = window_starts(wide, level.width)
    edges = (torch.cat([starts, starts + level.width]), torch.arange(tiles) * level.width)
    borders, tile_borders = (columns(of, wide, tokenizer.downsampling) for of in edges)
    return Canvases(
        windows=tokenizer.decode((painted,)).cpu(),
        tiles=tokenizer.decode((tiled,)).cpu(),
        borders=borders,
        tile_borders=tile_borders,
        code_borders=columns(torch.arange(wide), wide, tokenizer.downsampling) & ~borders & ~tile_borders,
    )


def _codes(prior: Prior, count: int, grid: tuple[int, int], config: ReproducePriors) -> Int64[Tensor, "b h w"]:
    found, sampling = [], SundaeSampling(steps=config.canvas_steps, guidance=config.guidance)
    for rows in torch.arange(count).split(ROWS_AT_ONCE):
        with autocast(best_device(), config.precision):
            labels = draw_labels(prior, (), rows, 0)
            found.append(generate_codes(prior, rows, labels, seed=0, sampling=sampling, grid=grid))
    return torch.cat(found)


def columns(edges: Int64[Tensor, " n"], wide: int, downsampling: int) -> Bool[Tensor, " w1"]:
    """Whether one of these edges of codes, counted from the left, comes right after each column of pixels but the
    last."""
    found = torch.zeros(wide * downsampling - 1, dtype=torch.bool)
    found[edges[(edges > 0) & (edges < wide)] * downsampling - 1] = True
    return found


def steps_across(images: Float[Tensor, "b c h w"], where: Bool[Tensor, " w1"]) -> Float[Tensor, " b"]:
    """Of each image, the mean absolute difference of pixels across these columns' right edges, in units of [0, 1]."""
    steps = (images[..., 1:] - images[..., :-1]).abs() / 2
    return steps[..., where].mean((1, 2, 3))
