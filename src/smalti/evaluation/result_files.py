"""The files that evaluations write: their default names, and the rule that no result replaces one of another model.

A result is JSON; the evaluation of a prior writes a sheet of pictures beside it. A file is replaced only by the same
evaluation: the same settings, weights and images.
"""

import dataclasses
import json
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from smalti.commands.model_paths import RUNS, image_inputs
from smalti.core import locks, models
from smalti.core.config import read_json
from smalti.core.files import free_name
from smalti.evaluation.config import (
    Evaluation,
    ImagesEvaluation,
    InpaintingEvaluation,
    LikelihoodEvaluation,
    PriorEvaluation,
    TokenizerEvaluation,
)
from smalti.evaluation.scores import Conditions
from smalti.images.sheets import embedded_settings
from smalti.images.sources import local_paths
from smalti.training.snapshots import STATES_NAME

EVALUATIONS = RUNS / "evaluations"
_LONGEST_NAME = 100  # characters; names of several priors are joined
_INPUTS = ("tokenizer_digest", "prior_digests", "images_fingerprint", "reference_fingerprint")
"""Conditions of a result that tell its models and images from others of the same names."""


def settings_of(config: Evaluation) -> dict[str, Any]:
    """Returns the settings of an evaluation as they are recorded in its result."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def claim_result(config: Evaluation, *, again: Path | None = None) -> AbstractContextManager[None]:
    """Checks that the result can be written, before the evaluation starts, and locks it while the evaluation runs.

    Args:
        config: the settings of the evaluation.
        again: the result that it repeats, if it does.

    Raises:
        UserError: as `locks.claim` does; if `out` holds anything but a result of the same settings.
    """
    if isinstance(config, ImagesEvaluation):
        inputs = [*local_paths(config.images), *local_paths(config.reference)]
    else:
        by_prior = isinstance(config, (PriorEvaluation, InpaintingEvaluation))
        images = config.images if isinstance(config, LikelihoodEvaluation) else config.protocol.images
        inputs = image_inputs(images, priors=config.prior if by_prior else (), tokenizer=config.tokenizer)
    inputs += [again] if again else []
    outputs = _outputs(config.out or result_path(config), config)
    if isinstance(config, (PriorEvaluation, TokenizerEvaluation)) and config.samples_npz:
        outputs.append(config.samples_npz)
    return locks.claim(outputs, inputs=inputs, is_own=lambda each: _is_own(each, config))


def result_path(config: Evaluation, conditions: Conditions | None = None, *, again: Path | None = None) -> Path:
    """Returns the file for a result: `out` or the default name, numbered if another result is there.

    Args:
        config: the settings of the evaluation.
        conditions: those of the result, with the digests of the models; None before they are known.
        again: the result that it repeats, which stays.
    """

    def is_own(path: Path) -> bool:
        return not (again and path.resolve() == again.resolve()) and _is_own(path, config, conditions)

    path = config.out or EVALUATIONS / f"{config.of}-{_model_name(config)}.json"
    return free_name(path, lambda name: _outputs(name, config), is_own)


def sheet_path(path: Path) -> Path:
    """Returns the file for the pictures beside a result."""
    return path.with_name(f"{path.stem}-neighbours.png")


def sheet_settings(config: Evaluation, conditions: Conditions) -> dict[str, Any]:
    """Returns what is embedded in the pictures beside a result, by which `result_path` recognises them."""
    return {"command": "evaluate", "settings": settings_of(config), "conditions": conditions}


def _outputs(path: Path, config: Evaluation) -> list[Path]:
    return [path, sheet_path(path)] if isinstance(config, PriorEvaluation) else [path]


def _is_own(path: Path, config: Evaluation, conditions: Conditions | None = None) -> bool:
    """Returns whether a file is a result of these settings, or its pictures; with `conditions`, of the same models."""
    try:
        result = read_json(path) if path.suffix != ".png" else embedded_settings(path)
        same_settings = {**result["settings"], "out": None} == {**settings_of(config), "out": None}
        recorded = result["conditions"]
        compared = [name for name in _INPUTS if name in recorded or name != "reference_fingerprint"]  # of late
        return same_settings and all(recorded.get(name) == (conditions or recorded).get(name) for name in compared)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not a result
        return False


def _model_name(config: Evaluation) -> str:
    """Returns the name of the evaluated model for a file name; the names of several priors are joined by `+`."""
    if isinstance(config, ImagesEvaluation):
        return _run_name(config.images)[:_LONGEST_NAME]
    by_prior = isinstance(config, (PriorEvaluation, InpaintingEvaluation))
    names = [_run_name(source) for source in (config.prior if by_prior else (config.tokenizer,))]
    return "+".join(names)[:_LONGEST_NAME]


def _run_name(source: str) -> str:
    """Returns the kind, the name of a run's folder, or the name of a hub model, in characters that file names allow.

    A folder that is just called `prior` or `tokenizer` gets the name of the folder around it. Snapshots and layers
    get the name of their run in front.
    """
    folder = Path(source)
    if source not in (*models.kinds("prior"), *models.kinds("tokenizer")) and folder.is_dir():
        folder = folder.resolve()
        if folder.parent.name == STATES_NAME:
            return f"{_run_name(str(folder.parents[1]))}-{folder.name}"
        if re.fullmatch(r"layer-\d+", folder.name):
            return f"{_run_name(str(folder.parent))}-{folder.name}"
        if folder.name in ("prior", "tokenizer") and folder.parent.name:
            folder = folder.parent
    return re.sub(r"[^\w.-]+", "-", folder.name).strip("-.") or "model"
