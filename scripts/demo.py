"""The demonstration that `make demo` runs; see `smalti.demo`."""

from smalti import cli
from smalti.demo import Demo, demo

ABOUT = """The whole path on the embedded emoji, in minutes on two CPU cores: tokenizer, latents, prior, samples, fills.

$ python scripts/demo.py                                   # into runs/demo
$ python scripts/demo.py --prior-steps 8000 --out runs/longer

Stopped (Ctrl-C), the same command goes on where it was; finished, it says so."""


def main() -> None:
    """The command."""
    cli.run(demo, Demo, about=ABOUT)


if __name__ == "__main__":
    main()
