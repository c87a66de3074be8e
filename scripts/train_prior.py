"""Trains a prior; see `smalti.commands.train_prior`."""

from smalti import cli
from smalti.commands.train_prior import default_config, train_prior

ABOUT = """Trains a prior: the codes of a latent set to a model that draws new ones.

$ accelerate launch scripts/train_prior.py                               # on runs/latents/hrvq.h5
$ accelerate launch scripts/train_prior.py --latents my.h5 --out runs/priors/mine --steps 20000
$ accelerate launch scripts/train_prior.py --prior pixelcnn              # code after code; exact likelihoods
$ accelerate launch scripts/train_prior.py --prior realnvp --latents runs/latents/selfvae.h5   # of real numbers
$ accelerate launch scripts/train_prior.py --latents two.h5 --level 1    # a prior for each level of several
$ accelerate launch --num_processes 8 scripts/train_prior.py --batch-size 512   # eight GPUs share each batch

Stopped (Ctrl-C) or killed, the same command goes on where it was: see --resume.
More in docs/training.md. Next: sample.py and inpaint.py."""


def main() -> None:
    """The command."""
    cli.run(train_prior, lambda: default_config(cli.chosen("--prior", "hourglass")), about=ABOUT)


if __name__ == "__main__":
    main()
