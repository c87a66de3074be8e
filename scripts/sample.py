"""Generates images; see `smalti.commands.sample`."""

from smalti import cli
from smalti.commands.sample import default_config, sample
from smalti.commands.selfvae_modes import SampleMode, sample_mode

ABOUT = """Generates images with a trained prior, as one sheet, or by one of selfvae's generation modes.

$ python scripts/sample.py                                               # runs/priors/hourglass, or the package's prior
$ python scripts/sample.py --num 16 --seed 7 --temperature 0.8 0.4       # likelier codes, less variety
$ python scripts/sample.py --classes pixel-art toon --guidance 2         # two classes, a row each
$ python scripts/sample.py --prior my/prior --conditions vectors.npy     # a vector for each image
$ python scripts/sample.py --steps 8 --proportion 1 1 --out fast.png     # fewer steps, larger proportions
$ python scripts/sample.py --num 8 --files --animate                     # also single files and an animation
$ python scripts/sample.py --prior pixelcnn --temperature 0.9            # another kind of prior
$ python scripts/sample.py --prior my/top my/bottom                      # one prior for each level of the tokenizer
$ python scripts/sample.py --mode generation --tokenizer selfvae         # selfvae has a prior of its own
$ python scripts/sample.py --mode conditional-generation --num 8         # held-out images from a part of them

For the options of a kind of prior: --prior KIND --help. For those of the generation modes: --mode MODE --help"""


def main() -> None:
    """Runs the command line."""
    if cli.chosen("--mode", ""):
        cli.run(lambda config: print(sample_mode(config)), SampleMode, about=ABOUT)
    else:
        kind = cli.chosen("--prior", "hourglass")
        cli.run(lambda config: print(sample(config)), lambda: default_config(kind), about=ABOUT)


if __name__ == "__main__":
    main()
