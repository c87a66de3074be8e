"""Says what a latent set holds; see `smalti.latentsets.summary`."""

from dataclasses import dataclass
from pathlib import Path

from smalti import cli
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.summary import describe
from smalti.pipeline.places import LATENTS

ABOUT = """Says what a latent set holds and what made it.

$ python scripts/inspect_latents.py                            # runs/latents/hrvq.h5
$ python scripts/inspect_latents.py --latents my.h5 --verify   # also reads every byte and checks its digest"""


@dataclass(frozen=True)
class InspectLatents:
    """What to look at."""

    latents: Path = LATENTS / "hrvq.h5"
    """The latent set."""
    verify: bool = False
    """Read every byte, and check it against the digest written with it."""


def inspect(config: InspectLatents) -> None:
    """Prints the summary; with `verify`, whether the content is what was written."""
    latent_set = LatentSet(config.latents)
    print(describe(latent_set))
    if config.verify:
        latent_set.verify()
        print("  verified      every byte is as it was written")


def main() -> None:
    """The command."""
    cli.run(inspect, InspectLatents, about=ABOUT)


if __name__ == "__main__":
    main()
