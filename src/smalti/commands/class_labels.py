"""Which classes of images to draw: by the names that the latent set gave them, or as often as they occur there."""

from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.randomness import Stream, derive, row_seeds, uniform
from smalti.priors.base import Prior
from smalti.priors.head import inverse_cdf


def find_classes(prior: Prior, asked: Sequence[str]) -> dict[str, int]:
    """The classes asked for, by name, in that order: a name or how it begins, a number, or `all`.

    Raises:
        UserError: if the prior has no classes, or not these.
    """
    if asked and not prior.classes:
        raise UserError("this prior knows no classes, as its latent set had no labels; leave --classes out")
    names = prior.provenance.get("label_names") or [str(number) for number in range(prior.classes)]
    if tuple(asked) == ("all",):
        return {name: number for number, name in enumerate(names)}
    found = {}
    for name in asked:
        exact = [number for number, of in enumerate(names) if of.lower() == name.lower()]
        fits = exact or [number for number, of in enumerate(names) if of.lower().startswith(name.lower())]
        if len(fits) != 1:
            which = f"{name!r} may be {' or '.join(names[i] for i in fits)}" if fits else f"no class is called {name!r}"
            raise UserError(f"{which}; there are: {', '.join(names)}")
        found[names[fits[0]]] = fits[0]
    return found


def draw_labels(prior: Prior, classes: Sequence[int], rows: Int64[Tensor, " b"], seed: int) -> Int64[Tensor, " b"]:
    """The class of each sample: those given in turn; where none are, drawn as often as the latent set has them, which
    for a prior that does not say so is any (-1)."""
    if classes:
        return torch.tensor(classes)[rows % len(classes)]
    rows_of_class = torch.tensor(prior.provenance.get("label_counts", [1.0]), dtype=torch.float32)  # none, then each
    shares = (rows_of_class / rows_of_class.sum()).expand(len(rows), -1)
    return inverse_cdf(shares, uniform(derive(row_seeds(seed, rows), Stream.CLASS_LABEL))) - 1


def that_knows_classes(priors: Sequence[Prior]) -> Prior:
    """Of the priors of several levels the one that says which classes there are; all are of one latent set."""
    return next((prior for prior in priors if prior.classes), priors[0])
