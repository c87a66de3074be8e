"""Generates images; see `smalti.commands.sample`."""

from smalti import cli
from smalti.commands.sample import default_config, sample
from smalti.commands.selfvae_modes import SampleWay, sample_way

ABOUT = """Generates images with a trained prior, as one sheet; or by one of selfvae's ways.

$ python scripts/sample.py                                               # 64 images from runs/priors/hourglass
$ python scripts/sample.py --num 16 --seed 7 --temperature 1.0 0.6       # safer ones: cooler towards the end
$ python scripts/sample.py --classes flags smileys --guidance 2           # two classes, a row each
$ python scripts/sample.py --prior my/prior --steps 60 --out fewer_steps.png
$ python scripts/sample.py --num 8 --files --animate                      # each by itself too, and how they came
$ python scripts/sample.py --prior pixelcnn --temperature 0.9            # another kind has other flags: add --help
$ python scripts/sample.py --prior my/top my/bottom                      # one for each level of the tokenizer
$ python scripts/sample.py --way generation --tokenizer selfvae          # its own prior of u, no other needed
$ python scripts/sample.py --way conditional-generation --num 8          # held-out images from their halves"""


def main() -> None:
    """The command."""
    if cli.chosen("--way", ""):
        cli.run(lambda config: print(sample_way(config)), SampleWay, about=ABOUT)
    else:
        kind = cli.chosen("--prior", "hourglass")
        cli.run(lambda config: print(sample(config)), lambda: default_config(kind), about=ABOUT)


if __name__ == "__main__":
    main()
