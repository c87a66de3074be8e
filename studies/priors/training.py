"""Training in the study of priors: a tokenizer and a latent set for each grid, then the priors.

A run's folder carries a digest of all settings that affect it, so that a study that was stopped resumes
with the runs that are missing. Which models there are is in `study.py`.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalti.benchmarks.comparison import Comparison, Variant
from smalti.benchmarks.run import medians
from smalti.commands.build_latents import BuildLatents, build_latents
from smalti.commands.model_paths import prior_class
from smalti.commands.train_prior import TrainPrior, default_fit, train_prior
from smalti.commands.train_tokenizer import TrainTokenizer, train_tokenizer
from smalti.core.config import flatten
from smalti.core.devices import Precision, autocast, best_device, resolve
from smalti.core.files import write_json
from smalti.core.models import load
from smalti.core.provenance import last_metrics
from smalti.core.randomness import generator_for, row_seeds
from smalti.latentsets.dataset import LatentRows
from smalti.latentsets.reader import LatentSet
from smalti.priors.base import CodePrior
from smalti.priors.grids import grids
from smalti.priors.methods.sundae import SUNDAE, corrupt
from smalti.studies.experiment import count_parameters, measure_once
from smalti.studies.flat_codes import flat_latents
from smalti.studies.priors.study import DEFAULTS, POSITIONS, SETUPS, Cell, Grid, Model, Part, ReproducePriors
from smalti.tokenizers.vq.hrvq import HRVQConfig
from smalti.training.config import FitConfig

RESULT_NAME = "result.json"
DIGEST_LETTERS = 10
CORRUPTED_PERCENT = (25, 50, 75, 100)
MOST_ROWS, ROWS_AT_ONCE = 1_024, 64
"""Held-out rows at most whose denoising is measured, and those of one call of the network."""
REPETITIONS = 5
"""Training steps of each model that are timed."""


def digest_of(settings: dict[str, Any]) -> str:
    """Returns a digest of the settings that affect a result, for the name of its file or folder."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LETTERS]


def keyed(name: str, settings: dict[str, Any]) -> str:
    """Returns the name with a digest of the settings that affect a result."""
    return f"{name}-{digest_of(settings)}"


def tokenizer_of(grid: Grid, config: ReproducePriors) -> TrainTokenizer[HRVQConfig]:
    """Returns the training command of the HR-VQVAE for a grid, with its folder."""
    settings = TrainTokenizer(
        model=HRVQConfig(
            height=grid.pixels,
            width=grid.pixels,
            image_channels=1 if config.data == "mnist" else 3,
            widths=tuple(config.channels * 2**stage for stage in range(grid.stages)),
            branching=grid.branching,
        ),
        fit=FitConfig(steps=config.tokenizer_steps, batch_size=32, report_steps=config.tokenizer_steps, save_steps=100),
        images=config.images,
        flips=config.data != "mnist",  # a mirrored digit is no digit
        precision=config.precision,
    )
    name = keyed(f"tokenizer-{config.data}-{grid.side}x{grid.side}-{grid.branching}cubed", flat_settings(settings))
    return replace(settings, out=config.work / name)


def flat_settings(settings: Any) -> dict[str, Any]:
    """Returns the settings of a training as a flat dictionary, with `auto` precision resolved."""
    return {**flatten(settings), "precision": resolve(settings.precision)}


def latents_of(grid: Grid, config: ReproducePriors, *, flat: bool = False) -> Path:
    """Returns the latent set of a grid; trains the tokenizer and builds the set where missing.

    With `flat` every code is a single digit.
    """
    tokenizer = tokenizer_of(grid, config)
    assert tokenizer.out is not None
    path = config.work / f"{tokenizer.out.name.replace('tokenizer', 'latents')}.h5"
    if not path.exists():
        build_latents(BuildLatents(tokenizer=str(train_tokenizer(tokenizer)), flips=False, out=path))
    return flat_latents(path) if flat else path


def trained(cell: Cell, config: ReproducePriors) -> Path:
    """Returns the folder of a run, trained to the end.

    Its result file has the number of parameters and the final held-out loss by its own objective, nats per code; for
    SUNDAE in the parts `positions` and `defaults` also those of `losses_by_corruption`, as `by_corruption`.
    """
    setup = SETUPS[cell.part]
    model = setup.models[cell.model]
    latents = latents_of(setup.grid, config, flat=model.flat)
    settings = TrainPrior(
        model=network(model, config),
        objective=prior_class(model.kind).method.objective_config(),
        fit=fit_of(cell, config),
        prior=model.kind,
        latents=Path(latents.name),
        precision=config.precision,
        sheet_samples=0,
    )
    name = f"{cell.part}-{config.data}-{cell.model.replace(' ', '-')}-{cell.steps}steps-seed{cell.seed}"
    folder = config.work / keyed(name, flat_settings(settings))
    if not (folder / RESULT_NAME).exists():
        train_prior(replace(settings, latents=latents, out=folder))
        prior = load(folder, "prior")
        measured = {"held_out_loss": last_metrics(folder)["held_out_loss"], "parameters": count_parameters(prior)}
        if cell.part in {**POSITIONS, **DEFAULTS} and isinstance(prior, CodePrior) and prior.method is SUNDAE:
            measured["by_corruption"] = losses_by_corruption(prior, latents)
        write_json(folder / RESULT_NAME, measured)
    return folder


@torch.no_grad()
def losses_by_corruption(prior: CodePrior, latents: Path) -> dict[str, float]:
    """Returns the held-out loss of one denoising step, nats a code, by the share of corrupted codes in percent."""
    rows, head = LatentRows(LatentSet(latents), split="held_out"), prior.head
    nll: dict[str, list[Tensor]] = {str(percent): [] for percent in CORRUPTED_PERCENT}
    for first in range(0, min(len(rows), MOST_ROWS), ROWS_AT_ONCE):
        batch = rows.__getitems__(range(first, min(len(rows), first + ROWS_AT_ONCE)))
        codes, seeds, conditioning = batch["codes"], row_seeds(0, batch["rows"]), prior.conditioning(batch)
        for percent in CORRUPTED_PERCENT:
            features = prior.features(corrupt(head, codes, seeds, percent / 100), **conditioning)
            nll[str(percent)].append(head.nll(features, codes.flatten(1)))
    return {percent: float(torch.cat(each).mean()) for percent, each in nll.items()}


def network(model: Model, config: ReproducePriors) -> Any:
    """Returns the config of a model's network, without the fields that depend on the latent set."""
    network_config = prior_class(model.kind).config_class(**model.changes)
    width, heads = network_config.model_width, network_config.heads
    return replace(network_config, model_width=width * config.factor, heads=heads * config.factor)


def fit_of(cell: Cell, config: ReproducePriors) -> FitConfig:
    """Returns the defaults of `train_prior` with the run's steps, batch size, rate and seed."""
    model = SETUPS[cell.part].models[cell.model]
    defaults = default_fit(model.kind)
    return replace(
        defaults,
        learning_rate=model.learning_rate or defaults.learning_rate,
        steps=cell.steps,
        batch_size=SETUPS[cell.part].batch * config.factor,
        seed=cell.seed,
        report_steps=cell.steps,
        save_steps=100,
    )


def step_seconds(part: Part, config: ReproducePriors) -> dict[str, float]:
    """Returns the seconds of a training step of each model, by name.

    They are measured once, with untrained networks and steps of the models in turn.
    """
    setup = SETUPS[part]
    networks: dict[str, tuple[str, Any]] = {}
    for name, model in setup.models.items():
        levels = LatentSet(latents_of(setup.grid, config, flat=model.flat)).layout.levels
        networks[name] = (model.kind, replace(network(model, config), **grids(levels, 0)))
    batch = setup.batch * config.factor
    models = {name: (kind, flatten(settings)) for name, (kind, settings) in networks.items()}
    affecting = {"models": models, "batch": batch, "precision": resolve(config.precision), "device": best_device()}

    def measure() -> dict[str, float]:
        variants = [Variant(name, training_step(*model, batch, config.precision)) for name, model in networks.items()]
        return dict(zip(networks, medians(Comparison(part, variants), REPETITIONS), strict=True))

    return measure_once(config.work / f"{keyed(f'seconds-{part}', affecting)}.json", measure)


def training_step(
    kind: str, network_config: Any, batch: int, precision: Precision, objective_config: Any = None
) -> Callable[[], None]:
    """Returns a function that trains one step on random codes: loss, gradients, optimizer."""
    device, cls = best_device(), prior_class(kind)
    prior = cls(network_config).to(device)
    assert isinstance(prior, CodePrior)
    objective = cls.method.objective(prior, objective_config or cls.method.objective_config())
    optimizer = TrainPrior(model=None, objective=None).fit.optimizer_of(objective)
    shape, size = (batch, prior.level.height, prior.level.width), prior.level.codebook_size
    codes = torch.randint(size, shape, generator=generator_for(0)).to(device)
    rows = {"codes": codes, "seeds": row_seeds(0, torch.arange(batch, device=device))}

    def step() -> None:
        prior.zero_grad()
        with autocast(device, precision):
            loss, _ = objective(rows)
        loss.backward()
        optimizer.step()

    return step


def cpu_seconds(step: Callable[[], None], count: int) -> float:
    """Returns the CPU seconds of a training step, the mean of `count` after one that does not count.

    Other work on the machine hardly changes them.
    """
    step()
    start = time.process_time()
    for _ in range(count):
        step()
    return (time.process_time() - start) / count


def first_model_steps(part: Part, config: ReproducePriors) -> int:
    """Returns the training steps of a part's first model."""
    return getattr(config, SETUPS[part].steps)


def equal_time_steps(part: Part, config: ReproducePriors) -> dict[str, int]:
    """Returns the training steps of each model that take as long as those of the first model."""
    steps, seconds = first_model_steps(part, config), step_seconds(part, config)
    first, *_ = seconds.values()
    return {name: max(1, math.floor(steps * first / each)) for name, each in seconds.items()}
