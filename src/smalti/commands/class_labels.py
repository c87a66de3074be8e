"""The classes of images to generate: found by the names in the latent set, or sampled as often as they occur in it."""

import unicodedata
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.randomness import Stream, derive, row_seeds, uniform
from smalti.priors.base import Prior
from smalti.priors.head import inverse_cdf


def find_classes(prior: Prior, requested: Sequence[str]) -> dict[str, int]:
    """Returns the requested classes by name, in the requested order.

    A request is a name, the beginning of one, or a class number; `all` alone requests every class that the prior was
    trained on. An exact name comes first, then one that differs in Unicode form (NFC), then one that differs in case,
    then the beginning of one.

    Raises:
        UserError: if the prior has no classes, or a request matches none, several, or a class without training images.
    """
    if requested and not prior.classes:
        raise UserError("this prior has no classes, as its latent set had no labels; leave --classes out")
    names = class_names(prior)
    trained = trained_classes(prior)
    if tuple(requested) == ("all",):
        return {names[number]: number for number in trained}
    classes = {}
    for request in requested:
        matches = _matches(request, names)
        if len(matches) != 1:
            candidates = " or ".join(names[match] for match in matches)
            problem = f"{request!r} may be {candidates}" if matches else f"no class is called {request!r}"
            raise UserError(f"{problem}; there are: {', '.join(names)}")
        if matches[0] not in trained:
            raise UserError(f"the prior was trained on no image of the class {names[matches[0]]!r}; choose another one")
        classes[names[matches[0]]] = matches[0]
    return classes


def class_names(prior: Prior) -> list[str]:
    """Returns the names of a prior's classes; their numbers if the latent set had no names."""
    return prior.provenance.get("label_names") or [str(number) for number in range(prior.classes)]


def trained_classes(prior: Prior) -> list[int]:
    """Returns the classes with at least one training image; all of them if the prior does not record the counts."""
    counts = prior.provenance.get("label_counts", [])[1:]  # without the unlabelled rows
    return [number for number in range(prior.classes) if number >= len(counts) or counts[number]]


def label_counts(
    labels: Int64[Tensor, " rows"], held_out: Bool[Tensor, " rows"], classes: int
) -> Int64[Tensor, " _classes"]:
    """Counts the rows without a label and those of each class; 0 for a class whose rows are all held out.

    Such a class has an untrained embedding, so it must not be sampled.
    """
    counts, trained = (torch.bincount(rows + 1, minlength=classes + 1) for rows in (labels, labels[~held_out]))
    return torch.where(trained > 0, counts, 0)


def _matches(request: str, names: Sequence[str]) -> list[int]:
    """Returns the classes that match a request in the first form of comparison in which any does."""

    def nfc(text: str) -> str:
        return unicodedata.normalize("NFC", text)

    def folded(text: str) -> str:
        return nfc(nfc(text).casefold())

    for form in (str, nfc, folded):
        if exact := [number for number, name in enumerate(names) if form(name) == form(request)]:
            return exact
    return [number for number, name in enumerate(names) if folded(name).startswith(folded(request))]


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
