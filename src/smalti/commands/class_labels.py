"""The conditions of images to generate: vectors; or classes, found by their names or drawn as often as they occur."""

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from smalti.core.errors import UserError, whole_number
from smalti.core.randomness import Stream, derive, row_seeds, uniform
from smalti.latentsets.conditions import read_vectors, require_vectors, to_array, to_half
from smalti.priors.base import Prior
from smalti.priors.conditioning import Condition
from smalti.priors.head import inverse_cdf

MOST_NAMES = 20
"""Most names of classes in a line."""


def find_classes(prior: Prior, requested: Iterable[str | SupportsIndex] | None) -> list[int]:
    """Returns the number of each requested class, in the requested order and as often as it is requested.

    A request is a name, the beginning of one, or the number of a class as an integer; `all` alone requests every class
    that the prior was trained on. An exact name comes first, then one that differs in Unicode form (NFC), then one that
    differs in case, then the beginning of one.

    Raises:
        UserError: if the prior has no classes, or a request matches none, several, or a class without training images.
    """
    requests = _requests(requested)
    if requests and not prior.classes:
        raise UserError("this prior has no classes, as its latent set had no labels; leave --classes out")
    names = class_names(prior)
    trained = trained_classes(prior)
    if requests == ("all",):
        return trained
    classes = []
    for request in requests:
        matches = _matches(request, names)
        if len(matches) != 1:
            candidates = " or ".join(names[match] for match in matches)
            problem = f"{request!r} may be {candidates}" if matches else f"no class is called {request!r}"
            raise UserError(f"{problem}; there are: {', '.join(names)}")
        if matches[0] not in trained:
            raise UserError(f"the prior was trained on no image of the class {names[matches[0]]!r}; choose another one")
        classes.append(matches[0])
    return classes


def _requests(classes: Iterable[str | SupportsIndex] | None) -> tuple[str | int, ...]:
    """Returns the requested classes as a tuple, since an iterator can be read only once; None requests none.

    Raises:
        UserError: if they are a text, whose letters would be read as classes, or are no names and integers.
    """
    if isinstance(classes, str):
        raise UserError(f"classes is the text {classes!r}; give a list of names, such as [{classes!r}]")
    if classes is None:
        return ()
    if not isinstance(classes, Iterable):
        raise UserError(f"classes is {classes!r}; give a list of names, or of the numbers of classes")
    return tuple(each if isinstance(each, str) else whole_number("a class", each) for each in classes)


def class_names(prior: Prior) -> list[str]:
    """Returns the names of a prior's classes; their numbers if the latent set had no names."""
    return prior.provenance.get("label_names") or [str(number) for number in range(prior.classes)]


def numbers_of(prior: Prior, labels: Int64[Tensor, " n"], label_names: Sequence[str]) -> Int64[Tensor, " n"]:
    """Returns the prior's number of the class that each label names; -1 if it has none of that name, or for no label.

    Args:
        prior: a prior with classes.
        labels: the labels of images, -1 for none.
        label_names: the names of the labels 0, 1, ...
    """
    numbers = {name: number for number, name in enumerate(class_names(prior))}
    return torch.tensor([*(numbers.get(name, -1) for name in label_names), -1])[labels]


def trained_classes(prior: Prior) -> list[int]:
    """Returns the classes with at least one training image; all of them if the prior does not record the counts."""
    counts = prior.provenance.get("label_counts", [])[1:]  # without the unlabelled rows
    return [number for number in range(prior.classes) if number >= len(counts) or counts[number]]


def label_counts(
    training: Int64[np.ndarray, " _n"], held_out: Int64[np.ndarray, " _m"], classes: int
) -> Int64[np.ndarray, " _classes"]:
    """Adds the rows without a label, then those of each class, in both splits; 0 for a class that is all held out.

    Such a class has an untrained embedding, so it must not be sampled.
    """
    trained, others = (np.pad(counts, (0, classes + 1 - len(counts))) for counts in (training, held_out))
    return np.where(trained > 0, trained + others, 0)


def _matches(request: str | int, names: Sequence[str]) -> list[int]:
    """Returns the classes that match a request in the first form of comparison in which any does."""
    if isinstance(request, int):
        return [request] if 0 <= request < len(names) else []

    def nfc(text: str) -> str:
        return unicodedata.normalize("NFC", text)

    def folded(text: str) -> str:
        return nfc(nfc(text).casefold())

    for form in (str, nfc, folded):
        if exact := [number for number, name in enumerate(names) if form(name) == form(request)]:
            return exact
    return [number for number, name in enumerate(names) if folded(name).startswith(folded(request))]


class Conditions(NamedTuple):
    """The conditions of samples, in turn: the numbers of classes, or vectors `(n, v)`; and the name of each."""

    names: list[str]
    values: list[int] | Tensor


def find_conditions(
    priors: Sequence[Prior], classes: Iterable[str | SupportsIndex] | None, vectors: Path | np.ndarray | Tensor | None
) -> Conditions:
    """Returns the conditions that a user asked for: classes by name (see `find_classes`), or vectors as stored.

    Args:
        priors: one for each level, coarsest first.
        classes: the requested classes.
        vectors: the requested vectors, or their file; None for none.

    Raises:
        UserError: for priors of which some are conditioned on classes and others on vectors; for a request that does
            not fit them; as `find_classes` and `smalti.latentsets.conditions.read_vectors` do.
    """
    requests = _requests(classes)
    widths = {prior.condition_width for prior in priors if prior.condition_width}
    if len(widths) > 1 or (widths and any(prior.classes for prior in priors)):
        raise UserError("the priors of the levels are conditioned on different things; train all on classes or vectors")
    if vectors is None:
        if requests and widths:
            raise UserError("this prior is conditioned on vectors, not on classes; give --conditions FILE.npy instead")
        prior = first_conditional(priors)
        numbers, names = find_classes(prior, requests), class_names(prior)
        return Conditions([names[number] for number in numbers], numbers)
    if requests:
        raise UserError("--classes and --conditions cannot be given together, as no prior is conditioned on both")
    name = f"--conditions {vectors}" if isinstance(vectors, Path) else "the array of conditions"
    array = read_vectors(vectors) if isinstance(vectors, Path) else to_array(vectors)
    require_vectors(array, name)
    if not widths:
        raise UserError(f"this prior is not conditioned on vectors; train one with --condition vector to use {name}")
    if array.shape[1] not in widths:
        raise UserError(f"{name} has vectors of {array.shape[1]} numbers, but the prior was trained on {max(widths)}")
    return Conditions([f"vector {row}" for row in range(len(array))], to_half(array).float())


def draw_conditions(
    priors: Sequence[Prior], requested: Sequence[int] | Float[Tensor, "_n _v"], rows: Int64[Tensor, " b"], seed: int
) -> Condition | None:
    """Returns the condition of each sample: the requested ones in turn.

    Without a request it is a class drawn by frequency (see `draw_labels`), or no vector.
    """
    if isinstance(requested, Tensor):
        return requested[rows % len(requested)]
    prior = first_conditional(priors)
    return None if prior.condition_width else draw_labels(prior, requested, rows, seed)


def draw_labels(prior: Prior, classes: Sequence[int], rows: Int64[Tensor, " b"], seed: int) -> Int64[Tensor, " b"]:
    """Returns a class label for each sample: `classes` in turn, or else drawn by their frequency.

    The frequencies are those of the latent set. A prior that does not record them gets -1, any class.
    """
    if classes:
        return torch.tensor(classes)[rows % len(classes)]
    counts = torch.tensor(prior.provenance.get("label_counts", [1.0]), dtype=torch.float32)  # unlabelled rows first
    shares = (counts / counts.sum()).expand(len(rows), -1)
    return inverse_cdf(shares, uniform(derive(row_seeds(seed, rows), Stream.CLASS_LABEL))) - 1


def first_conditional(priors: Sequence[Prior]) -> Prior:
    """Returns the first conditional prior, or the first prior if none is.

    All levels share one latent set, so any class-conditional prior has the class names.
    """
    return next((prior for prior in priors if prior.conditional), priors[0])


def first_names(names: Sequence[str]) -> str:
    """Returns the first `MOST_NAMES` names of classes as a text, with dots for the rest."""
    return ", ".join(names[:MOST_NAMES]) + (" ..." if len(names) > MOST_NAMES else "")
