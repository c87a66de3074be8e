"""Inspects a latent set; see `smalti.commands.inspect_latents`."""

from smalti import cli
from smalti.commands.inspect_latents import InspectLatents, inspect_latents

ABOUT = """Prints what a latent set holds and how it was made.

$ python scripts/inspect_latents.py                                     # runs/latents/hrvq.h5
$ python scripts/inspect_latents.py --latents my.h5 --verify            # also reads and checks every byte
$ python scripts/inspect_latents.py --codes codes.png --plot usage.png  # also draws codes and their usage"""


def main() -> None:
    """Runs the command line."""
    cli.run(inspect_latents, InspectLatents, about=ABOUT)


if __name__ == "__main__":
    main()
