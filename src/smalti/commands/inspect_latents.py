"""Inspects a latent set: a summary, a picture of its codes, and a plot of codebook usage.

The text of the summary is in `latentsets/summary.py`.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from matplotlib.figure import Figure
from torch import Tensor

from smalti.commands.model_paths import LATENTS, load_tokenizer
from smalti.core import locks
from smalti.core.codes import Codes, Layout, perplexity
from smalti.core.errors import UserError
from smalti.core.files import whole_file
from smalti.images.sheets import SETTINGS_KEY, embedded_settings, require_png, save_sheet
from smalti.images.sources import local_paths
from smalti.latentsets.reader import LatentSet, require_tokenizer
from smalti.latentsets.summary import Usage, describe
from smalti.tokenizers.base import Tokenizer

CODES_SHOWN = 12
PLOT_KINDS = ("png", "pdf", "svg")


@dataclass(frozen=True)
class InspectLatents:
    """Settings of `inspect_latents`."""

    latents: Path = LATENTS / "hrvq.h5"
    """The latent set: a file, a folder of files or a pattern such as 'folder/*.h5', or the hub id of a data set."""
    verify: bool = False
    """Read the whole set and check it: that no byte and no attribute differs from what was written (digests), and that
    codes, labels, sources and splits are valid."""
    codes: Path | None = None
    """Write a picture to this PNG: the most and least used codes of each level, decoded by the tokenizer [default: no
    picture]."""
    tokenizer: str | None = None
    """The tokenizer that made the set, for --codes: a kind, a folder or a hub id [default: the path recorded in the
    set]."""
    plot: Path | None = None
    """Write a plot to this PNG, PDF or SVG: the share of each code, most used first, for every level and digit
    [default: no plot]."""
    overwrite: bool = False
    """Replace existing files. Without it, only PNGs that this command made from the same latent set are replaced."""


def inspect_latents(config: InspectLatents) -> None:
    """Prints the summary; verifies, draws and plots as the config asks.

    Raises:
        UserError: for a set that cannot be read, fails verification, or was made by another tokenizer, or for a file
            that cannot be written.
    """
    if config.codes:
        require_png(config.codes, "--codes")
    if config.plot and _plot_kind(config.plot) not in PLOT_KINDS:
        raise UserError(f"{config.plot} cannot be drawn; give a name that ends in .png, .pdf or .svg")
    latent_set = LatentSet(config.latents)
    if (config.codes or config.plot) and not any(level.radices for level in latent_set.layout.levels):
        raise UserError(f"{config.latents} holds no codes but real-valued latents; leave --codes and --plot out")
    settings = {"command": "inspect-latents", "content_digest": latent_set.content_digest}

    def is_own(path: Path) -> bool:
        return embedded_settings(path) == settings

    with ExitStack() as stack:
        inputs = [config.latents, *local_paths(latent_set.provenance.image_source)]
        for flag, out in (("--codes", config.codes), ("--plot", config.plot)):
            if out:
                claim = locks.claim([out], inputs=inputs, overwrite=config.overwrite, is_own=is_own, flag=flag)
                stack.enter_context(claim)
                inputs.append(out)
        _inspect(config, latent_set, settings)


def _inspect(config: InspectLatents, latent_set: LatentSet, settings: dict[str, str]) -> None:
    usage = cache(latent_set.usage)  # summary, picture and plot count the codes once
    print(describe(latent_set, usage))
    if config.verify:
        latent_set.verify()
        covered = "digests match" if latent_set.version > 2 else "digest matches (version 2: attributes have none)"
        print(f"  verified      the {covered}; codes, labels, sources and splits are valid")
    if config.codes:
        tokenizer = load_tokenizer(config.tokenizer or latent_set.provenance.tokenizer_source)
        require_tokenizer(latent_set, tokenizer.digests_of_codes())
        save_codes(config.codes, latent_set, tokenizer, usage, settings=settings)
        print(f"  codes         {config.codes}")
    if config.plot:
        save_plot(config.plot, latent_set, usage, settings=settings)
        print(f"  plot          {config.plot}")


@torch.no_grad()
def save_codes(
    path: Path,
    latent_set: LatentSet,
    tokenizer: Tokenizer,
    usage: Usage,
    *,
    shown: int = CODES_SHOWN,
    settings: dict[str, str] | None = None,
) -> None:
    """Saves a sheet of the most and the least used codes of each level, without unused ones.

    Each code is shown as the decoded image that has it at all positions of its level; every other
    level then has its own most used code everywhere.
    """
    rows: dict[str, Tensor] = {}
    rankings = {index: ranking(counts) for index, counts in _counts(latent_set.layout, usage).items()}
    for index, (ranked, shares) in rankings.items():
        for end, part in (("most", slice(0, shown)), ("least", slice(max(0, len(ranked) - shown), None))):
            first, last = (f"{100 * float(share):.2g} %" for share in shares[part][[0, -1]])
            caption = f"level {index}: the {end} used codes ({first} to {last})"
            rows[caption] = tokenizer.decode(_uniform_codes(latent_set.layout, rankings, index, ranked[part]))
    save_sheet(path, rows, settings=settings)


def save_plot(path: Path, latent_set: LatentSet, usage: Usage, *, settings: dict[str, str] | None = None) -> None:
    """Plots the share of each code in use, most used first: a line for each level and number of first digits."""
    kind = _plot_kind(path)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="rank", ylabel="share of all codes", xscale="log", yscale="log")
    for index, codes in _counts(latent_set.layout, usage).items():
        level = latent_set.layout.levels[index]
        for digits in range(1, len(level.radices) + 1):
            counts = level.prefix_counts(codes, digits)
            shares = ranking(counts)[1]
            used = f"{len(shares)} of {len(counts)} used, perplexity {perplexity(counts):.0f}"
            title = f"level {index}, first {digits} of {len(level.radices)} digits"
            axes.plot(range(1, len(shares) + 1), shares, label=f"{title}: {used}")
    axes.set_title(f"{latent_set.path.name}: {len(latent_set)} rows, {latent_set.layout}")
    axes.legend()
    with whole_file(path) as partial:
        metadata = {SETTINGS_KEY: json.dumps(settings)} if kind == "png" else None
        figure.savefig(partial, format=kind, dpi=150, metadata=metadata)


def _plot_kind(path: Path) -> str:
    """Returns the kind of file that a name ends in, in any case, such as `png`."""
    return path.suffix.removeprefix(".").lower()


def _counts(layout: Layout, usage: Usage) -> dict[int, Int64[Tensor, " _codes"]]:
    """Counts how often each code occurs, for each level but real-valued ones."""
    return {index: usage(index) for index, level in enumerate(layout.levels) if level.radices}


def ranking(counts: Int64[Tensor, " codes"]) -> tuple[Int64[Tensor, " used"], Float[Tensor, " used"]]:
    """Returns the codes in use, most used first (ties by number), and the share of each."""
    ranked = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
    return ranked, counts[ranked] / counts.sum()


def _uniform_codes(
    layout: Layout, rankings: Mapping[int, tuple[Tensor, Tensor]], level: int, codes: Int64[Tensor, " b"]
) -> Codes:
    """Returns, for each of `codes`, the codes of an image that has it at every position of its level."""
    grids = []
    for index, other in enumerate(layout.levels):
        value = torch.zeros(1)
        if other.radices:
            value = codes if index == level else rankings[index][0][:1]
        ones = (1 for _ in other.shape)
        grids.append(value.view(-1, *ones).expand(len(codes), *other.shape).contiguous())
    return tuple(grids)
