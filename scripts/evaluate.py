"""Evaluates models; see `smalti.evaluation.report`."""

from smalti import cli
from smalti.evaluation.report import RepeatEvaluation, config_for, evaluate

ABOUT = """Evaluates a trained tokenizer, a prior or its fills on held-out images; or compares two sets of images.

$ python scripts/evaluate.py                     # samples of runs/priors/hourglass against its training set's images
$ python scripts/evaluate.py --of tokenizer --tokenizer my/tokenizer --images my/photos
$ python scripts/evaluate.py --of inpainting --prior my/prior --images my/photos --num 200
$ python scripts/evaluate.py --of modes --tokenizer selfvae        # each generation mode, by the bytes it transmits
$ python scripts/evaluate.py --of likelihood --tokenizer selfvae   # bits per dimension, by importance sampling
$ python scripts/evaluate.py --of images --images samples.npz --reference my/photos    # without a model
$ python scripts/evaluate.py --again runs/evaluations/prior-hourglass.json # repeats an evaluation

Needs the extra `metrics`: pip install -e '.[metrics]'

For the options of one kind of evaluation: --of KIND --help

The meaning of each score, and which scores may be compared: docs/guide/evaluate.md"""


def main() -> None:
    """Runs the command line."""
    of, prior = cli.chosen("--of", "prior"), cli.chosen("--prior", "hourglass")
    cli.run(evaluate, lambda: RepeatEvaluation if cli.chosen("--again", "") else config_for(of, prior), about=ABOUT)


if __name__ == "__main__":
    main()
