"""Runs the demonstration (`make demo`); see `smalti.demo`."""

from smalti import cli
from smalti.demo import Demo, demo

ABOUT = """Runs the whole pipeline on the embedded portraits: tokenizer, latent set, prior, samples and fills.

$ python scripts/demo.py                                     # into runs/demo, in minutes on two CPU cores
$ python scripts/demo.py --prior-steps 8000 --out runs/longer

If it is stopped (Ctrl-C), run the same command to resume."""


def main() -> None:
    """Runs the command line."""
    cli.run(demo, Demo, about=ABOUT)


if __name__ == "__main__":
    main()
