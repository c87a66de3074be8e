"""Says what a latent set holds; see `smalti.commands.inspect_latents`."""

from smalti import cli
from smalti.commands.inspect_latents import InspectLatents, inspect_latents

ABOUT = """Says what a latent set holds and what made it.

$ python scripts/inspect_latents.py                            # runs/latents/hrvq.h5
$ python scripts/inspect_latents.py --latents my.h5 --verify   # also reads every byte and checks it
$ python scripts/inspect_latents.py --codes codes.png --plot usage.png"""


def main() -> None:
    """The command."""
    cli.run(inspect_latents, InspectLatents, about=ABOUT)


if __name__ == "__main__":
    main()
