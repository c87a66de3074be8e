"""A text summary of a latent set, as `inspect_latents` prints it: provenance, rows, labels and codebook usage."""

import json
from collections.abc import Callable
from typing import TypeAlias

from jaxtyping import Int64
from torch import Tensor

from smalti.core.codes import MOST_COUNTED_CODES, Level, perplexity
from smalti.core.errors import printable
from smalti.latentsets.provenance import Provenance
from smalti.latentsets.reader import LatentSet

Usage: TypeAlias = Callable[[int], Int64[Tensor, " _codes"]]
"""Counts how often each code of a level occurs, as `LatentSet.usage` does."""

LONGEST_TEXT = 4000
"""Longest attribute that is printed whole, in characters."""
_LONGEST_CAPTION = 80
_CLASSES, _EXAMPLES = 8, 3
"""Most classes that are named, and most captions and skipped images."""


def describe(latent_set: LatentSet, usage: Usage | None = None) -> str:
    """Describes provenance, contents and codebook usage in lines of text. Reads the whole file once to count codes.

    Args:
        latent_set: the set.
        usage: counts the codes of a level, as `LatentSet.usage` does, which is the default.
    """
    provenance = latent_set.provenance
    software = ", ".join(f"{name} {number}" for name, number in provenance.software.items())
    files = [extent.path for extent in latent_set.files.extents]
    size = size_text(sum(path.stat().st_size for path in files))
    several = f" in {len(files)} files, {files[0].name} to {files[-1].name}" if len(files) > 1 else ""
    fields = {
        "rows": f"{len(latent_set)}, {latent_set.layout}, {size}{several}",
        "sources": _sources(latent_set),
        "labels": _labels(latent_set),
        "conditions": _conditions(latent_set),
        "captions": _captions(latent_set),
        "skipped": _skipped(latent_set),
        "images": f"{provenance.image_source}, fingerprint {provenance.image_fingerprint}",
        "preprocessing": json.dumps(provenance.preprocessing),
        "tokenizer": _tokenizer(provenance),
        "its config": json.dumps(provenance.tokenizer_config),
        "content": f"digest {latent_set.content_digest}",
        "written": f"{provenance.created} by `{provenance.command}`",
        "software": software,
    }
    texts = {name: _shortened(printable(value[:LONGEST_TEXT])) for name, value in fields.items()}
    lines = [printable(str(latent_set.path)), *(f"  {name:14}{text}" for name, text in texts.items())]
    for index, level in enumerate(latent_set.layout.levels):
        lines.append(f"  level {index}: {level.height}×{level.width} positions")
        lines += [f"    {line}" for line in _usage(level, index, usage or latent_set.usage)]
    return "\n".join(lines)


def _tokenizer(provenance: Provenance) -> str:
    return f"{provenance.tokenizer_kind} from {provenance.tokenizer_source}, digest {provenance.tokenizer_digest}"


def _sources(latent_set: LatentSet) -> str:
    overview = latent_set.overview
    sources, held_out = sum(overview.images.values()), int(overview.label_counts["held_out"].sum())
    flipped = sum(int(columns["flipped"].sum()) for columns in latent_set.files.columns(["flipped"]))
    return f"{sources} source images, {flipped} rows are mirror images, {held_out} rows are held out"


def _labels(latent_set: LatentSet) -> str:
    names, (without, *counts) = latent_set.provenance.label_names, latent_set.overview.rows_of_labels()
    if without == len(latent_set):
        return "none"
    labels = [(label, count) for label, count in enumerate(counts) if count]
    first = labels[:_CLASSES]
    listed = ", ".join(f"{names[label] if names else label} {count}" for label, count in first)
    more = ", …" if len(labels) > _CLASSES else ""
    return f"{len(labels)} classes (rows of each: {listed}{more}), {without} rows without"


def _conditions(latent_set: LatentSet) -> str:
    width, source = latent_set.condition_width, latent_set.provenance.condition_source
    return f"a vector of {width} numbers for each row, from {source}" if width else "none"


def _captions(latent_set: LatentSet) -> str:
    rows = latent_set.captioned_rows()
    if not len(rows):
        return "none"
    some = latent_set.captions(rows[:: -(-len(rows) // _EXAMPLES)].tolist())
    texts = [text if len(text) <= _LONGEST_CAPTION else f"{text[:_LONGEST_CAPTION]}…" for text in some]
    return f"{len(rows)} of {len(latent_set)} rows have one, such as {'; '.join(map(repr, texts))}"


def _skipped(latent_set: LatentSet) -> str:
    skipped = latent_set.provenance.skipped
    if not skipped:
        return "none"
    reasons = "; ".join(str(image.get("reason", "unknown reason")) for image in skipped[:_EXAMPLES])
    return f"{len(skipped)} images that could not be decoded: {reasons}{'; …' if len(skipped) > _EXAMPLES else ''}"


def _usage(level: Level, index: int, usage: Usage) -> list[str]:
    if level.channels:
        return [f"{level.channels} real-valued channels at each"]
    if level.codebook_size > MOST_COUNTED_CODES:
        return [f"codes           {level.codebook_size}, too many to count which are used"]
    leaves = usage(index)
    lines = []
    for digit in range(1, len(level.radices) + 1):
        counts = level.prefix_counts(leaves, digit)
        used, nodes = int((counts > 0).sum()), len(counts)
        title = "codes" if len(level.radices) == 1 else "first digit" if digit == 1 else f"first {digit} digits"
        lines.append(f"{title:15} {used} of {nodes} used ({used / nodes:.1%}), perplexity {perplexity(counts):.1f}")
    return lines


def _shortened(text: str) -> str:
    return text if len(text) < LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…"


def size_text(size_bytes: int) -> str:
    """Returns a number of bytes in the unit in which it is at least 1, such as `512 bytes` or `3.7 MiB`."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size_bytes >= 1 << power:
            return f"{size_bytes / (1 << power):.1f} {unit}"
    return f"{size_bytes} bytes"
