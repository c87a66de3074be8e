"""Latent sets on the hub: the file that a hub id names, and what is uploaded of a set, with its card.

The uploaded copy has the same content digest: only attributes that it does not cover lose their local folders.
"""

import os
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from smalti.core.codes import MOST_COUNTED_CODES, perplexity
from smalti.core.errors import UserError
from smalti.core.files import as_name
from smalti.core.hub.cards import CARD_NAME, code, front_matter, license_line, listed, require_license, table
from smalti.core.hub.download import MOST_NAMES, download
from smalti.core.hub.ids import HubId, find_hub_id
from smalti.core.hub.public_names import public_command, public_values
from smalti.core.hub.upload import Files
from smalti.latentsets.copies import SetToShare, copy_file
from smalti.latentsets.hdf5.digests import MEANING
from smalti.latentsets.hdf5.sharded import INDEX_NAME, names_in_index, write_index
from smalti.latentsets.provenance import Provenance

SUFFIXES = (".h5", ".hdf5")
DATA_SUFFIXES = (*SUFFIXES, ".parquet")
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}
"""The hub's classes of sizes, by the first number of rows beyond each."""


def find_file(source: str | Path) -> Path:
    """Returns the file of a latent set; downloads it if `source` is no local file but the id of a data set.

    A file in the repository is named with a revision, `owner/name@main/file.h5`, because `owner/name/file.h5` looks
    like a local path.

    Raises:
        UserError: if there is no such data set, or it has no latent set or several.
    """
    as_name(source, "the latent set")  # refuses names that no file has
    hub_id = find_hub_id(source.as_posix() if isinstance(source, Path) else source)
    path = Path(source)
    named = hub_id is not None and not hub_id.repo.endswith(DATA_SUFFIXES) and (hub_id.revision or not hub_id.folder)
    if hub_id is None or not named or os.path.lexists(path):
        return path
    try:
        return _download(hub_id)
    except UserError as error:
        raise UserError(
            f"there is no latent set at {source}: there is no such file, and on the hub: {error}"
        ) from error


def _download(hub_id: HubId) -> Path:
    root, file = HubId(hub_id.repo, hub_id.revision), hub_id.folder
    names = [file] if file else [INDEX_NAME, *(f"*{suffix}" for suffix in SUFFIXES)]
    folder = download(root, names, "dataset")
    if not file and (folder / INDEX_NAME).exists():
        return folder
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)
    if file:
        files = [path for path in files if path == folder / file]
    if not files:
        raise UserError(f"{hub_id} is no latent set: it lacks {file or 'a file *.h5'}; check the name")
    if len(files) > 1:
        revision = hub_id.revision or "main"
        names = [str(HubId(hub_id.repo, revision, path.relative_to(folder).as_posix())) for path in files[:MOST_NAMES]]
        raise UserError(f"{hub_id} has several latent sets; give one of {', '.join(names)}")
    return files[0]


def files_to_share(
    latent_set: SetToShare, target: HubId, scratch: Path, *, license: str | None = None, tokenizer: str | None = None
) -> Files:
    """Returns what is uploaded of a latent set, by name: its files, with the index of several ones, and its card.

    Args:
        latent_set: the set, which is checked to the last byte.
        target: the data set's repository and branch.
        scratch: an empty folder for copies of the files, if their attributes have local folders.
        license: the licence for the card, or None.
        tokenizer: the hub id of the tokenizer, recorded in the copy.

    Raises:
        UserError: for a damaged set, or one that records local folders where the content digest covers them; for
            several files without an index; for a target in a folder, or an unsuitable licence or tokenizer.
    """
    require_license(license)
    if target.folder:
        raise UserError(f"{target} is a folder; a latent set needs a repository of its own: owner/name")
    if tokenizer is not None and find_hub_id(tokenizer) is None:
        raise UserError(
            f"--tokenizer {tokenizer} is not a hub id; give the owner/name of the tokenizer that was pushed"
        )
    indexed, paths = latent_set.files.indexed, [extent.path for extent in latent_set.files.extents]
    if len(paths) > 1 and not indexed:
        raise UserError(
            f"{latent_set.path} is several files without {INDEX_NAME}; push each to a repository of its own"
        )
    latent_set.verify()
    provenance = _public(latent_set, latent_set.provenance, tokenizer)
    if provenance != latent_set.provenance:
        if latent_set.version < 3:
            raise UserError(
                f"{latent_set.path} has format version 2; convert it to Parquet and back (convert_latents.py) first"
            )
        for path in paths:
            copy_file(path, scratch / path.name, lambda before: _public(latent_set, before, tokenizer))
        if indexed:
            write_index(scratch, latent_set.content_digest)
        paths = [scratch / path.name for path in paths]
    card = latent_set_card(latent_set, provenance, target, license=license)
    index = {INDEX_NAME: paths[0].with_name(INDEX_NAME)} if indexed else {}
    return {CARD_NAME: card.encode(), **{_name_on_hub(path): path for path in paths}, **index}


def former_set(files: Files, names: Collection[str], read: Callable[[str], bytes]) -> set[str]:
    """Returns the files of an earlier set of several files that another such set replaces; see `FindFormer`.

    Raises:
        UserError: if a set of several files would lie beside other latent sets, where it cannot be read.
    """
    names = {name for name in names if name == INDEX_NAME or ("/" not in name and name.endswith(".h5"))}
    listed = names_in_index(read(INDEX_NAME)) if INDEX_NAME in names else []
    former = names.intersection([*listed, INDEX_NAME] if listed else [])
    others = sorted(names - former - files.keys() if INDEX_NAME in files else former)
    if others:
        raise UserError(
            f"a set of several files cannot be read beside another latent set ({others[0]} is there); remove that "
            "first, or give another repository or folder"
        )
    return former - files.keys()


def _name_on_hub(path: Path) -> str:
    """Returns the name with a suffix by which `find_file` finds the file."""
    return path.name if path.suffix in SUFFIXES else f"{path.name}.h5"


def _public(latent_set: SetToShare, before: Provenance, tokenizer: str | None) -> Provenance:
    """Returns a provenance without local folders, which may not change what the content digest covers."""
    public = replace(before, **public_values(vars(before)))
    texts, public_texts = before.to_attributes(), public.to_attributes()
    for name in MEANING:
        if name in texts and texts[name] != public_texts[name]:
            raise UserError(
                f"{latent_set.path} records local folders or an address with a query in {name}, and its digest covers "
                "that, as in sets of former versions; build it again with --overwrite"
            )
    return public if tokenizer is None else replace(public, tokenizer_source=tokenizer)


def latent_set_card(
    latent_set: SetToShare, provenance: Provenance, target: HubId, *, license: str | None = None
) -> str:
    """Returns the card of a latent set as Markdown, with the front matter that the hub reads.

    Args:
        latent_set: the set. It is read once to count codes.
        provenance: the provenance without local folders.
        target: where it will be on the hub.
        license: the licence, or None for none.
    """
    rows, images = len(latent_set.labels), latent_set.count_images()
    names = [_name_on_hub(extent.path) for extent in latent_set.files.extents]
    count, name, last = len(names), names[0], names[-1]
    files = f"one HDF5 file (`{name}`)" if count == 1 else f"{count:,} HDF5 files (`{name}` to `{last}`)"
    size = next((label for limit, label in SIZES.items() if rows < limit), "n>10M")
    front = front_matter(license, tags=["smalti", "latent-set", "hdf5"], size_categories=[size])
    source = provenance.tokenizer_source
    known = find_hub_id(source) is not None
    tokenizer = source if known else "TOKENIZER"
    facts = {
        "rows": f"{rows:,}, of which {int(latent_set.held_out.sum()):,} are held out",
        "images": f"{code(provenance.image_source)}: {images['training']:,} to train, {images['held_out']:,} held out",
        "flips": _flips(latent_set),
        "crops": _crops(provenance),
        "classes": _classes(latent_set),
        "vectors": _vectors(latent_set, provenance),
        "captions": f"{captioned:,} rows have one" if (captioned := len(latent_set.captioned_rows())) else "",
        "left out": f"{len(provenance.skipped)} damaged images" if provenance.skipped else "",
        "layout of the codes": str(latent_set.layout),
        "tokenizer": f"{code(provenance.tokenizer_kind)}, from {code(source)}",
        "digest of the tokenizer": code(provenance.tokenizer_digest),
        "digest of the content": code(latent_set.content_digest),
        "made": f"{provenance.created} by {code(public_command(provenance.command))}",
        "software": ", ".join(f"{software} {number}" for software, number in provenance.software.items()),
    }
    missing = "" if known else "\n`TOKENIZER` stands for the tokenizer with the digest below.\n"
    return f"""{front}
# {target.title}

A latent set of smalti: the codes of images, as a tokenizer encoded them, in {files}. A prior trains on
it without the images and without running the tokenizer. The codes are valid only for the tokenizer with the digest
below. Whoever has that tokenizer can decode them to images close to the originals.

## Use

```python
from smalti import LatentSet

latents = LatentSet("{target}")
codes = latents.batch([0, 1, 2])  # a tuple with one tensor per level
```

Or from the command line:

```
smalti inspect-latents --latents {target} --verify
smalti train-prior --latents {target} --tokenizer {tokenizer}
```
{missing}
Without smalti, any HDF5 tool opens {"the file" if count == 1 else "each file"}:

```python
import h5py
from huggingface_hub import hf_hub_download

file = h5py.File(hf_hub_download("{target.repo}", "{name}", repo_type="dataset"{_revision(target)}))
codes = file["codes/0"][:3]
```

## The set

{table(facts)}

## Usage of the codes

{_usage(latent_set)}
## Licence

{license_line(license, "codes")}
"""


def _revision(target: HubId) -> str:
    return f', revision="{target.revision}"' if target.revision else ""


def _flips(latent_set: SetToShare) -> str:
    flipped = int(latent_set.flipped.sum())
    return f"{flipped:,} rows are mirror images" if flipped else "no mirror images"


def _crops(provenance: Provenance) -> str:
    if side := provenance.preprocessing.get("ten_crop_side"):
        return f"the corners and the centre of each training image, of {side:.0%} of its side"
    crops, smallest = provenance.preprocessing.get("crops"), provenance.preprocessing.get("smallest_crop", 1)
    return f"{crops} random crop(s) of each training image, of {smallest:.0%} of its side at least" if crops else "none"


def _classes(latent_set: SetToShare) -> str:
    names, labels = latent_set.provenance.label_names, latent_set.labels
    without = int((labels < 0).sum())
    if without == len(labels):
        return "none"
    classes = f"{len(names)}: {listed(list(names))}" if names else str(int(labels.max()) + 1)
    return f"{classes}; {without:,} rows have none" if without else classes


def _vectors(latent_set: SetToShare, provenance: Provenance) -> str:
    source, width = provenance.condition_source, latent_set.condition_width
    return f"{width} numbers for each row, from {code(source)}" if width else ""


def _usage(latent_set: SetToShare) -> str:
    """Returns the share of codes that occur, and their perplexity, for each level."""
    lines = ["| level | codes | used | perplexity |", "|---|---|---|---|"]
    for number, level in enumerate(latent_set.layout.levels):
        if level.channels:
            lines.append(f"| {number} | {level.channels} real-valued channels | | |")
        elif level.codebook_size > MOST_COUNTED_CODES:
            lines.append(f"| {number} | {level.codebook_size:,} | not counted | |")
        else:
            counts = latent_set.usage(number)
            used = int((counts > 0).sum())
            share = f"{used:,} ({used / level.codebook_size:.1%})"
            lines.append(f"| {number} | {level.codebook_size:,} | {share} | {perplexity(counts):,.1f} |")
    return "\n".join(lines) + "\n"
