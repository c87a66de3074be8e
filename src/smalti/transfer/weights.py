"""Starting a training from the weights of another model: what fits is taken, what is new stays as it was initialized.

Commands decide which settings may differ between the two models; nothing else may.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, get_args, get_type_hints

import torch
import tyro.conf
from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.core.models import Checkpointed
from smalti.priors.base import Prior
from smalti.priors.conditioning import ClassEmbedding
from smalti.training.snapshots import Snapshots

SUPPRESSED = get_args(tyro.conf.Suppress[int])[1]
"""Marks the fields of configs that are no flags."""
MOST_LINES = 12
"""Most tensors that the table of new weights names."""


class Taken(NamedTuple):
    """The weights that a model took from another one.

    Attributes:
        tensors: names of the tensors that were taken.
        new: the other tensors by name: their shape, and the shape that the other model has, if it has any.
    """

    tensors: list[str]
    new: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]]

    def without_changed(self, model: Checkpointed, other: Checkpointed) -> "Taken":
        """Counts tensors as new that have other values by now, by an initialization from data."""
        own, theirs = model.state_dict(), other.state_dict()
        changed = {name: tuple(own[name].shape) for name in self.tensors if not own[name].equal(theirs[name])}
        tensors = [name for name in self.tensors if name not in changed]
        return Taken(tensors, {**self.new, **{name: (shape, shape) for name, shape in changed.items()}})

    def lines(self, source: str, digest: str, *, complete: bool = True, changed: Sequence[str] = ()) -> list[str]:
        """Describes it: one line, and a line for each new tensor.

        Args:
            source: the other model's name.
            digest: the other model's.
            complete: whether nothing was left out, such as new classes.
            changed: flags of settings that differ and may change what the weights compute.
        """
        begin = f"weights from {source} (digest {digest[:12]}): {len(self.tensors)} tensors"
        flags = " ".join(changed)
        notes = (
            [f"note: {source} has another {flags}; leave {flags} out to continue as it was trained"] if flags else []
        )
        if not self.new:
            return [f"{begin}, which is all" if complete else begin, *notes]
        lines = [
            f"  {name} {_shape(own)}{f', in --init {_shape(theirs)}' if theirs else ''}"
            for name, (own, theirs) in list(self.new.items())[:MOST_LINES]
        ]
        more = [f"  and {len(self.new) - MOST_LINES} more"] if len(self.new) > MOST_LINES else []
        return [f"{begin}; {len(self.new)} are new and start untrained:", *lines, *more, *notes]


@torch.no_grad()
def take_weights(
    model: Checkpointed, other: Checkpointed, source: str, *, resizable: Collection[str], kept: tuple[str, ...] = ()
) -> Taken:
    """Copies every tensor of the other model that has the same name and shape.

    Args:
        model: the model that is to be trained.
        other: a trained model of the same kind.
        source: the other model's name, for errors.
        resizable: config fields that may change the shapes of tensors, or their number.
        kept: beginnings of names of tensors that are not copied, and not reported as new.

    Raises:
        UserError: if the models' kinds or the levels of priors differ, or a tensor differs for another reason than the
            resizable fields; the message names the first one, with both shapes.
    """
    if model.kind != other.kind:
        raise UserError(f"{source} is a {other.kind}, not a {model.kind}; leave --{model.family} out, or --init")
    levels = [each.upper_levels if isinstance(each, Prior) else 0 for each in (model, other)]
    if levels[0] != levels[1]:
        raise UserError(
            f"{source} is a prior of level {levels[1]}, but this one is of level {levels[0]}; give --init one of that "
            "level"
        )
    own, theirs = model.state_dict(), other.state_dict()
    _refuse_other_network(model, other, source, own, resizable)
    own = {name: tensor for name, tensor in own.items() if not name.startswith(kept)}
    taken = [name for name, tensor in own.items() if name in theirs and theirs[name].shape == tensor.shape]
    for name in taken:
        own[name].copy_(theirs[name])
    new = {
        name: (tuple(tensor.shape), tuple(theirs[name].shape) if name in theirs else None)
        for name, tensor in own.items()
        if name not in taken
    }
    return Taken(taken, new)


def changed_settings(model: Checkpointed, other: Checkpointed, *, but: Collection[str]) -> list[str]:
    """Returns the flags of the network's settings in which two models of one kind differ, without those in `but`.

    Settings that the data decides are no flags.
    """
    own, theirs = (dataclasses.asdict(each.config) for each in (model, other))
    hints = get_type_hints(type(model.config), include_extras=True)
    by_data = {name for name, hint in hints.items() if SUPPRESSED in getattr(hint, "__metadata__", ())}
    return [
        f"{name} of the latent set" if name in by_data else f"--{name.replace('_', '-')}"
        for name in own
        if own[name] != theirs[name] and name not in but
    ]


def _refuse_other_network(
    model: Checkpointed, other: Checkpointed, source: str, own: Mapping[str, Tensor], resizable: Collection[str]
) -> None:
    """Compares the model with the other one as it would be with the model's values of the resizable fields."""
    changed = {name: getattr(model.config, name) for name in resizable if hasattr(model.config, name)}
    with torch.random.fork_rng(devices=[]):
        resized = type(other)(dataclasses.replace(other.config, **changed)).state_dict()
    for name in dict.fromkeys((*own, *resized)):
        shapes = [tuple(state[name].shape) if name in state else None for state in (resized, own)]
        if shapes[0] == shapes[1]:
            continue
        there, here = (_shape(shape) if shape else "absent" for shape in shapes)
        raise UserError(
            f"{source} does not fit: {name} is {there} in --init and {here} in this network; the settings that "
            f"differ are {' '.join(changed_settings(model, other, but=resizable))}"
        )


@torch.no_grad()
def take_classes(prior: Prior, other: Prior) -> tuple[list[str], list[str]]:
    """Copies the vectors of the classes that both priors have by name, and that of no class.

    The vectors of other classes start at zero, as in an untrained prior. Without any names, classes are matched by
    number if there are as many.

    Returns:
        The names of the classes that were taken, and of those that were not.
    """
    mine, others = prior.of_class, other.of_class
    if not isinstance(mine, ClassEmbedding) or not isinstance(others, ClassEmbedding):
        return [], []
    own, theirs = mine.vectors.weight, others.vectors.weight
    names, known = (list(each.provenance.get("label_names", ())) for each in (prior, other))
    if not names and not known and own.shape == theirs.shape:
        return [], []
    own.zero_()
    own[0] = theirs[0]
    matched = [name for name in names if name in known]
    for name in matched:
        own[1 + names.index(name)] = theirs[1 + known.index(name)]
    labels = names or [str(number) for number in range(len(own) - 1)]
    return matched, [label for label in labels if label not in matched]


def weights_of_new_vectors(prior: Prior, other: Prior) -> tuple[str, ...]:
    """Returns the beginnings of the names of the weights that read a prior's vectors, if the other's are of another
    source; none otherwise. The embedding of rows without a vector is not among them."""
    sources = [each.provenance.get("condition_source") for each in (prior, other)]
    if not (prior.condition_width and other.condition_width) or sources[0] == sources[1]:
        return ()
    return tuple(f"of_vector.{name}" for name in ("mean", "deviation", "hidden.", "out."))


def take_discriminator(run: Snapshots, discriminator: nn.Module) -> bool:
    """Takes the discriminator in a run's newest snapshot, if it has one of the same size; returns whether it has."""
    step = run.newest(warn=False)
    phases = run.load(step)["phases"] if step else []
    saved: dict[str, Tensor] = phases[1]["objective"] if len(phases) > 1 else {}
    own = discriminator.state_dict()
    fits = {name: each.shape for name, each in saved.items()} == {name: each.shape for name, each in own.items()}
    if fits:
        discriminator.load_state_dict(saved)
    return fits


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "one number"
