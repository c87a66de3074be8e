"""Measuring the hot paths and writing down what was found.

What is compared with what is in `training.py`, `priors.py`, `latents.py`,
`strips.py` and `megapixel.py`.
"""

import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from smalti.benchmarks import latents, megapixel, priors, strips, training
from smalti.benchmarks.comparison import Comparison, Measured, Variant, synchronize
from smalti.core.errors import UserError
from smalti.core.files import whole_file
from smalti.core.provenance import machine

Section: TypeAlias = Literal[
    "search", "latents", "prior", "hourglass", "head", "sampler", "ancestral", "training", "strips", "megapixel"
]

SECTIONS: dict[Section, Callable[[], Iterator[Comparison]]] = {
    "search": training.search,
    "latents": latents.latents,
    "prior": priors.prior,
    "hourglass": priors.hourglass,
    "head": priors.head,
    "sampler": priors.sampler,
    "ancestral": priors.ancestral,
    "training": training.training,
    "strips": strips.strips,
    "megapixel": megapixel.megapixel,
}
FOR_A_GPU: tuple[Section, ...] = ("megapixel",)
"""Sections that take hours without one."""


@dataclass(frozen=True)
class Benchmark:
    """What to measure.

    Raises:
        UserError: for no repetitions.
    """

    only: tuple[Section, ...] = tuple(section for section in SECTIONS if section not in FOR_A_GPU)
    """Sections to measure; `megapixel` is for a GPU."""
    repetitions: int = 5
    """How often each way is run, after once to warm up; medians are shown."""
    out: Path | None = None
    """A Markdown file whose tables of these sections are replaced, or added at its end."""

    def __post_init__(self) -> None:
        if self.repetitions < 1:
            raise UserError(f"repetitions must be at least 1, got {self.repetitions}")


def benchmark(config: Benchmark) -> None:
    """Prints a table for each section, and puts each into `out` as soon as it is measured.

    The ways of a comparison take turns, so that a machine that slows down slows all of them.
    """
    for section in dict.fromkeys(config.only):
        torch.manual_seed(0)
        measured = []
        for comparison in SECTIONS[section]():
            measured.append((comparison, medians(comparison, config.repetitions)))
        text = f"{machine()}; medians of {config.repetitions}.\n\n{table(measured)}"
        print(f"## {section}\n\n{text}\n", flush=True)
        if config.out:
            insert(config.out, section, text)


def medians(comparison: Comparison, repetitions: int) -> list[float]:
    """What was measured of each way, seconds a unit for most."""
    found: list[list[float]] = [[] for _ in comparison.variants]
    for turn in range(repetitions + 1 if comparison.varies else 1):
        for variant, results in zip(comparison.variants, found, strict=True):
            measured = clock(variant)
            if turn or not comparison.varies:
                results.append(measured)
    return [statistics.median(results) for results in found]


def clock(variant: Variant) -> float:
    """Seconds a unit of one call, or what it measured itself."""
    synchronize()
    start = time.perf_counter()
    result = variant.work()
    synchronize()
    return float(result) if isinstance(result, Measured) else (time.perf_counter() - start) / variant.units


def table(measured: list[tuple[Comparison, list[float]]]) -> str:
    """A Markdown table: for each way its result, also in units of ours, and what was promised."""
    lines = ["| | measured | of ours | target |", "|---|---:|---:|---|"]
    for comparison, seconds in measured:
        lines.append(f"| **{comparison.path}** | | | |")
        for variant, taken in zip(comparison.variants, seconds, strict=True):
            ratio = taken / seconds[0]
            target = f"{variant.target:g}×: {'met' if ratio >= variant.target else 'missed'}" if variant.target else ""
            lines.append(f"| {variant.name} | {comparison.readable(taken)} | {ratio:.3g}× | {target} |")
    return "\n".join(lines)


def insert(path: Path, section: str, text: str) -> None:
    """Puts a section's text between its markers in a file, or both at its end."""
    first, last = f"<!-- measured: {section} -->", f"<!-- end: {section} -->"
    before = path.read_text() if path.exists() else ""
    block = f"{first}\n{text}\n{last}"
    marked = re.compile(f"{re.escape(first)}.*?{re.escape(last)}", re.DOTALL)
    after = marked.sub(lambda _: block, before) if marked.search(before) else f"{before}\n{block}\n".lstrip()
    with whole_file(path) as partial:
        partial.write_text(after)
