"""Evaluations as files: a result is written with all that made it, shown as a table, and can be had again from itself.

What is measured is in `judges.py` and `image_likelihood.py`.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smalti.commands.model_paths import prior_class
from smalti.core.config import config_from_json
from smalti.core.errors import UserError
from smalti.core.files import write_json
from smalti.core.provenance import versions
from smalti.evaluation.config import (
    Evaluation,
    InpaintingEvaluation,
    LikelihoodEvaluation,
    ModesEvaluation,
    PriorEvaluation,
    TokenizerEvaluation,
)
from smalti.evaluation.image_likelihood import evaluate_likelihood
from smalti.evaluation.inpainting import evaluate_inpainting
from smalti.evaluation.modes import evaluate_modes
from smalti.evaluation.prior import evaluate_prior
from smalti.evaluation.real_images import SPEEDS, Scores
from smalti.evaluation.tokenizer import evaluate_tokenizer

WITHOUT_PRIOR = {"tokenizer": TokenizerEvaluation, "modes": ModesEvaluation, "likelihood": LikelihoodEvaluation}
KINDS = ("tokenizer", "prior", "inpainting", "modes", "likelihood")


@dataclass(frozen=True)
class Again:
    """Which evaluation to repeat."""

    again: Path
    """A result, whose settings are used for everything."""
    out: Path | None = None
    """Where the new result goes [default: nowhere]."""


def config_for(of: str, prior: str) -> Any:
    """The settings of an evaluation; those of drawing codes are of the kind of the prior that `prior` names.

    Raises:
        UserError: for what cannot be evaluated.
    """
    if of not in KINDS:
        raise UserError(f"--of {of} cannot be evaluated; give one of {', '.join(KINDS)}")
    if of in WITHOUT_PRIOR:
        return WITHOUT_PRIOR[of]
    method = prior_class(prior).method
    return PriorEvaluation[method.sampling] if of == "prior" else InpaintingEvaluation[method.filling]


def evaluate(config: Evaluation | Again) -> Scores:
    """Judges a model, prints a table, and writes the result; or repeats an evaluation and says whether it came out
    the same.

    Raises:
        UserError: for a model, images or settings that will not do, or a file that is no result.
    """
    if isinstance(config, Again):
        return _repeat(config)
    scores, conditions = _evaluate(config)
    _write(config.out, config, scores, conditions)
    print(table(scores, conditions))
    print(f"\n{config.out}")
    return scores


def table(scores: Scores, conditions: dict[str, Any]) -> str:
    """Scores as Markdown: a line for each, a column for each whose images they are of; below, what they are of."""
    whose = list(dict.fromkeys(who for values in scores.values() for who in values))
    lines = [["score", *whose]]
    lines += [[name, *(f"{of[who]:.4g}" if who in of else "" for who in whose)] for name, of in scores.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines]
    rows.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    shown = {name: value for name, value in conditions.items() if not name.endswith(("digest", "fingerprint"))}
    return "\n".join([*rows, "", ", ".join(f"{name} {value}" for name, value in shown.items())])


def _evaluate(config: Evaluation) -> tuple[Scores, dict[str, Any]]:
    if isinstance(config, TokenizerEvaluation):
        return evaluate_tokenizer(config)
    if isinstance(config, ModesEvaluation):
        return evaluate_modes(config)
    if isinstance(config, LikelihoodEvaluation):
        return evaluate_likelihood(config)
    if isinstance(config, PriorEvaluation):
        return evaluate_prior(config)
    return evaluate_inpainting(config)


def _write(path: Path, config: Evaluation, scores: Scores, conditions: dict[str, Any]) -> None:
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    write_json(path, {"scores": scores, "conditions": conditions, "settings": settings, "versions": versions()})


def _repeat(config: Again) -> Scores:
    try:
        before = json.loads(config.again.read_text())
        settings = before["settings"]
        if isinstance(settings.get("prior"), str):  # of inpainting, before it took the priors of several levels
            settings["prior"] = [settings["prior"]]
        config_class = config_for(settings["of"], settings.get("prior", [""])[0])
        judge = config_from_json(config_class, settings, str(config.again))
        scores_before, conditions_before = before["scores"], before["conditions"]
    except OSError as error:
        raise UserError(f"{config.again} cannot be read ({error.strerror}); give a result of evaluate.py") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{config.again} is not a result of evaluate.py; give the JSON that one wrote") from error
    scores, conditions = _evaluate(judge)
    if config.out:
        _write(config.out, judge, scores, conditions)
    print(table(scores, conditions))
    changed = [
        f"{name} was {conditions_before.get(name)}, is {value}"
        for name, value in conditions.items()
        if value != conditions_before.get(name)
    ]
    changed += [
        f"{name} of {who} was {scores_before.get(name, {}).get(who)}, is {value}"
        for name, values in scores.items()
        for who, value in values.items()
        if name not in SPEEDS and scores_before.get(name, {}).get(who) != value
    ]
    print(f"\n{'; '.join(changed) if changed else f'the same as {config.again}, but for speeds'}")
    return scores
