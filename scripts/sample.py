"""Generates images; see `smalti.pipeline.generate`."""

from smalti import cli
from smalti.pipeline.generate import Sample, sample

ABOUT = """Generates images with a trained prior, as one sheet.

$ python scripts/sample.py                                               # 64 images from runs/priors/hourglass
$ python scripts/sample.py --num 16 --seed 7 --temperature 1.0 0.6       # safer ones: cooler towards the end
$ python scripts/sample.py --prior my/prior --steps 100 --out more.png"""


def main() -> None:
    """The command."""
    cli.run(lambda config: print(sample(config)), Sample, about=ABOUT)


if __name__ == "__main__":
    main()
