"""Judges models; see `smalti.evaluation.report`."""

from smalti import cli
from smalti.evaluation.report import RepeatEvaluation, config_for, evaluate

ABOUT = """Judges a trained tokenizer, a prior or its fills by held-out images; needs the extra `metrics`.

$ python scripts/evaluate.py                                     # samples of runs/priors/hourglass against emoji
$ python scripts/evaluate.py --of tokenizer --tokenizer my/tokenizer --images my/photos
$ python scripts/evaluate.py --of inpainting --prior my/prior --images my/photos --num 200
$ python scripts/evaluate.py --of modes --tokenizer selfvae       # what comes back of how much that is sent
$ python scripts/evaluate.py --of likelihood --tokenizer selfvae # bits per dimension, by 512 importance samples
$ python scripts/evaluate.py --again runs/evaluations/prior-hourglass.json # the same once more

Beside each distance is that of real images in place of the model's, the floor; compare numbers only with those of as
many images and the same extractor. What each score means is in docs/evaluating.md."""


def main() -> None:
    """The command."""
    of, prior = cli.chosen("--of", "prior"), cli.chosen("--prior", "hourglass")
    cli.run(evaluate, lambda: RepeatEvaluation if cli.chosen("--again", "") else config_for(of, prior), about=ABOUT)


if __name__ == "__main__":
    main()
