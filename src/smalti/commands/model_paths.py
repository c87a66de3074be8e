"""The default folders of models and latent sets, the models in the package, and loading models by name."""

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

from smalti.core import models
from smalti.core.config import config_from_json, read_json
from smalti.core.errors import UserError
from smalti.core.files import as_name, from_here
from smalti.core.models import CONFIG_NAME, class_described, load, locate, read_config
from smalti.core.progress import print_note
from smalti.core.provenance import RUN_NAME
from smalti.images.image_set import ImageSet
from smalti.images.reading import Reading, read_images_for
from smalti.images.sources import local_paths
from smalti.priors.base import Prior
from smalti.tokenizers.base import Tokenizer
from smalti.training.snapshots import STATES_NAME

RUNS = Path("runs")
TOKENIZERS, LATENTS, PRIORS = RUNS / "tokenizers", RUNS / "latents", RUNS / "priors"
SHIPPED = Path(__file__).parents[1] / "shipped"
"""Models in the package: a folder for each prior, with its tokenizer in a subfolder."""
SHIPPED_DEFAULTS: dict[tuple[models.Family, str], str] = {
    ("tokenizer", "hrvq"): "portraits",
    ("prior", "hourglass"): "portraits",
}
"""The model in the package that stands in for a kind until one is trained."""


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Loads a trained tokenizer, given by any name that `find_model` takes.

    Raises:
        UserError: as `find_model` and `smalti.core.models.load` do.
    """
    return load(find_model(source, "tokenizer"), "tokenizer")


def find_model(source: str | Path, family: models.Family) -> Path:
    """Returns the folder of a trained model.

    Args:
        source: a kind, which stands for `runs/tokenizers/KIND` or `runs/priors/KIND`, or for a model in the package
            if there is no such folder yet, which a line on standard error reports; the name of a model in the package;
            a folder; or a hub id. If a folder has the name of a model in the package or of a kind, a text stands for
            the latter, which a line reports, and a `Path` for the folder.
        family: `tokenizer` or `prior`.

    Raises:
        UserError: if there is none; for a kind that is not trained yet, with the command that trains it.
    """
    if isinstance(source, Path):
        return locate(source)
    shipped, kinds = shipped_models(family), models.kinds(family)
    if source in (*shipped, *kinds) and (Path(source) / CONFIG_NAME).is_file():
        meant = "the one in the package" if source in shipped else "a kind"
        _note_once(
            f"note: the {family} {source!r} is {meant}, not the folder of this name; for the folder, give ./{source}"
        )
    if source in shipped:
        return _shipped_folder(source, family)
    folder = folder_of_kind(source, family)
    if folder is None:
        return locate(source)
    if (folder / CONFIG_NAME).exists():
        return folder
    name = SHIPPED_DEFAULTS.get((family, source), "")
    if name in shipped:
        print_note(f"there is no {folder} yet: using the {family} {name!r} of the package")
        return _shipped_folder(name, family)
    raise UserError(
        f"{folder} does not exist: train it first (python scripts/train_{family}.py --{family} {source}), "
        f"or give --{family} a folder or hub id"
    )


def as_typed(folder: Path, family: models.Family) -> str:
    """Returns a folder as a command line names it: `./vqvae` if it is called like a kind or a model in the package."""
    name = str(folder)
    return os.path.join(os.curdir, name) if name in (*shipped_models(family), *models.kinds(family)) else name


def folder_of_kind(source: str, family: models.Family) -> Path | None:
    """Returns the folder that a kind stands for, whether or not it exists; None if `source` is no kind."""
    return (TOKENIZERS if family == "tokenizer" else PRIORS) / source if source in models.kinds(family) else None


@cache
def _note_once(text: str) -> None:
    """Prints a note, once in each process: a command looks for its models several times."""
    print_note(text)


def find_initial_model(source: str, family: models.Family, run_folder: Path) -> Path:
    """Returns the folder of the model whose weights a run starts from; `source` is as in `find_model`.

    A run that began from the package by the name of its kind has a model of that name by now. If it is resumed, the
    name stands for the model in the package as before.

    Raises:
        UserError: as `find_model` does, or if the model is that of the run itself.
    """
    folder = find_model(source, family)
    if folder.resolve() != run_folder.resolve():
        return folder
    name, run = SHIPPED_DEFAULTS.get((family, source)), run_folder / RUN_NAME
    if name and run.exists() and read_json(run)["settings"].get("init") == source:
        return _shipped_folder(name, family)
    raise UserError(f"--init {source} is the folder of this run itself; give another --out")


class TrainedConfig(NamedTuple):
    """The class and the config of a trained model, read without its weights."""

    model_class: type[models.Checkpointed]
    config: Any


def trained_config(source: str, family: models.Family) -> TrainedConfig:
    """Returns the class and the config of a trained model, given by any name that `find_model` takes.

    Raises:
        UserError: as `find_model` does, or if the folder holds no model of this family.
    """
    folder = find_model(source, family)
    described = read_config(folder)
    cls = class_described(described, folder, family)
    return TrainedConfig(cls, config_from_json(cls.config_class, described["config"], str(folder / CONFIG_NAME)))


def shipped_models(family: models.Family) -> list[str]:
    """Returns the names of the tokenizers or priors in the package, sorted."""
    names = (folder.name for folder in SHIPPED.glob("*"))
    return sorted(name for name in names if (_shipped_folder(name, family) / CONFIG_NAME).exists())


def _shipped_folder(name: str, family: models.Family) -> Path:
    return SHIPPED / name / models.TOKENIZER_FOLDER if family == "tokenizer" else SHIPPED / name


def image_inputs(images: str | None, *, priors: Sequence[str] = (), tokenizer: str | None = None) -> list[Path]:
    """Returns the local images that a command reads, and those that its models record as their training images.

    No output may be written over or among them. Only the configs of models on this disk are read; those of the package
    and of the hub were trained elsewhere.

    Raises:
        UserError: for a config that is not smalti's.
    """
    folders = [folder_of_kind(each, "prior") or Path(each) for each in priors]
    if tokenizer is not None:
        folders.append(folder_of_kind(tokenizer, "tokenizer") or Path(tokenizer))
    local = [folder for folder in folders if os.path.isfile(folder / CONFIG_NAME)]
    sources = [read_config(folder)["provenance"].get("image_source") for folder in local]
    return [path for source in (images, *sources) if isinstance(source, str) for path in local_paths(source)]


def layer_name(number: int) -> str:
    """Returns the subfolder with the first `number` layers of a tokenizer that is trained layer by layer."""
    return f"layer-{number}"


def layer_source(source: str, layer: int | None) -> str:
    """Returns the source of the tokenizer with the first `layer` layers of `source`; `source` if None.

    Raises:
        UserError: if there is no such layer, its folder is missing, or `source` is no tokenizer.
    """
    if layer is None:
        return source
    folder = find_model(source, "tokenizer")
    cls, config = trained_config(as_name(folder), "tokenizer")
    stages = cast(type[Tokenizer], cls).stages(config)
    if not 1 <= layer <= len(stages):
        raise UserError(f"{source} has layers 1 to {len(stages)}; there is no layer {layer}")
    own = folder if layer == len(stages) else folder / layer_name(layer)
    if not own.is_dir():  # its path could be the id of a model on the hub
        raise UserError(
            f"{own} with the first layers of {source} is missing, as it is from every pushed model; copy it from the "
            "training's folder, or give that folder"
        )
    return as_name(own)


def images_for(
    tokenizer: Tokenizer,
    name: str,
    source: str | None,
    height: int | None,
    width: int | None,
    reading: Reading,
    caption_column: str | None = None,
    *,
    shown: bool = True,
) -> ImageSet:
    """Reads images for a tokenizer, at its size unless another one is given; see `read_images_for`."""
    return read_images_for(
        tokenizer.provenance,
        name,
        source,
        reading,
        height=height or tokenizer.config.height,
        width=width or tokenizer.config.width,
        channels=tokenizer.image_channels,
        caption_column=caption_column,
        shown=shown,
    )


def load_prior_with_tokenizer(source: str, tokenizer: str | None) -> tuple[Prior, Tokenizer]:
    """Loads a trained prior and the tokenizer of its codes, by default the copy in the prior's folder.

    Raises:
        UserError: as `smalti.core.models.load` does; if the tokenizer did not make the prior's
            codes, or has several levels.
    """
    (prior,), decoder = _load((source,), tokenizer)
    if len(decoder.layout.levels) > 1:
        raise UserError(
            f"{source} draws one of several levels, so it cannot draw images alone; use sample.py or inpaint.py with a "
            "prior for each level"
        )
    return prior, decoder


def load_priors(sources: Sequence[str], tokenizer: str | None) -> tuple[list[Prior], Tokenizer]:
    """Loads the priors of all levels of a tokenizer, in any order; returns them coarsest first, and the tokenizer.

    Raises:
        UserError: as `load_prior_with_tokenizer` does, or if there is not one prior for each level.
    """
    if not sources:
        raise UserError("--prior needs at least one prior")
    priors, decoder = _load(sources, tokenizer)
    return coarsest_first(priors, decoder), decoder


def coarsest_first(priors: Sequence[Prior], tokenizer: Tokenizer) -> list[Prior]:
    """Returns the priors of all levels of a tokenizer, given in any order, coarsest first.

    Raises:
        UserError: if there is not one prior for each level.
    """
    levels, needed = [prior.provenance.get("level", 0) for prior in priors], list(range(len(tokenizer.layout.levels)))
    if sorted(levels) != needed:
        raise UserError(
            f"the tokenizer has levels {_listed(needed)}, but the priors given draw {_listed(levels)}; "
            "give one for each level (train_prior.py --level N trains it)"
        )
    return [priors[levels.index(level)] for level in needed]


def prior_class(source: str) -> type[Prior]:
    """Returns the class of a prior, given by any name that `find_model` takes, without loading its weights.

    Raises:
        UserError: as `find_model` and `smalti.core.models.class_described` do.
    """
    if source in models.kinds("prior"):
        return cast(type[Prior], models.class_of_kind("prior", source))
    folder = find_model(source, "prior")
    return cast(type[Prior], class_described(read_config(folder), folder, "prior"))


def require_config(model_class: type[models.Checkpointed], config: object) -> None:
    """Refuses the config of another kind than the named one. Command lines cannot mix them, programs can.

    Raises:
        UserError: naming the kind's config class.
    """
    if not isinstance(config, model_class.config_class):
        raise UserError(
            f"the {model_class.family} is {model_class.kind}, but its model is a {type(config).__name__}; give a "
            f"{model_class.config_class.__name__}, or the kind of this one"
        )


def _load(sources: Sequence[str], tokenizer: str | None) -> tuple[list[Prior], Tokenizer]:
    """Loads the priors in the given order, and the tokenizer that made the codes of all of them."""
    priors = [load_prior(source) for source in sources]
    decoder = load_tokenizer(tokenizer) if tokenizer is not None else tokenizer_beside(priors[0])
    require_same_codes(priors, decoder, names=sources, decoder_name=tokenizer or f"the copy in {sources[0]}")
    return priors, decoder


def load_prior(source: str | Path) -> Prior:
    """Loads a trained prior, given by any name that `find_model` takes, without its tokenizer.

    Raises:
        UserError: as `find_model` and `smalti.core.models.load` do.
    """
    return load(find_model(source, "prior"), "prior")


def tokenizer_beside(prior: Prior) -> Tokenizer:
    """Loads the copy of the tokenizer in the folder that a prior was loaded from.

    Raises:
        UserError: if the prior was not loaded from a folder, the copy is missing, or as `smalti.core.models.load` does.
    """
    if prior.folder is None:
        raise UserError("this prior was not loaded from a folder; give its tokenizer too")
    copy = from_here(_run_folder(prior.folder) / models.TOKENIZER_FOLDER)
    if not copy.is_dir():  # its path could be the id of a model on the hub
        raise UserError(f"the prior's copy of its tokenizer is missing: put it at {copy}, or give the tokenizer too")
    return load(copy, "tokenizer")


def require_same_codes(
    priors: Sequence[Prior],
    tokenizer: Tokenizer,
    *,
    names: Sequence[str] = (),
    decoder_name: str = "the tokenizer given",
) -> None:
    """Refuses a tokenizer that does not encode as the one that made the codes of the priors.

    Args:
        priors: trained priors.
        tokenizer: to decode their codes with.
        names: of the priors, for the error.
        decoder_name: of the tokenizer, for the error.

    Raises:
        UserError: naming the first prior that was trained on other codes.
    """
    digests = tokenizer.digests_of_codes()
    for number, prior in enumerate(priors):
        expected = prior.provenance.get("tokenizer_digest")
        if expected not in digests:
            raise UserError(
                f"the prior {names[number] if names else prior.kind} was trained on codes of the tokenizer "
                f"{str(expected)[:12]}, but {decoder_name} is {digests[0][:12]}; give the one it was trained with"
            )


def _run_folder(folder: Path) -> Path:
    """Returns the run's folder, which holds the tokenizer, for a prior or a snapshot of its training."""
    return folder.parents[1] if folder.parent.name == STATES_NAME else folder


def _listed(levels: Sequence[int]) -> str:
    return ", ".join(map(str, levels))
