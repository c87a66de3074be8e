"""Runs evaluations: writes a result as JSON with all settings, prints it as a table, and repeats an evaluation from it.

The scores are computed in the files named for what they evaluate.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from smalti.commands.model_paths import prior_class
from smalti.core.config import config_from_json, read_json
from smalti.core.errors import UserError, printable
from smalti.core.files import write_json
from smalti.core.provenance import versions
from smalti.evaluation.config import (
    Evaluation,
    ImagesEvaluation,
    InpaintingEvaluation,
    LikelihoodEvaluation,
    ModesEvaluation,
    PriorEvaluation,
    TokenizerEvaluation,
)
from smalti.evaluation.image_likelihood import evaluate_likelihood
from smalti.evaluation.image_sets import evaluate_images
from smalti.evaluation.inpainting import evaluate_inpainting
from smalti.evaluation.modes import evaluate_modes
from smalti.evaluation.prior import evaluate_prior
from smalti.evaluation.result_files import claim_result, result_path, settings_of
from smalti.evaluation.sample_size import too_few_images
from smalti.evaluation.scores import SPEEDS, Conditions, Scores
from smalti.evaluation.tokenizer import evaluate_tokenizer

KINDS: dict[str, tuple[Any, Callable[..., tuple[Scores, Conditions]]]] = {
    "tokenizer": (TokenizerEvaluation, evaluate_tokenizer),
    "prior": (PriorEvaluation, evaluate_prior),
    "inpainting": (InpaintingEvaluation, evaluate_inpainting),
    "modes": (ModesEvaluation, evaluate_modes),
    "likelihood": (LikelihoodEvaluation, evaluate_likelihood),
    "images": (ImagesEvaluation, evaluate_images),
}
"""The settings and the function of each kind of evaluation."""
_MISSING = "missing"

RecordedScores: TypeAlias = dict[str, dict[str, float | None]]
"""Scores as results hold them: JSON has no infinity and no NaN, which become null."""


@dataclass(frozen=True)
class RepeatEvaluation:
    """Settings to repeat an evaluation from its result file."""

    again: Path
    """Result file of an evaluation. It is repeated with the same settings, and differing scores are listed."""
    out: Path | None = None
    """JSON file for the new result [default: not written]."""


def config_for(of: str, prior: str) -> Any:
    """Returns the config class of an evaluation, with the sampler settings for the kind of `prior`.

    Raises:
        UserError: if `of` is no kind of evaluation.
    """
    if of not in KINDS:
        raise UserError(f"--of {of} cannot be evaluated; give one of {', '.join(KINDS)}")
    settings, _ = KINDS[of]
    if of not in ("prior", "inpainting"):
        return settings
    method = prior_class(prior).method
    return settings[method.sampling if of == "prior" else method.filling]


def evaluate(config: Evaluation | RepeatEvaluation) -> Scores:
    """Evaluates a model, prints a table and writes the result; or repeats an evaluation and prints what differs.

    Raises:
        UserError: if a model, images or the extractor cannot be loaded, the file to repeat is not a result, or `out`
            is a file that is not a result of the same evaluation.
    """
    if isinstance(config, RepeatEvaluation):
        return _repeat(config)
    with claim_result(config):
        scores, conditions = _evaluate(config)
        path = result_path(config, conditions)
        _write(path, config, scores, conditions)
    print(table(scores, conditions))
    print(f"\n{path}")
    return scores


def table(scores: Scores, conditions: Conditions) -> str:
    """Formats scores as a Markdown table, a row per score and a column per kind of images, with the conditions below.

    Digests and fingerprints are left out. Warnings follow if there are too few images for a score.
    """
    columns = list(dict.fromkeys(column for values in scores.values() for column in values))
    cells = [["score", *columns]]
    cells += [
        [name, *(f"{values[column]:.4g}" if column in values else "" for column in columns)]
        for name, values in scores.items()
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in cells]
    rows.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    shown = {name: value for name, value in conditions.items() if not name.endswith(("digest", "fingerprint"))}
    warnings = [f"warning: {warning}" for warning in too_few_images(scores, conditions)]
    lines = [*rows, "", ", ".join(f"{name} {value}" for name, value in shown.items()), *warnings]
    return "\n".join(map(printable, lines))


def _evaluate(config: Evaluation, *, sheet: bool = True) -> tuple[Scores, Conditions]:
    _, evaluation = KINDS[config.of]
    return evaluation(config, sheet=sheet) if config.of == "prior" else evaluation(config)


def _write(path: Path, config: Evaluation, scores: Scores, conditions: Conditions) -> None:
    result = {
        "scores": _recorded(scores),
        "conditions": conditions,
        "warnings": too_few_images(scores, conditions),
        "settings": settings_of(config),
        "versions": versions(),
    }
    write_json(path, result)


def _recorded(scores: Scores) -> RecordedScores:
    return {
        name: {column: value if math.isfinite(value) else None for column, value in values.items()}
        for name, values in scores.items()
    }


def _repeat(config: RepeatEvaluation) -> Scores:
    """Repeats an evaluation with the settings of its result, and prints the scores and what differs."""
    try:
        before = read_json(config.again)
        settings = before["settings"]
        config_class = config_for(settings["of"], settings.get("prior", [""])[-1])
        evaluation = config_from_json(config_class, settings, str(config.again))
        if isinstance(evaluation, (PriorEvaluation, TokenizerEvaluation)):
            evaluation = replace(evaluation, samples_npz=None)  # those of the result stay
        old_scores, old_conditions = before["scores"], before["conditions"]
    except OSError as error:
        raise UserError(f"{config.again} cannot be read ({error.strerror}); give a result of evaluate.py") from error
    except UserError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{config.again} is not a result of evaluate.py; give a JSON file that it wrote") from error
    renamed, path = replace(evaluation, out=config.out), None
    with claim_result(renamed, again=config.again) if config.out else nullcontext():
        scores, conditions = _evaluate(evaluation, sheet=False)
        if config.out:
            path = result_path(renamed, conditions, again=config.again)
            _write(path, evaluation, scores, conditions)
    print(table(scores, conditions))
    changes = _changes(old_scores, scores, old_conditions, conditions)
    print(f"\n{'; '.join(changes) if changes else f'the same as {config.again}, except for speeds'}")
    if path:
        print(f"\n{path}")
    return scores


def _changes(
    old_scores: RecordedScores, scores: Scores, old_conditions: Conditions, conditions: Conditions
) -> list[str]:
    """Describes every recorded condition and every score, except speeds, whose value differs or that is missing."""
    changes = [
        f"{name} was {value}, is {conditions.get(name, _MISSING)}"
        for name, value in old_conditions.items()
        if conditions.get(name, _MISSING) != value
    ]
    old, new = (
        {
            f"{name} of {column}": "not finite" if value is None else value
            for name, values in each.items()
            if name not in SPEEDS
            for column, value in values.items()
        }
        for each in (old_scores, _recorded(scores))
    )
    values = {name: (old.get(name, _MISSING), new.get(name, _MISSING)) for name in old | new}
    return changes + [f"{name} was {before}, is {now}" for name, (before, now) in values.items() if before != now]
