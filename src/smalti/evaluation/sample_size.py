"""Numbers of images that the scores of an evaluation need, and warnings for results with fewer.

A Fréchet distance needs at least as many images as features have dimensions: with fewer, the covariance is singular and
the distance is too large. Precision and recall of a few images are near 1 even for poor samples, because the spheres
around few images are large.
"""

import math

from smalti.evaluation.scores import Conditions, Scores

PRECISION_RECALL_IMAGES = 1000
"""Images needed for precision and recall; with fewer, the spheres around them are so large that noise falls inside."""
COPY_IMAGES = 100
"""Held-out images needed for `share_too_near`, whose threshold is a 5 % quantile: five images lie below it."""
_NEEDED = {"precision": PRECISION_RECALL_IMAGES, "recall": PRECISION_RECALL_IMAGES, "share_too_near": COPY_IMAGES}


def too_few_images(scores: Scores, conditions: Conditions) -> list[str]:
    """Returns a warning, with the number of images that is needed, for all scores that have fewer."""
    needed = {name: _NEEDED[name] for name in scores if name in _NEEDED}
    if "feature_dimensions" in conditions:
        needed |= {name: conditions["feature_dimensions"] for name in scores if name.startswith("frechet")}
    images = conditions["images"]
    references = conditions.get("reference_images", math.inf)  # stored statistics do not record it
    more = "more images in both sets" if "reference" in conditions else None  # of two sets of images without a model
    warnings = []
    for number in sorted(set(needed.values()), reverse=True):
        names = [name for name in needed if needed[name] == number]
        reference_counts = references < number and names != ["share_too_near"]
        if images < number or reference_counts:
            flag = " and --reference" if reference_counts else ""
            have = f"{images} images" + (f" and {references} reference images" if reference_counts else "")
            warnings.append(
                f"{', '.join(names)} of {have} {'is' if len(names) == 1 else 'are'} unreliable; at least {number} are "
                f"needed ({more or f'--num{flag}, or more --images'})"
            )
    return warnings
