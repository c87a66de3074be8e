"""The type of an evaluation's result, and the names of its scores."""

from typing import Any

Scores = dict[str, dict[str, float]]
"""Maps the name of a score to its values: `model`, `real` for real images (the floor), or a baseline or mode."""

Conditions = dict[str, Any]
"""Facts that the scores depend on besides the settings, as JSON: numbers and digests of images and models."""

SPEEDS = ("images_per_second", "seconds_per_image")
"""Scores that depend on the machine, so a repeated evaluation does not compare them."""


def level_score(name: str, level: int, levels: int) -> str:
    """Returns the name of a score of one level; with a single level there is no suffix."""
    return f"{name}_level_{level}" if levels > 1 else name
