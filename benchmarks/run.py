"""The benchmark runner: times the variants of every section and writes Markdown tables of the results.

The sections are in `training.py`, `priors.py`, `parity.py`, `head.py`, `ancestral.py`, `latents.py`, `strips.py`,
`blending.py` and `megapixel.py`.
"""

import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from smalti.benchmarks import ancestral, blending, head, latents, megapixel, parity, priors, strips, training
from smalti.benchmarks.comparison import Comparison, Measured, Variant, synchronize
from smalti.core import locks
from smalti.core.errors import require_at_least_one
from smalti.core.files import whole_file
from smalti.core.provenance import machine

Section: TypeAlias = Literal[
    "search",
    "latents",
    "prior",
    "hourglass",
    "head",
    "sampler",
    "ancestral",
    "training",
    "norm",
    "parity",
    "strips",
    "blending",
    "megapixel",
]

SECTIONS: dict[Section, Callable[[], Iterator[Comparison]]] = {
    "search": training.search,
    "latents": latents.latents,
    "prior": priors.prior,
    "hourglass": priors.hourglass,
    "head": head.head,
    "sampler": priors.sampler,
    "ancestral": ancestral.ancestral,
    "training": training.training,
    "norm": training.group_norm,
    "parity": parity.parity,
    "strips": strips.strips,
    "blending": blending.blending,
    "megapixel": megapixel.megapixel,
}
FOR_A_GPU: tuple[Section, ...] = ("megapixel",)
"""Sections that take hours without a GPU."""


@dataclass(frozen=True)
class Benchmark:
    """Settings of the benchmark.

    Raises:
        UserError: if there are no repetitions.
    """

    only: tuple[Section, ...] = tuple(section for section in SECTIONS if section not in FOR_A_GPU)
    """Sections to measure. `megapixel` needs a GPU and is left out by default."""
    repetitions: int = 5
    """Timed runs of each variant, after one warm-up run. The tables show medians."""
    out: Path | None = None
    """A Markdown file to write the tables to. Existing tables of these sections are replaced, new ones are appended."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "repetitions")


def benchmark(config: Benchmark) -> None:
    """Measures each section, prints its table, and writes it to `out` as soon as it is measured.

    The variants of a comparison run in turns, so that a machine that slows down affects all of them equally.
    """
    for section in dict.fromkeys(config.only):
        torch.manual_seed(0)
        measured = []
        for comparison in SECTIONS[section]():
            measured.append((comparison, medians(comparison, config.repetitions)))
        repeated = any(comparison.varies for comparison, _ in measured)
        text = f"{machine()}{f'; medians of {config.repetitions}' if repeated else ''}.\n\n{table(measured)}"
        print(f"## {section}\n\n{text}\n", flush=True)
        if config.out:
            insert(config.out, section, text)


def medians(comparison: Comparison, repetitions: int) -> list[float]:
    """Returns the median result of each variant, seconds per unit for most. The first turn is a warm-up."""
    results: list[list[float]] = [[] for _ in comparison.variants]
    for turn in range(repetitions + 1 if comparison.varies else 1):
        for variant, times in zip(comparison.variants, results, strict=True):
            measured = clock(variant)
            if turn or not comparison.varies:
                times.append(measured)
    return [statistics.median(times) for times in results]


def clock(variant: Variant) -> float:
    """Runs a variant once; returns its seconds per unit, or its own measurement if it returns `Measured`."""
    synchronize()
    start = time.perf_counter()
    result = variant.work()
    synchronize()
    return float(result) if isinstance(result, Measured) else (time.perf_counter() - start) / variant.units


def table(measured: list[tuple[Comparison, list[float]]]) -> str:
    """Formats a Markdown table: each variant's result, its ratio to the first variant's, and its target."""
    lines = ["| | measured | relative to smalti | target |", "|---|---:|---:|---|"]
    for comparison, seconds in measured:
        lines.append(f"| **{comparison.path}** | | | |")
        for variant, taken in zip(comparison.variants, seconds, strict=True):
            ratio = taken / seconds[0]
            target = f"{variant.target:g}×: {'met' if ratio >= variant.target else 'missed'}" if variant.target else ""
            lines.append(f"| {variant.name} | {comparison.readable(taken)} | {ratio:.3g}× | {target} |")
    return "\n".join(lines)


def insert(path: Path, section: str, text: str) -> None:
    """Replaces a section's text between its markers in a Markdown file, or appends both to the file.

    Processes that write sections of one file take turns.
    """
    first, last = f"<!-- measured: {section} -->", f"<!-- end: {section} -->"
    block = f"{first}\n{text}\n{last}"
    marked = re.compile(f"{re.escape(first)}.*?{re.escape(last)}", re.DOTALL)
    with locks.writing(path, wait=True):
        before = path.read_text() if path.exists() else ""
        after = marked.sub(lambda _: block, before) if marked.search(before) else f"{before}\n{block}\n".lstrip()
        with whole_file(path) as partial:
            partial.write_text(after)
