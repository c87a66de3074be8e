"""Reproduces papers' studies; see `smalti.pipeline.reproduce`."""

from smalti import cli
from smalti.pipeline.reproduce import Reproduce
from smalti.pipeline.reproduce_report import reproduce

ABOUT = """Trains a paper's models anew, on equal budgets, and writes our numbers beside the paper's.

$ python scripts/reproduce.py hr-vqvae --data mnist --images mnist-train.parquet
$ python scripts/reproduce.py hr-vqvae --data cifar10 --images cifar10-train.parquet --steps 20000 --channels 128

Into docs/reproductions/hr-vqvae.md; the runs are kept in runs/reproductions. Stopped (Ctrl-C), the same command goes on
where it was."""


def main() -> None:
    """The command."""
    cli.run(reproduce, Reproduce, about=ABOUT)


if __name__ == "__main__":
    main()
