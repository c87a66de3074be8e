"""Trains a prior; see `smalti.commands.train_prior`."""

from smalti import cli
from smalti.commands.presets import default_prior_config
from smalti.commands.train_prior import train_prior_with_ending

ABOUT = """Trains a prior: a model that generates the codes of new images.

$ python scripts/train_prior.py                                            # on runs/latents/hrvq.h5
$ python scripts/train_prior.py --latents my.h5 --out runs/priors/mine --steps 20000
$ python scripts/train_prior.py --init portraits --latents my.h5 --out runs/priors/mine    # fine-tune
$ python scripts/train_prior.py --prior pixelcnn                           # another kind
$ python scripts/train_prior.py --latents my.h5 --condition vector         # images given the set's vectors
$ python scripts/train_prior.py --latents two.h5 --level 1                 # one prior for each level of the tokenizer
$ accelerate launch scripts/train_prior.py --preset ffhq256 --latents ffhq256.h5    # large, for GPUs
$ accelerate launch --num_processes 8 scripts/train_prior.py --batch-size 512       # eight GPUs share each batch

Kinds of prior (for the options of one: --prior KIND --help):
  hourglass   transformer that samples by denoising steps (SUNDAE)
  maskgit     transformer that samples by masked decoding steps
  transformer autoregressive: each code from all codes before it; has exact likelihoods
  pixelcnn    autoregressive, by convolutions; has exact likelihoods
  realnvp     normalizing flow over real-valued latents, such as selfvae's

If it is stopped (Ctrl-C) or killed, run the same command to resume; see --resume.

More: docs/guide/train-a-prior.md; several processes: docs/guide/many-gpus-and-resuming.md

Next steps: sample.py and inpaint.py"""


def main() -> None:
    """Runs the command line."""
    cli.run(
        train_prior_with_ending,
        lambda: default_prior_config(
            cli.chosen("--preset", "small"), cli.chosen("--prior", "") or None, cli.chosen("--init", "") or None
        ),
        about=ABOUT,
    )


if __name__ == "__main__":
    main()
