"""Where things are unless the person says otherwise: the working folder, and names that stand for folders in it."""

from pathlib import Path

from smalti import registry
from smalti.checkpoint import CONFIG_NAME, load, locate
from smalti.errors import UserError
from smalti.interfaces import Tokenizer
from smalti.priors.prior import Prior
from smalti.states import STATES_NAME

RUNS = Path("runs")
TOKENIZERS, LATENTS, PRIORS = RUNS / "tokenizers", RUNS / "latents", RUNS / "priors"


def load_tokenizer(source: str) -> Tokenizer:
    """A trained tokenizer: a kind stands for `runs/tokenizers/KIND`, anything else is a folder or a hub id.

    Raises:
        UserError: as `smalti.checkpoint.load` does; for a kind not trained yet, with the command that trains it.
    """
    if source in registry.kinds("tokenizer"):
        folder = TOKENIZERS / source
        if not (folder / CONFIG_NAME).exists():
            raise UserError(
                f"{folder} is not there: train it first (python scripts/train_tokenizer.py --tokenizer {source}), "
                "or give a folder or hub id"
            )
        return load(folder, "tokenizer")
    return load(source, "tokenizer")


def load_prior(source: str, tokenizer: str | None) -> tuple[Prior, Tokenizer]:
    """A trained prior, with the tokenizer that made its codes: the copy in its folder, or another copy of the same one.

    Raises:
        UserError: as `smalti.checkpoint.load` does, or if the tokenizer is not the one that made the prior's codes.
    """
    if source in registry.kinds("prior"):
        if not (PRIORS / source / CONFIG_NAME).exists():
            raise UserError(
                f"{PRIORS / source} is not there: train it first (accelerate launch scripts/train_prior.py), "
                "or give --prior a folder or hub id"
            )
        source = str(PRIORS / source)
    prior: Prior = load(source, "prior")
    folder = locate(source)
    if folder.parent.name == STATES_NAME:  # of a run, in whose folder the tokenizer is
        folder = folder.parents[1]
    decoder = load_tokenizer(tokenizer if tokenizer is not None else str(folder / "tokenizer"))
    expected, found = prior.provenance.get("tokenizer_digest"), decoder.digest()
    if found != expected:
        raise UserError(
            f"the prior {source} speaks the codes of tokenizer {str(expected)[:12]}, but "
            f"{tokenizer or 'the copy beside it'} is {found[:12]}; give --tokenizer the one it was trained with"
        )
    return prior, decoder
