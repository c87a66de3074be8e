"""The result of decoding every image of a set once: errors and original sizes, kept beside what `datasets` caches.

A result is found by the set's fingerprint, so a changed set is checked again, and the next command with
the same set decodes nothing. Decoding itself is in `image_set.py`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
from datasets.config import HF_DATASETS_CACHE

from smalti.core.files import write_json
from smalti.images.formats.opening import most_pixels

_RECIPE = "smalti 1"  # change it whenever decoding accepts other images
_SAME_PROPORTIONS = 0.02
"""Proportions that differ by less than this share count as the same: at most this much of an image is cut off."""


@dataclass(frozen=True)
class Checks:
    """The result of a check.

    Attributes:
        errors: the error of each image that cannot be decoded, by its index.
        sizes: the number of the other images of each original size (height, width), in pixels.
        unreadable: whether the bytes of some could not be read, so that the set's fingerprint does not identify them.
    """

    errors: dict[int, str]
    sizes: Counter[tuple[int, int]]
    unreadable: bool = False

    def of_other_proportions(self, height: int, width: int) -> int:
        """Returns the number of images whose proportions differ from `height` : `width`."""
        return sum(
            count
            for (original_height, original_width), count in self.sizes.items()
            if abs(original_width * height - original_height * width)
            > _SAME_PROPORTIONS * min(original_width * height, original_height * width)
        )


def load_checks(fingerprint: str, form: Mapping[str, Any]) -> Checks | None:
    """Returns the kept result for a set; None if there is none or it cannot be read."""
    try:
        kept = json.loads(_path(fingerprint, form).read_text(encoding="utf-8"))
        errors = {int(index): str(error) for index, error in kept["errors"].items()}
        return Checks(errors, Counter({(height, width): count for height, width, count in kept["sizes"]}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def save_checks(checks: Checks, fingerprint: str, form: Mapping[str, Any]) -> None:
    """Keeps the result for a set, unless a file was unreadable, or there is no room: the next command checks again."""
    if checks.unreadable:
        return
    sizes = [[height, width, count] for (height, width), count in sorted(checks.sizes.items())]
    with suppress(OSError):
        write_json(_path(fingerprint, form), {"errors": checks.errors, "sizes": sizes})


def _path(fingerprint: str, form: Mapping[str, Any]) -> Path:
    """Returns the file for a result, which depends on the images, on Pillow and on the limit of pixels."""
    key = f"{_RECIPE} {fingerprint} {form['channels']} {PIL.__version__} {form['limit'] or most_pixels()}"
    key += "" if form["depth"] == 8 else f" {form['depth']}"
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return Path(HF_DATASETS_CACHE) / "smalti-checks" / f"{name}.json"
