"""Converts latent sets to and from Parquet; see `smalti.latentsets.table`."""

import os
from dataclasses import dataclass
from pathlib import Path

from smalti import cli
from smalti.commands.model_paths import LATENTS
from smalti.core import locks
from smalti.core.errors import UserError
from smalti.images.sources import local_paths
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.table import from_parquet, to_parquet

ABOUT = """Converts a latent set to Parquet, for `datasets`, pandas and others, and such a Parquet file back.

$ python scripts/convert_latents.py --latents runs/latents/hrvq.h5 --out hrvq.parquet
$ python scripts/convert_latents.py --latents hrvq.parquet --out again.h5

Nothing is lost: both files have the same content digest.

To share a latent set on the hub: push.py"""


@dataclass(frozen=True)
class ConvertLatents:
    """Settings of `convert`; the suffixes of the two files decide the direction."""

    latents: str = str(LATENTS / "hrvq.h5")
    """A latent set (a file, a folder of files or a hub id), or a Parquet file made from one. For several Parquet files,
    a glob in quotes."""
    out: Path | None = None
    """File to write: NAME.parquet converts a latent set to Parquet, any other name converts Parquet to a latent set
    [default: the name of --latents with the other suffix, .parquet or .h5, beside it]."""
    overwrite: bool = False
    """Replace --out if it exists."""


def convert(config: ConvertLatents) -> None:
    """Converts a file and prints a summary.

    Raises:
        UserError: unless exactly one of the two names ends in .parquet, for an unreadable file, or for an `out` that
            exists or cannot be written.
    """
    from_table = config.latents.endswith(".parquet")
    if config.out is None and ("*" in config.latents or os.path.isdir(config.latents)):
        raise UserError(f"{config.latents} names several files; give --out too")
    out = config.out or Path(config.latents).with_suffix(".h5" if from_table else ".parquet")
    if from_table == (out.suffix == ".parquet"):
        raise UserError(f"{config.latents} to {out}: exactly one of the two must end in .parquet")
    latent_set = None if from_table else LatentSet(config.latents)
    if config.out is None and latent_set is not None and latent_set.path != Path(config.latents):
        raise UserError(f"{config.latents} was downloaded from the hub; give --out too")
    inputs = local_paths(config.latents)
    if latent_set is not None:
        inputs += local_paths(latent_set.provenance.image_source)
    with locks.claim([out], inputs=inputs, overwrite=config.overwrite):
        if latent_set is None:
            latent_set = from_parquet(config.latents, out)
        else:
            latent_set.verify()  # otherwise a damaged set would get a new, valid digest
            to_parquet(latent_set, out)
    print(f"{out}: {len(latent_set)} rows, {latent_set.layout}, digest {latent_set.content_digest}")


def main() -> None:
    """Runs the command line."""
    cli.run(convert, ConvertLatents, about=ABOUT)


if __name__ == "__main__":
    main()
