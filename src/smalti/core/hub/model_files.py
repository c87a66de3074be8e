"""The files that make a model on the hub: which are downloaded, and which are uploaded and how they are changed."""

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from smalti.core.checkpoint_checks import CONFIG_NAME, MODEL_NAMES, TOKENIZER_FOLDER, WEIGHTS_NAME, read_config
from smalti.core.errors import UserError
from smalti.core.hub.cards import CARD_NAME, require_license
from smalti.core.hub.download import describe_missing, download
from smalti.core.hub.ids import HubId
from smalti.core.hub.model_card import model_card, picture_line
from smalti.core.hub.pictures import without_texts
from smalti.core.hub.public_names import public_values
from smalti.core.hub.upload import Files

SHEETS = ("samples.png", "reconstructions.png", "neighbours.png")
"""Pictures that trainings and studies leave beside a model."""
SUBFOLDERS = ("", f"{TOKENIZER_FOLDER}/", "layer-*/")


def download_model(hub_id: HubId) -> Path:
    """Downloads a model with its tokenizer or layers, after a check of its config; returns the local folder.

    Raises:
        UserError: with the reason, if it cannot be downloaded or is not smalti's.
    """
    folder = download(hub_id, [f"{below}{CONFIG_NAME}" for below in SUBFOLDERS])
    if (folder / CONFIG_NAME).exists():
        try:
            read_config(folder)  # before the weights of a model that is not smalti's
        except UserError as error:
            raise UserError(str(error).replace(str(folder / CONFIG_NAME), f"{hub_id}/{CONFIG_NAME}")) from error
        folder = download(hub_id, [f"{below}{name}" for below in SUBFOLDERS for name in MODEL_NAMES])
    if any(not (folder / name).exists() for name in MODEL_NAMES):
        raise UserError(describe_missing(hub_id, MODEL_NAMES))
    return folder


def model_files(
    folder: Path,
    records: Sequence[Path],
    target: HubId,
    *,
    facts: dict[str, str],
    fills: bool,
    changed: bool,
    load: Callable[[Path, str], Any],
    license: str | None,
    sheet: bool,
) -> Files:
    """Returns the files of a trained model to upload, with its card.

    A `README.md` beside the model is the card as it is, and the pictures that it names are uploaded.

    Args:
        folder: has the model's two files.
        records: folders that may have the tokenizer of a prior, pictures and a card; the first that has something
            counts. The last one may have the records of the training.
        target: where it will be on the hub.
        facts: what the card says of the network, by title.
        fills: whether the model can fill masked parts of images.
        changed: whether the weights are other ones than those of the training: then its records are not theirs.
        load: loads a model of a family from a folder.
        license: the licence for the card, or None.
        sheet: whether pictures are uploaded.

    Raises:
        UserError: if a prior has no tokenizer, a damaged one, or one that did not make its codes; or for an unsuitable
            licence or card.
    """
    described, levels = public_config(folder), 1
    files: dict[str, Path | bytes] = {**_two_files(folder, described)}
    if described["family"] == "prior":
        copy = next((each / TOKENIZER_FOLDER for each in records if (each / TOKENIZER_FOLDER).is_dir()), None)
        if copy is None:
            raise UserError(
                f"{folder} has no {TOKENIZER_FOLDER}/ with the tokenizer of the prior; give the folder of the training"
            )
        tokenizer, copied = load(copy, "tokenizer"), public_config(copy)
        if described["provenance"].get("tokenizer_digest", copied["digest"]) not in tokenizer.digests_of_codes():
            raise UserError(f"{copy} is not the tokenizer that made the codes of the prior; give that one")
        levels = len(tokenizer.layout.levels)
        files |= {f"{TOKENIZER_FOLDER}/{name}": contents for name, contents in _two_files(copy, copied).items()}
    pictures = {name: path for name in SHEETS for path in (_first(records, name),) if path is not None and sheet}
    own_card = _first(records, CARD_NAME)
    if own_card is not None:
        if license is not None:
            raise UserError(f"{own_card} is the card; put the licence into its front matter, and leave --license out")
        card = own_card.read_bytes()
        text = _text_of(own_card, card)
        pictures = {name: path for name, path in pictures.items() if name in text}
    else:
        require_license(license)
        pictures = {} if changed else dict(list(pictures.items())[:1])
        run, picture = None if changed else records[-1], next(iter(pictures), None)
        about = {"facts": facts, "fills": fills, "levels": levels}
        card = model_card(described, run, target, **about, license=license, picture=picture).encode()
    shown = {name: without_texts(path.read_bytes()) for name, path in pictures.items()}
    return {CARD_NAME: card, **files, **shown}


def _text_of(path: Path, card: bytes) -> str:
    try:
        return card.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8, which the hub needs of a card; save it as UTF-8") from error


def former_pictures(files: Files, names: Collection[str], read: Callable[[str], bytes]) -> set[str]:
    """Returns the pictures that a former card of smalti showed and the new card does not; see `FindFormer`."""
    card = files[CARD_NAME]
    new, old = (card if isinstance(card, bytes) else card.read_bytes(), read(CARD_NAME) if CARD_NAME in names else b"")
    shown = {name: (picture_line(name).encode() in old, name.encode() in new) for name in SHEETS}
    return {name for name, (before, now) in shown.items() if before and not now and name in names} - files.keys()


def public_config(folder: Path) -> dict[str, Any]:
    """Reads the config of a model, without local folders in its provenance, which no digest covers."""
    described = read_config(folder)
    return {**described, "provenance": public_values(described["provenance"])}


def _two_files(folder: Path, described: dict[str, Any]) -> dict[str, Path | bytes]:
    text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
    return {CONFIG_NAME: text.encode(), WEIGHTS_NAME: folder / WEIGHTS_NAME}


def _first(folders: Sequence[Path], name: str) -> Path | None:
    """Returns the file in the first folder that has it."""
    return next((folder / name for folder in folders if (folder / name).is_file()), None)
