"""How the runs of the study of priors are trained: a tokenizer and a latent set for each kind of grid, then priors.

A run is kept under a name with a digest of all that decides it, so that a study that is stopped goes on. Which runs
there are: `reproduce_priors.py`.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from smalti.benchmarks.comparison import Comparison, Variant
from smalti.benchmarks.run import medians
from smalti.commands.build_latents import BuildLatents, build_latents
from smalti.commands.model_paths import prior_class
from smalti.commands.train_prior import TrainPrior, grids, train_prior
from smalti.commands.train_tokenizer import TrainTokenizer, train_tokenizer
from smalti.core.config import flatten
from smalti.core.devices import autocast, best_device, resolve
from smalti.core.files import write_json
from smalti.core.models import load
from smalti.core.randomness import generator_for, row_seeds
from smalti.latentsets.reader import LatentSet
from smalti.priors.base import CodePrior
from smalti.studies.flat_codes import flatten_codes
from smalti.studies.priors.study import SETUPS, Cell, Grid, Model, Part, ReproducePriors
from smalti.tokenizers.vq.hrvq import HRVQConfig
from smalti.training.config import FitConfig
from smalti.training.run_folder import last_metrics

RESULT_NAME = "result.json"
DIGEST_LETTERS = 10
REPETITIONS = 5
"""Steps of each model that are timed."""


def keyed(name: str, decides: dict[str, Any]) -> str:
    """A name for what is kept, with a digest of all that decides it."""
    text = json.dumps(decides, sort_keys=True, default=str)
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LETTERS]}"


def tokenizer_of(grid: Grid, config: ReproducePriors) -> TrainTokenizer[HRVQConfig]:
    """How the HR-VQVAE with codes of this kind is trained, into which folder."""
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
        flips=config.data != "mnist",  # mirrored digits are no digits
        precision=config.precision,
    )
    name = keyed(f"tokenizer-{config.data}-{grid.side}x{grid.side}-{grid.branching}cubed", decided_by(settings))
    return replace(settings, out=config.work / name)


def decided_by(settings: Any) -> dict[str, Any]:
    """The settings of a training, flat, with the arithmetic as it will be."""
    return {**flatten(settings), "precision": resolve(settings.precision)}


def latents_of(grid: Grid, config: ReproducePriors, *, flat: bool = False) -> Path:
    """The latent set of such codes, its tokenizer trained and it built if they were not yet; `flat`, each code as a
    number of one digit."""
    tokenizer = tokenizer_of(grid, config)
    assert tokenizer.out is not None
    path = config.work / f"{tokenizer.out.name.replace('tokenizer', 'latents')}.h5"
    if not path.exists():
        build_latents(BuildLatents(tokenizer=str(train_tokenizer(tokenizer)), flips=False, out=path))
    if not flat:
        return path
    of_one_digit = path.with_stem(f"{path.stem}-flat")
    if not of_one_digit.exists():
        flatten_codes(LatentSet(path), of_one_digit)
    return of_one_digit


def trained(cell: Cell, config: ReproducePriors) -> Path:
    """The folder of a run, trained as far as it was not yet; with its result: held-out loss at its end, nats per code
    by its own objective, and parameters."""
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
    folder = config.work / keyed(name, decided_by(settings))
    if not (folder / RESULT_NAME).exists():
        train_prior(replace(settings, latents=latents, out=folder))
        parameters = sum(parameter.numel() for parameter in load(folder, "prior").parameters())
        found = {"held_out_loss": last_metrics(folder)["held_out_loss"], "parameters": parameters}
        write_json(folder / RESULT_NAME, found)
    return folder


def network(model: Model, config: ReproducePriors) -> Any:
    """The config of its network, but for what the latent set says."""
    made = prior_class(model.kind).config_class(**model.changes)
    more = {"model_width": made.model_width * config.factor, "heads": made.heads * config.factor}
    return replace(made, **more)


def fit_of(cell: Cell, config: ReproducePriors) -> FitConfig:
    """`train_prior`'s default training, in so many steps."""
    return replace(
        TrainPrior(model=None, objective=None).fit,
        steps=cell.steps,
        batch_size=SETUPS[cell.part].batch * config.factor,
        seed=cell.seed,
        report_steps=cell.steps,
        save_steps=100,
    )


def step_seconds(part: Part, config: ReproducePriors) -> dict[str, float]:
    """What a training step of each model takes, by name: measured once, in turns, with untrained networks."""
    setup, networks = SETUPS[part], {}
    for name, model in setup.models.items():
        levels = LatentSet(latents_of(setup.grid, config, flat=model.flat)).layout.levels
        networks[name] = (model.kind, replace(network(model, config), **grids(levels, 0)))
    batch, shown = setup.batch * config.factor, {name: (kind, flatten(made)) for name, (kind, made) in networks.items()}
    decides = {"models": shown, "batch": batch, "precision": resolve(config.precision), "device": best_device()}
    path = config.work / f"{keyed(f'seconds-{part}', decides)}.json"
    if not path.exists():
        variants = [Variant(name, training_step(kind, made, batch, config)) for name, (kind, made) in networks.items()]
        write_json(path, dict(zip(networks, medians(Comparison(part, variants), REPETITIONS), strict=True)))
    return json.loads(path.read_text())


def training_step(kind: str, made: Any, batch: int, config: ReproducePriors) -> Callable[[], None]:
    """A step on random codes: loss, gradients, optimiser."""
    where, cls = best_device(), prior_class(kind)
    prior = cls(made).to(where)
    assert isinstance(prior, CodePrior)
    objective = cls.method.objective(prior, cls.method.objective_config())
    optimizer = TrainPrior(model=None, objective=None).fit.optimizer_of(objective)
    shape, size = (batch, prior.level.height, prior.level.width), prior.level.codebook_size
    codes = torch.randint(size, shape, generator=generator_for(0)).to(where)
    rows = {"codes": codes, "seeds": row_seeds(0, torch.arange(batch, device=where))}

    def step() -> None:
        prior.zero_grad()
        with autocast(where, config.precision):
            loss, _ = objective(rows)
        loss.backward()
        optimizer.step()

    return step


def given_steps(part: Part, config: ReproducePriors) -> int:
    """Of the first model of a part."""
    return getattr(config, SETUPS[part].steps)


def equal_time_steps(part: Part, config: ReproducePriors) -> dict[str, int]:
    """Steps that take each model of a part as long as the first one's take it."""
    given, seconds = given_steps(part, config), step_seconds(part, config)
    first, *_ = seconds.values()
    return {name: max(1, math.floor(given * first / each)) for name, each in seconds.items()}
