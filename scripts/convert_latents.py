"""A latent set as Parquet, or Parquet as a latent set; see `smalti.latentsets.table`."""

from dataclasses import dataclass
from pathlib import Path

from smalti import cli
from smalti.commands.model_paths import LATENTS
from smalti.core.errors import UserError
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.table import from_parquet, to_parquet

ABOUT = """Turns a latent set into a Parquet file that `datasets`, pandas and others open, and such a file back.

$ python scripts/convert_latents.py --latents runs/latents/hrvq.h5 --out hrvq.parquet
$ python scripts/convert_latents.py --latents hrvq.parquet --out again.h5

Everything is kept: both files have one content digest. For the hub, from Python:
smalti.latentsets.table.to_dataset(LatentSet("my.h5")).push_to_hub("me/my-codes")."""


@dataclass(frozen=True)
class ConvertLatents:
    """What to convert into what; the suffixes say the direction."""

    latents: str = str(LATENTS / "hrvq.h5")
    """A latent set, or a Parquet file made from one; of several Parquet files, a glob in quotes."""
    out: Path = LATENTS / "hrvq.parquet"
    """NAME.parquet for a latent set, anything else for Parquet."""


def convert(config: ConvertLatents) -> None:
    """Converts, and says what was written."""
    from_table, to_table = config.latents.endswith(".parquet"), config.out.suffix == ".parquet"
    if from_table == to_table:
        raise UserError(f"{config.latents} to {config.out}: exactly one of the two must end in .parquet")
    if to_table:
        latent_set = LatentSet(config.latents)
        to_parquet(latent_set, config.out)
    else:
        latent_set = from_parquet(config.latents, config.out)
    print(f"{config.out}: {len(latent_set)} rows, {latent_set.layout}, digest {latent_set.content_digest}")


def main() -> None:
    """The command."""
    cli.run(convert, ConvertLatents, about=ABOUT)


if __name__ == "__main__":
    main()
