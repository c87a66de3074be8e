"""The demonstration that `make demo` makes: its size, and whether it is there already. Its stages: `demo_stages.py`."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from smalti.devices import Precision
from smalti.pipeline.places import RUNS
from smalti.priors.samplers import SundaeSampling
from smalti.runs import flatten

PICTURES = ("reconstructions.png", "samples.png", "inpainting.png")
REPORT_NAME, DONE_NAME = "report.md", "demo.json"


@dataclass(frozen=True)
class Demo:
    """How large a demonstration to make. The defaults take some six minutes on two CPU cores."""

    tokenizer_steps: int = 480
    """Optimiser steps of the tokenizer."""
    prior_steps: int = 900
    """Optimiser steps of the prior."""
    sampling: SundaeSampling = field(default_factory=SundaeSampling)
    """Of samples."""
    samples: int = 80
    """How many new images."""
    seed: int = 0
    """Decides everything that is drawn."""
    precision: Precision = "auto"
    """Arithmetic of the networks; auto is bf16 where the hardware is fast in it."""
    out: Path = RUNS / "demo"
    """Folder for everything."""


def demo(config: Demo) -> Path:
    """Runs every stage that is not finished yet, and returns the report's path.

    Raises:
        UserError: if the folder holds a demonstration with other settings.
        Interrupted: if a signal stopped it; called again, it goes on where it was.
    """
    settings = json.loads(json.dumps(flatten(config), default=str))
    report = config.out / REPORT_NAME
    whole = all((config.out / name).exists() for name in (REPORT_NAME, DONE_NAME, *PICTURES))
    if whole and json.loads((config.out / DONE_NAME).read_text())["settings"] == settings:
        print(
            f"The demonstration is finished: see {report} and the pictures beside it. Remove {config.out} to redo it."
        )
        return report
    from smalti.pipeline.demo_stages import run_stages  # here: it takes seconds, which the answer above need not wait

    run_stages(config, settings)
    return report
