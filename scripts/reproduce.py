"""Reproduces papers' studies; see `smalti.studies.hr_vqvae.study`, `.reproduce_hqa`, `.reproduce_selfvae` and
`.reproduce_priors`."""

import sys

from smalti import cli
from smalti.studies.hqa.report import reproduce_hqa
from smalti.studies.hqa.study import ReproduceHQA
from smalti.studies.hr_vqvae.report import reproduce
from smalti.studies.hr_vqvae.study import Reproduce
from smalti.studies.priors.report import reproduce_priors
from smalti.studies.priors.study import ReproducePriors
from smalti.studies.selfvae.report import reproduce_selfvae
from smalti.studies.selfvae.study import ReproduceSelfVAE

ABOUT = """Trains a paper's models anew, on equal budgets, and writes our numbers beside the paper's.

$ python scripts/reproduce.py hr-vqvae --data mnist --images mnist-train.parquet
$ python scripts/reproduce.py hr-vqvae --data cifar10 --images cifar10-train.parquet --steps 20000 --channels 128
$ python scripts/reproduce.py hr-vqvae --data mnist --images mnist-train.parquet --parts samples heads
$ python scripts/reproduce.py hqa --images mnist-train.parquet --test-images mnist-test.parquet
$ python scripts/reproduce.py hqa --images mnist-train.parquet --test-images mnist-test.parquet --seeds 3 --steps 20000
$ python scripts/reproduce.py selfvae --data cifar10 --images cifar10-train.parquet --models vae selfvae-downscale
$ python scripts/reproduce.py priors --parts samplers canvas
$ python scripts/reproduce.py priors --data mnist --images mnist-train.parquet --parts resampling

Into docs/reproductions/hr-vqvae.md, hqa.md, selfvae.md and priors.md; the runs are kept in runs/reproductions. Stopped
(Ctrl-C), the same command goes on where it was. `hqa --help`, `selfvae --help` and `priors --help` have the flags of
those studies."""


def main() -> None:
    """The command."""
    if "hqa" in sys.argv[1:]:
        cli.run(reproduce_hqa, ReproduceHQA, about=ABOUT)
    elif "selfvae" in sys.argv[1:]:
        cli.run(reproduce_selfvae, ReproduceSelfVAE, about=ABOUT)
    elif "priors" in sys.argv[1:]:
        cli.run(reproduce_priors, ReproducePriors, about=ABOUT)
    else:
        cli.run(reproduce, Reproduce, about=ABOUT)


if __name__ == "__main__":
    main()
