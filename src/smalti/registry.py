"""Kinds by name: which class a checkpoint's `kind`, or `--tokenizer hrvq`, stands for."""

import difflib
from importlib import import_module
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar, cast

from smalti.errors import UserError

if TYPE_CHECKING:
    from smalti.checkpoint import Checkpointed

Family: TypeAlias = Literal["tokenizer", "prior"]

# Named by module, not imported: the spine stands below the wings. Other packages add theirs with `register`.
_MODULES: dict[tuple[Family, str], str] = {
    ("tokenizer", "hams"): "smalti.tokenizers.hams",
    ("tokenizer", "hqa"): "smalti.tokenizers.hqa",
    ("tokenizer", "hrvq"): "smalti.tokenizers.hrvq",
    ("tokenizer", "selfvae"): "smalti.tokenizers.selfvae",
    ("tokenizer", "vae"): "smalti.tokenizers.vae",
    ("tokenizer", "vqgan"): "smalti.tokenizers.vqgan",
    ("tokenizer", "vqvae"): "smalti.tokenizers.vqvae",
    ("tokenizer", "vqvae2"): "smalti.tokenizers.vqvae2",
    ("prior", "hourglass"): "smalti.priors.hourglass",
    ("prior", "maskgit"): "smalti.priors.maskgit",
    ("prior", "pixelcnn"): "smalti.priors.pixelcnn",
    ("prior", "realnvp"): "smalti.priors.realnvp",
}
_CLASSES: dict[tuple[Family, str], "type[Checkpointed]"] = {}


C = TypeVar("C", bound=type)


def register(cls: C) -> C:
    """Class decorator: makes a `Checkpointed` class what its `family` and `kind` stand for."""
    model = cast("type[Checkpointed]", cls)
    _CLASSES[model.family, model.kind] = model
    return cls


def kinds(family: Family) -> list[str]:
    """The registered kinds of one family, sorted."""
    return sorted({kind for owner, kind in (*_MODULES, *_CLASSES) if owner == family})


def find(family: Family, kind: str) -> "type[Checkpointed]":
    """The class of a kind.

    Raises:
        UserError: if there is no such kind; suggests the nearest.
    """
    if (family, kind) not in _CLASSES and (family, kind) in _MODULES:
        import_module(_MODULES[family, kind])
    if (family, kind) not in _CLASSES:
        nearest = difflib.get_close_matches(kind, kinds(family), n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"kinds: {', '.join(kinds(family))}"
        raise UserError(f"there is no {family} of kind {kind!r}; {hint}")
    return _CLASSES[family, kind]
