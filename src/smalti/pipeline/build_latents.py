"""The boundary: a tokenizer's codes of every image, stored as a latent set."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from smalti.codes import Layout
from smalti.devices import Device, device
from smalti.errors import UserError
from smalti.images import ImageRows, ImageSet, open_images
from smalti.interfaces import Tokenizer
from smalti.latentsets.format import Provenance
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.summary import describe
from smalti.latentsets.writer import LatentSetWriter
from smalti.pipeline.places import LATENTS, load_tokenizer
from smalti.preprocess import to_float
from smalti.progress import bar
from smalti.runs import command


@dataclass(frozen=True)
class BuildLatents:
    """How to build a latent set."""

    tokenizer: str = "hrvq"
    """A trained tokenizer: a kind (the one in runs/tokenizers/KIND), a folder, or a hub id."""
    images: str | None = None
    """`emoji` (embedded), a folder of images, Parquet files, or a data set's hub id [default: what the tokenizer was
    trained on]."""
    height: int | None = None
    """Height of the images in pixels, if not the tokenizer's own."""
    width: int | None = None
    """Width of the images in pixels, if not the tokenizer's own."""
    flips: bool = True
    """Store the mirror images too, as rows of their own."""
    batch_size: int = 256
    """Images encoded at once."""
    device: Device = "auto"
    """Where to encode."""
    out: Path | None = None
    """The file [default: runs/latents/KIND.h5]."""


def build_latents(config: BuildLatents) -> Path:
    """Encodes every image and stores the codes; returns the file. One that already holds exactly this is left as it is.

    Codes are computed in float32, so that they do not depend on what precision a device is fast in.

    Raises:
        UserError: for a tokenizer or images that will not do, or a full disk. The file is then as it was.
    """
    if config.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {config.batch_size}")
    tokenizer = load_tokenizer(config.tokenizer)
    source = config.images or tokenizer.provenance.get("image_source")
    if source is None:
        raise UserError(f"{config.tokenizer} does not say what images it was trained on; give --images")
    images = open_images(
        source,
        height=config.height or tokenizer.config.height,
        width=config.width or tokenizer.config.width,
        channels=tokenizer.image_channels,
    )
    path = config.out or LATENTS / f"{tokenizer.kind}.h5"
    provenance = Provenance(
        tokenizer_kind=tokenizer.kind,
        tokenizer_config=dataclasses.asdict(tokenizer.config),
        tokenizer_digest=tokenizer.digest(),
        tokenizer_source=config.tokenizer,
        image_source=source,
        image_fingerprint=images.fingerprint,
        preprocessing={**images.preprocessing, "flips": config.flips},
        label_names=images.label_names,
        command=command(),
    )
    if path.exists() and _is_of(path, provenance):
        print(f"{path} holds these codes already.")
    else:
        where = device(config.device)
        _encode(tokenizer.to(where), images, path, provenance, config, where)
    print(describe(LatentSet(path)))
    return path


@torch.no_grad()
def _encode(
    tokenizer: Tokenizer,
    images: ImageSet,
    path: Path,
    provenance: Provenance,
    config: BuildLatents,
    device: torch.device,
) -> None:
    rows = ImageRows(images, split="all", flips=config.flips)
    layout = _layout(tokenizer, rows, device)
    with LatentSetWriter(path, layout, rows=len(rows), provenance=provenance) as writer:
        for start in bar(range(0, len(rows), config.batch_size), what="encoding", unit="batch"):
            batch = rows.__getitems__(range(start, min(start + config.batch_size, len(rows))))
            codes = tokenizer.encode(to_float(batch["images"].to(device)))
            writer.write(
                start, tuple(grid.cpu() for grid in codes), batch["labels"], batch["source_ids"], batch["flipped"]
            )


def _layout(tokenizer: Tokenizer, rows: ImageRows, device: torch.device) -> Layout:
    """The tokenizer's layout at the size of these images."""
    codes = tokenizer.encode(to_float(rows.__getitems__([0])["images"].to(device)))
    return tokenizer.layout.resized(tuple((grid.shape[-2], grid.shape[-1]) for grid in codes))


def _is_of(path: Path, provenance: Provenance) -> bool:
    """Whether the set at `path` was made by the same tokenizer from the same images in the same way."""
    try:
        found = LatentSet(path).provenance
    except UserError:
        return False
    return all(
        getattr(found, name) == getattr(provenance, name)
        for name in ("tokenizer_digest", "image_fingerprint", "preprocessing", "label_names")
    )
