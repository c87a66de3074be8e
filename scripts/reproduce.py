"""The command that reproduces a study, which its first argument names. Each study has its own folder in studies/."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from tyro.conf import Positional

from smalti import cli
from smalti.core.errors import UserError
from smalti.studies.hqa.report import reproduce_hqa
from smalti.studies.hqa.study import ReproduceHQA
from smalti.studies.hr_vqvae.report import reproduce_hr_vqvae
from smalti.studies.hr_vqvae.settings import ReproduceHRVQVAE
from smalti.studies.overfitting.study import ReproduceOverfitting, reproduce_overfitting
from smalti.studies.portraits.card import reproduce_portraits
from smalti.studies.portraits.recipe import ReproducePortraits
from smalti.studies.priors.report import reproduce_priors
from smalti.studies.priors.study import ReproducePriors
from smalti.studies.quantizers.report import reproduce_quantizers
from smalti.studies.quantizers.study import ReproduceQuantizers
from smalti.studies.selfvae.report import reproduce_selfvae
from smalti.studies.selfvae.study import ReproduceSelfVAE
from smalti.studies.size64.study import ReproduceSize64, reproduce_size64
from smalti.studies.sundae.report import reproduce_sundae
from smalti.studies.sundae.study import ReproduceSundae
from smalti.training.run_folder import OtherSettingsError

StudyName: TypeAlias = Literal[
    "hr-vqvae", "hqa", "selfvae", "sundae", "priors", "quantizers", "overfitting", "size64", "portraits"
]


class Study(NamedTuple):
    """A study that the command runs.

    Attributes:
        summary: One line for `--help`.
        command: The function that runs it.
        config_class: The class of its settings, whose first positional argument is the study's name.
    """

    summary: str
    command: Callable[[Any], None]
    config_class: type[Any]


STUDIES: dict[StudyName, Study] = {
    "hr-vqvae": Study("VQ-VAE, VQ-VAE-2 and HR-VQVAE on MNIST or CIFAR10", reproduce_hr_vqvae, ReproduceHRVQVAE),
    "hqa": Study("HQA, HAMs and VQ-VAE on MNIST", reproduce_hqa, ReproduceHQA),
    "selfvae": Study("VAE and selfVAE on CIFAR10, CelebA, Imagenette or emoji", reproduce_selfvae, ReproduceSelfVAE),
    "sundae": Study("SUNDAE's unrolled steps and samplers, beside other priors", reproduce_sundae, ReproduceSundae),
    "priors": Study("smalti's own study of its priors and samplers", reproduce_priors, ReproducePriors),
    "quantizers": Study("smalti's own comparison of quantizers", reproduce_quantizers, ReproduceQuantizers),
    "overfitting": Study(
        "dropout, crops and early stopping on small sets", reproduce_overfitting, ReproduceOverfitting
    ),
    "size64": Study("HR-VQVAE and VQ-GAN with priors at 64x64 pixels", reproduce_size64, ReproduceSize64),
    "portraits": Study("the models in the package, and their card", reproduce_portraits, ReproducePortraits),
}
SUMMARIES = "\n".join(f"- {name}: {study.summary}" for name, study in STUDIES.items())
ABOUT = f"""Trains the models of a study on equal budgets, and writes a report, with the numbers of a
paper beside ours if the study is of a paper. The first argument names the study, and `reproduce.py STUDY --help` lists
its flags:

{SUMMARIES}

$ python scripts/reproduce.py hr-vqvae --data mnist --images mnist-train.parquet
$ python scripts/reproduce.py hr-vqvae --data cifar10 --images cifar10-train.parquet --steps 20000 --channels 128
$ python scripts/reproduce.py hr-vqvae --data mnist --images mnist-train.parquet --parts samples heads
$ python scripts/reproduce.py hqa --images mnist-train.parquet --test-images mnist-test.parquet
$ python scripts/reproduce.py hqa --images mnist-train.parquet --test-images mnist-test.parquet --seeds 3 --steps 20000
$ python scripts/reproduce.py selfvae --data cifar10 --images cifar10-train.parquet --models vae selfvae-downscale
$ python scripts/reproduce.py sundae --images portraits
$ python scripts/reproduce.py priors --parts samplers canvas
$ python scripts/reproduce.py priors --data mnist --images mnist-train.parquet --parts resampling
$ python scripts/reproduce.py quantizers --images portraits --seeds 3
$ python scripts/reproduce.py overfitting --images emoji
$ python scripts/reproduce.py size64 --images my/photos other.parquet
$ python scripts/reproduce.py portraits

The reports are docs/reproductions/hr-vqvae.md, hqa.md, selfvae.md, sundae.md, priors.md and size64.md,
docs/guide/quantizers.md, and the card of the models in the package; trained models are kept in runs/. If a study is
stopped (Ctrl-C), the same command resumes it."""


@dataclass(frozen=True)
class AnyStudy:
    """The settings before a study is named, for `--help`."""

    study: Positional[StudyName]
    """The study to reproduce."""


def chosen_config_class() -> type[Any]:
    """Returns the class of the settings of the study that the first argument names.

    Raises:
        UserError: if the first argument is not a study.
    """
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    if first in ("-h", "--help"):
        return AnyStudy
    if first not in STUDIES:
        problem = f"{first!r} is not a study" if first else "no study was named"
        raise UserError(f"{problem}; the first argument must be {', '.join(list(STUDIES)[:-1])} or {list(STUDIES)[-1]}")
    return STUDIES[first].config_class


def run_study(config: Any) -> None:
    """Runs the study that the settings belong to.

    Raises:
        UserError: for a folder with trainings of other settings, and as the study does.
    """
    try:
        STUDIES[config.study].command(config)
    except OtherSettingsError as error:  # its advice names flags that mean something else here, or do not exist
        problem, flag = str(error).partition("; give ")[0], "--work" if hasattr(config, "work") else "--out"
        raise UserError(f"{problem}; give the same settings, or another {flag}") from error


def main() -> None:
    """Runs the command."""
    cli.run(run_study, chosen_config_class, about=ABOUT)


if __name__ == "__main__":
    main()
