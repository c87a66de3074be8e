"""The classes of images to generate: found by the names in the latent set, or sampled as often as they occur in it."""

from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.randomness import Stream, derive, row_seeds, uniform
from smalti.priors.base import Prior
from smalti.priors.head import inverse_cdf


def find_classes(prior: Prior, requested: Sequence[str]) -> dict[str, int]:
    """Returns the requested classes by name, in the requested order.

    A request is a name, the beginning of one, or a class number; `all` alone requests every class.

    Raises:
        UserError: if the prior has no classes, or a request matches none or several.
    """
    if requested and not prior.classes:
        raise UserError("this prior has no classes, as its latent set had no labels; leave --classes out")
    names = prior.provenance.get("label_names") or [str(number) for number in range(prior.classes)]
    if tuple(requested) == ("all",):
        return {name: number for number, name in enumerate(names)}
    classes = {}
    for request in requested:
        exact = [number for number, name in enumerate(names) if name.lower() == request.lower()]
        matches = exact or [number for number, name in enumerate(names) if name.lower().startswith(request.lower())]
        if len(matches) != 1:
            candidates = " or ".join(names[match] for match in matches)
            problem = f"{request!r} may be {candidates}" if matches else f"no class is called {request!r}"
            raise UserError(f"{problem}; there are: {', '.join(names)}")
        classes[names[matches[0]]] = matches[0]
    return classes


def draw_labels(prior: Prior, classes: Sequence[int], rows: Int64[Tensor, " b"], seed: int) -> Int64[Tensor, " b"]:
    """Returns a class label for each sample: `classes` in turn, or else drawn by their frequency.

    The frequencies are those of the latent set. A prior that does not record them gets -1, any class.
    """
    if classes:
        return torch.tensor(classes)[rows % len(classes)]
    counts = torch.tensor(prior.provenance.get("label_counts", [1.0]), dtype=torch.float32)  # unlabelled rows first
    shares = (counts / counts.sum()).expand(len(rows), -1)
    return inverse_cdf(shares, uniform(derive(row_seeds(seed, rows), Stream.CLASS_LABEL))) - 1


def first_class_conditional(priors: Sequence[Prior]) -> Prior:
    """Returns the first class-conditional prior, or the first prior if none is.

    All levels share one latent set, so any class-conditional prior has the class names.
    """
    return next((prior for prior in priors if prior.classes), priors[0])
