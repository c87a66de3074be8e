"""The files that evaluations write: their default names, and the rule that no result replaces one of another model.

A file is replaced only by the same evaluation: the same settings and the same weights.
"""

import dataclasses
import json
import re
from itertools import count
from pathlib import Path
from typing import Any

from smalti.commands.model_paths import RUNS
from smalti.core import models
from smalti.core.errors import UserError
from smalti.evaluation.config import Evaluation, InpaintingEvaluation, PriorEvaluation
from smalti.evaluation.scores import Conditions
from smalti.training.snapshots import STATES_NAME

EVALUATIONS = RUNS / "evaluations"
_LONGEST_NAME = 100  # characters; names of several priors are joined
_DIGESTS = ("tokenizer_digest", "prior_digests")


def settings_of(config: Evaluation) -> dict[str, Any]:
    """Returns the settings of an evaluation as they are recorded in its result."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def result_path(config: Evaluation, conditions: Conditions) -> Path:
    """Returns the file for a result: `out` or the default name, numbered if another result is there.

    Args:
        config: the settings of the evaluation.
        conditions: those of the result; they hold the digests of the models.
    """
    path = config.out or EVALUATIONS / f"{config.of}-{_model_name(config)}.json"
    for number in count(1):
        numbered = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        if not numbered.exists() or _is_result(numbered, config, conditions):
            return numbered
    raise AssertionError


def require_free(path: Path | None, config: Evaluation) -> None:
    """Refuses an output file that holds anything but a result of the same settings, before the evaluation starts.

    Raises:
        UserError: naming the file.
    """
    if path is not None and path.exists() and not _is_result(path, config):
        raise UserError(f"{path} holds something else than a result of this evaluation; give another --out")


def _is_result(path: Path, config: Evaluation, conditions: Conditions | None = None) -> bool:
    """Returns whether a file is a result of these settings, and with `conditions` of the same models."""
    try:
        result = json.loads(path.read_text())
        same_settings = {**result["settings"], "out": None} == {**settings_of(config), "out": None}
        recorded = result["conditions"]
        return same_settings and all(
            recorded.get(name) == (conditions or recorded).get(name) for name in (*_DIGESTS, "images_fingerprint")
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not a result
        return False


def _model_name(config: Evaluation) -> str:
    """Returns the name of the evaluated model for a file name; the names of several priors are joined by `+`."""
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
