"""Code that all studies share: trials that are trained and measured once, evaluators, and helpers to write a report.

A study trains models, measures each of them once, and writes tables and pictures into a Markdown file. Everything is
kept on disk, so a study that was stopped resumes with the same command. Which models a study trains is in its folder.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from matplotlib.figure import Figure
from torch import Tensor, nn

from smalti.benchmarks.run import insert
from smalti.commands.model_paths import load_tokenizer
from smalti.core.devices import best_device
from smalti.core.files import whole_file, write_json
from smalti.core.provenance import RUN_NAME, logged_values, machine
from smalti.evaluation.real_images import RealImages
from smalti.images.decoding import to_float, to_uint8
from smalti.tokenizers.base import Tokenizer

IMAGES_AT_ONCE = 100
"""Images that are reconstructed in one batch."""


def measure_once(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the result kept at `path` as JSON. If there is none, measures it and keeps it there."""
    if not path.exists():
        write_json(path, measure())
    return json.loads(path.read_text())


@dataclass(frozen=True)
class Trial:
    """One model of a study, or the priors of one tokenizer, in a folder with the results measured of it.

    Attributes:
        folder: The folder, named by everything that decides the training.
    """

    folder: Path

    def result(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns the result kept in the folder as `name`.json, measuring it first if there is none."""
        return measure_once(self.folder / f"{name}.json", measure)

    def tokenizer(self) -> Tokenizer:
        """Loads the tokenizer in the folder onto the best device."""
        return load_tokenizer(str(self.folder)).to(best_device())


def count_parameters(*modules: nn.Module) -> int:
    """Returns the number of parameters of some modules together."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def logged_hours(run: Path) -> float:
    """Returns the hours of a training from its logged rows per second, however often it was resumed."""
    batch_size = json.loads((run / RUN_NAME).read_text())["settings"]["batch_size"]
    logged = logged_values(run, "rows_per_second").items()
    seconds = sum((step - before) * batch_size / rate for (before, _), (step, rate) in pairwise([(0, 1.0), *logged]))
    return seconds / 3600


class Evaluator(ABC):
    """Scores reconstructions or samples against the real images of a study.

    Args:
        key: A name for everything that decides the scores besides the images. It is part of the names of results.
    """

    def __init__(self, key: str) -> None:
        self.key = key

    @abstractmethod
    def scores(self, images: Tensor) -> dict[str, float]:
        """Returns the scores of images, by name."""

    def result(self, trial: Trial, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns a result of a trial that depends on this evaluator, measuring it first if there is none."""
        return trial.result(f"{name}-{self.key}", measure)


class FrechetEvaluator(Evaluator):
    """Scores images by their Fréchet distance to training images.

    The real images are opened when the first distance is measured, so a finished study opens none.

    Args:
        key: See `Evaluator`.
        open_real: A function that opens the real images: held-out ones, and training images as the reference.
    """

    def __init__(self, key: str, open_real: Callable[[], RealImages]) -> None:
        super().__init__(key)
        self._open_real = open_real

    @cached_property
    def real(self) -> RealImages:
        """The real images."""
        return self._open_real()

    def scores(self, images: UInt8[Tensor, "n c h w"]) -> dict[str, float]:
        """Returns the Fréchet distance to the training images, as `frechet`."""
        return {"frechet": self.real.distance(images)}

    def held_out_scores(self) -> dict[str, float]:
        """Returns the scores of the held-out images themselves: samples of a perfect model would have them."""
        return self.scores(self.real.judged)

    def reconstruction_scores(self, tokenizer: Tokenizer, batch_size: int = IMAGES_AT_ONCE) -> dict[str, float]:
        """Returns the scores of a tokenizer's reconstructions of the held-out images, a floor for its priors."""
        return self.scores(reconstruct(tokenizer, self.real.judged, batch_size))


@torch.no_grad()
def reconstruct(
    tokenizer: Tokenizer, pixels: UInt8[Tensor, "n c h w"], batch_size: int = IMAGES_AT_ONCE
) -> UInt8[Tensor, "n c h w"]:
    """Encodes and decodes images batch by batch, in float32."""
    batches = (to_float(batch).to(tokenizer.device) for batch in pixels.split(batch_size))
    return torch.cat([to_uint8(tokenizer.decode(tokenizer.encode(batch))).cpu() for batch in batches])


def write_section(out: Path, section: str, text: str, budget: str) -> None:
    """Writes a section of the report, followed by the machine and the budget that it was measured with."""
    insert(out, section, f"{text}\n\n{machine()}; {budget}.")


def table_row(cells: Iterable[str]) -> str:
    """Formats a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def picture_path(out: Path, *names: str) -> Path:
    """Returns the path of a picture beside the report, named after it."""
    return out.with_name(f"{'-'.join([out.stem, *names])}.png")


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a plot as PNG."""
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=100)
