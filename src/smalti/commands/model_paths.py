"""Where things are unless the person says otherwise: the working folder, and names that stand for folders in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from smalti.core import models
from smalti.core.config import config_from_json
from smalti.core.errors import UserError
from smalti.core.models import CONFIG_NAME, class_of_checkpoint, load, locate, read_config
from smalti.priors.base import Prior
from smalti.tokenizers.base import Tokenizer
from smalti.training.snapshots import STATES_NAME

RUNS = Path("runs")
TOKENIZERS, LATENTS, PRIORS = RUNS / "tokenizers", RUNS / "latents", RUNS / "priors"


def load_tokenizer(source: str) -> Tokenizer:
    """A trained tokenizer: a kind stands for `runs/tokenizers/KIND`, anything else is a folder or a hub id.

    Raises:
        UserError: as `smalti.core.models.load` does; for a kind not trained yet, with the command that trains it.
    """
    if source in models.kinds("tokenizer"):
        folder = TOKENIZERS / source
        if not (folder / CONFIG_NAME).exists():
            raise UserError(
                f"{folder} is not there: train it first (python scripts/train_tokenizer.py --tokenizer {source}), "
                "or give a folder or hub id"
            )
        return load(folder, "tokenizer")
    return load(source, "tokenizer")


def layer_name(number: int) -> str:
    """Of the folder, within a tokenizer's, of the tokenizer of its first layers; of kinds trained layer by layer."""
    return f"layer-{number}"


def of_layer(source: str, layer: int | None) -> str:
    """Where the tokenizer is that has a trained tokenizer's first layers: itself, without a layer.

    Raises:
        UserError: if there is no such layer, or `source` is no tokenizer.
    """
    if layer is None:
        return source
    folder = TOKENIZERS / source if source in models.kinds("tokenizer") else locate(source)
    described, cls = read_config(folder), cast(type[Tokenizer], class_of_checkpoint(folder, "tokenizer"))
    stages = cls.stages(config_from_json(cls.config_class, described["config"], str(folder / CONFIG_NAME)))
    if not 1 <= layer <= len(stages):
        raise UserError(f"{source} has layers 1 to {len(stages)}; there is no layer {layer}")
    return str(folder if layer == len(stages) else folder / layer_name(layer))


def load_prior(source: str, tokenizer: str | None) -> tuple[Prior, Tokenizer]:
    """A trained prior, with the tokenizer that made its codes: the copy in its folder, or another copy of the same one.

    Raises:
        UserError: as `smalti.core.models.load` does, if the tokenizer is not the one that made the prior's codes, or if
            it has several levels.
    """
    (prior,), decoder = _load((source,), tokenizer)
    if len(decoder.layout.levels) > 1:
        raise UserError(
            f"{source} draws one of several levels; the page shows one, but sample.py and inpaint.py take the priors "
            "of them all"
        )
    return prior, decoder


def load_priors(sources: Sequence[str], tokenizer: str | None) -> tuple[list[Prior], Tokenizer]:
    """The trained priors of all levels of a tokenizer, coarsest first whatever the order given; see `load_prior`.

    Raises:
        UserError: as `load_prior` does, or if there is not one prior for each level.
    """
    if not sources:
        raise UserError("--prior needs at least one prior")
    priors, decoder = _load(sources, tokenizer)
    levels, needed = [prior.provenance.get("level", 0) for prior in priors], list(range(len(decoder.layout.levels)))
    if sorted(levels) != needed:
        raise UserError(
            f"the tokenizer has levels {_listed(needed)}, but the priors given draw {_listed(levels)}; "
            "give one for each level (train_prior.py --level N trains it)"
        )
    return [priors[levels.index(level)] for level in needed], decoder


def prior_class(source: str) -> type[Prior]:
    """The class of a prior given by its kind, folder or hub id, without loading it.

    Raises:
        UserError: as `smalti.core.models.load` does.
    """
    known = source in models.kinds("prior")
    return cast(type[Prior], models.class_of_kind("prior", source) if known else class_of_checkpoint(source, "prior"))


def _load(sources: Sequence[str], tokenizer: str | None) -> tuple[list[Prior], Tokenizer]:
    """The priors, as many and in the order given, and the one tokenizer that made the codes of all of them."""
    folders = [_prior_folder(source) for source in sources]
    priors: list[Prior] = [load(folder, "prior") for folder in folders]
    decoder = load_tokenizer(tokenizer if tokenizer is not None else str(_run_folder(folders[0]) / "tokenizer"))
    found = decoder.digest()
    for source, prior in zip(sources, priors, strict=True):
        expected = prior.provenance.get("tokenizer_digest")
        if found != expected:
            raise UserError(
                f"the prior {source} speaks the codes of tokenizer {str(expected)[:12]}, but "
                f"{tokenizer or f'the copy beside {sources[0]}'} is {found[:12]}; give the one it was trained with"
            )
    return priors, decoder


def _prior_folder(source: str) -> Path:
    if source in models.kinds("prior"):
        if not (PRIORS / source / CONFIG_NAME).exists():
            raise UserError(
                f"{PRIORS / source} is not there: train it first (accelerate launch scripts/train_prior.py "
                f"--prior {source}), or give --prior a folder or hub id"
            )
        return PRIORS / source
    return locate(source)


def _run_folder(folder: Path) -> Path:
    """The folder of the run, in which the tokenizer is, of a prior or of one of the states of its training."""
    return folder.parents[1] if folder.parent.name == STATES_NAME else folder


def _listed(levels: Sequence[int]) -> str:
    return ", ".join(map(str, levels))
