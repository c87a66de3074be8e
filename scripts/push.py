"""Shares a model or a latent set on the Hugging Face hub; see `smalti.core.hub` and `smalti.latentsets.sharing`."""

import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from tyro.conf import Positional, arg

from smalti import cli
from smalti.commands.model_paths import folder_of_kind, require_same_codes, tokenizer_beside
from smalti.core import locks, models
from smalti.core.errors import UserError
from smalti.core.hub.cards import CARD_NAME
from smalti.core.hub.ids import HubId, RepoType, parse_target
from smalti.core.hub.model_card import priors_of_levels
from smalti.core.hub.model_files import former_pictures
from smalti.core.hub.upload import Files, former_files, size_of, upload, write_files
from smalti.core.models import read_config
from smalti.core.progress import print_note
from smalti.images.sources import local_paths
from smalti.latentsets.hdf5.sharded import INDEX_NAME
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.sharing import files_to_share, former_set
from smalti.latentsets.summary import size_text
from smalti.priors.base import Prior

ABOUT = """Uploads a trained tokenizer or prior, or a latent set, to the Hugging Face hub with a card, in one commit.

$ python scripts/push.py runs/priors/photos me/photos --license cc-by-4.0        # a prior with its tokenizer
$ python scripts/push.py runs/tokenizers/photos me/photos-tokenizer --private
$ python scripts/push.py runs/latents/photos.h5 me/photos-codes --tokenizer me/photos-tokenizer
$ python scripts/push.py runs/priors/photos me/photos --preview look             # only writes the files into look/

Log in with `hf auth login` first, or set HF_TOKEN. Snapshots, optimizer states and logs stay here, and names in the
uploaded files lose their local folders. Every command then takes the id: sample.py --prior me/photos

More: docs/guide/share.md"""


@dataclass(frozen=True)
class Push:
    """Settings of `push`."""

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """The folder of a trained tokenizer or prior, a kind (the one in runs/tokenizers/KIND or runs/priors/KIND), or the
    file or folder of a latent set."""
    target: Annotated[Positional[str], arg(metavar="OWNER/NAME")]
    """The id on the hub to upload to: owner/name. A model may also go into a folder: owner/name/folder."""
    license: str | None = None
    """The licence, as the hub writes it, such as mit, apache-2.0, cc-by-4.0 or other [default: the card gives none]."""
    private: bool = False
    """Create a private repository. An existing one must be private already."""
    revision: str | None = None
    """Branch to upload to; it is created if needed [default: main]."""
    message: str | None = None
    """Message of the commit [default: Upload NAME with smalti]."""
    sheet: bool = True
    """Upload the run's sheet of pictures too. A tokenizer's shows held-out images: leave it out if they are private."""
    tokenizer: str | None = None
    """The hub id of a latent set's tokenizer, which the uploaded copy records, so that training on it finds the
    tokenizer [default: the name that the set records]."""
    preview: Path | None = None
    """Write what would be uploaded into this folder, and upload nothing [default: upload]."""
    overwrite: bool = False
    """Replace existing files in the folder of --preview."""


def push(config: Push) -> None:
    """Uploads, or writes a preview, and prints what and where.

    Raises:
        UserError: if there is nothing to push, it is damaged, the target is unsuitable, or the upload fails.
    """
    target = parse_target(config.target, config.revision)
    with TemporaryDirectory(prefix="smalti-push-") as scratch:
        kind, files, inputs, following = _collect(config, target, Path(scratch))
        find_former = former_set if kind == "dataset" else former_pictures
        if config.preview is None:
            _print_files(files)
            _print_notes(config, files)
            uploaded = {"find_former": find_former, "private": config.private, "message": config.message}
            print(upload(files, target, kind, **uploaded))
            print(f"next: {following}")
        else:
            former = former_files(files, config.preview, find_former)
            outputs = [*(config.preview / name for name in files), *former]
            checks = {"inputs": inputs, "overwrite": config.overwrite, "is_own": None, "flag": "--preview"}
            with locks.claim(outputs, folder=config.preview, **checks):
                write_files(files, config.preview, former)
            _print_files(files)
            _print_notes(config, files)
            print(f"nothing was uploaded; the files are in {config.preview}, and {CARD_NAME} is the card")


def _collect(config: Push, target: HubId, scratch: Path) -> tuple[RepoType, Files, list[Path], str]:
    """Returns the repository's type, the files, the inputs that no preview may replace, and the next command."""
    if os.path.isfile(config.source) or os.path.isfile(Path(config.source) / INDEX_NAME):
        latents = LatentSet(config.source)
        files = files_to_share(latents, target, scratch, license=config.license, tokenizer=config.tokenizer)
        inputs = [*(extent.path for extent in latents.files.extents), *local_paths(latents.provenance.image_source)]
        return "dataset", files, inputs, f"smalti train-prior --latents {target}"
    if config.tokenizer is not None:
        raise UserError("--tokenizer is for latent sets; the folder of a prior has its tokenizer")
    folder = _model_folder(config.source)
    described = read_config(folder)
    model = models.load(folder, described["family"])
    command, copied = f"build-latents --tokenizer {target}", None
    if isinstance(model, Prior):
        tokenizer = tokenizer_beside(model)
        require_same_codes([model], tokenizer, names=[config.source])
        names = priors_of_levels(target, model.provenance, len(tokenizer.layout.levels))
        command = f"sample --prior {' '.join(names)}"
        copied = None if (folder / models.TOKENIZER_FOLDER).is_dir() else tokenizer  # a snapshot has none of its own
    files = model.files_to_share(target, scratch, license=config.license, sheet=config.sheet, tokenizer=copied)
    return (
        "model",
        files,
        [folder, *local_paths(described["provenance"].get("image_source"))],
        f"smalti {command}",
    )


def _model_folder(source: str) -> Path:
    """Returns the folder of a model that was trained or converted here.

    Raises:
        UserError: if there is none.
    """
    folders = [folder_of_kind(source, "tokenizer"), folder_of_kind(source, "prior"), Path(source)]
    existing = [each for each in folders if each and os.path.isfile(each / models.CONFIG_NAME)]
    if len(existing) > 1:
        print_note(
            f"note: {source!r} is a kind, so {existing[0]} is pushed, not the folder of this name; for the folder, "
            f"give ./{source}"
        )
    if existing:
        return existing[0]
    found = "it has no config.json" if os.path.isdir(source) else "there is nothing"
    raise UserError(
        f"there is no model at {source} ({found}); give the folder of a trained tokenizer or prior, or a latent set"
    )


def _print_files(files: Files) -> None:
    """Prints the names and sizes of the files."""
    width = max(map(len, files))
    for name, contents in files.items():
        print(f"  {name:{width}}  {size_text(size_of(contents))}")


def _print_notes(config: Push, files: Files) -> None:
    """Prints what others will see: pictures of images, and the lack of a licence."""
    if "reconstructions.png" in files:
        print("reconstructions.png shows held-out images; --no-sheet leaves it out")
    if config.license is None and "license:" not in _front_matter(files):
        print("the card gives no licence; --license NAME does")


def _front_matter(files: Files) -> str:
    card = files[CARD_NAME]
    text = card if isinstance(card, bytes) else card.read_bytes()
    return text.decode().split("\n---", 1)[0]


def main() -> None:
    """Runs the command line."""
    cli.run(push, Push, about=ABOUT)


if __name__ == "__main__":
    main()
