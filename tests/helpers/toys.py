"""Tiny models and data to train in tests: a network of a few parameters, and every registered kind."""

import json
import math
import os
import signal
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from smalti.core import models
from smalti.core.models import CONFIG_NAME, WEIGHTS_NAME, Checkpointed
from smalti.core.randomness import uniform
from smalti.priors.networks.hourglass import HourglassConfig
from smalti.priors.networks.pixelcnn import PixelCNNConfig
from smalti.priors.networks.realnvp import RealNVPConfig
from smalti.priors.networks.transformer import TransformerConfig
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.hqa.hams import HAMsConfig
from smalti.tokenizers.hqa.hqa import HQAConfig
from smalti.tokenizers.reconstruction import Reconstruction
from smalti.tokenizers.selfvae.hierarchical_vae import VAEConfig
from smalti.tokenizers.selfvae.selfvae import SelfVAEConfig
from smalti.tokenizers.vq.hrvq import HRVQConfig
from smalti.tokenizers.vq.vqvae import VQVAEConfig
from smalti.tokenizers.vq.vqvae2 import VQVAE2Config
from smalti.tokenizers.vqgan.vqgan import VQGANConfig
from smalti.training.accelerator import accelerator
from smalti.training.config import FitConfig, Phase
from smalti.training.loop import fit
from smalti.training.run_folder import METRICS_NAME, Run

# Every registered kind needs an entry here, so that the tests of checkpoints and of training cover it.
# `revive_below` is high, so that some codes are revived
SMALL = {"height": 8, "width": 12, "residual_blocks": 1, "codebook_decay": 0.8, "revive_below": 0.6}
LATENT = {"channels": 4, "growth": 2, "dense_layers": 1, "stages": 1, "latent_channels": 2, "mixtures": 2}
LATENT |= {"flow_layers": 4, "flow_width": 4}
TINY = {
    "hrvq": HRVQConfig(**SMALL, widths=(4, 6), code_width=5, depth=2, branching=3),
    "vqgan": VQGANConfig(
        **SMALL,
        widths=(4, 6),
        norm_groups=2,
        latent_width=3,
        code_width=5,
        branching=(5, 2),
        commitment_weight=(0.25, 0.1),
        perceptual_weight=0.0,
        discriminator_start=6,
        discriminator_ramp=3,
        discriminator_width=4,
        discriminator_layers=1,
    ),
    "vqvae": VQVAEConfig(**SMALL, widths=(4, 6), code_width=5, codebook_size=7),
    "vqvae2": VQVAE2Config(**SMALL, widths=(4,), code_width=3, codebook_size=5, codebook_learning="gradient"),
    "hqa": HQAConfig(8, 12, widths=(4, 6), code_width=3, codebook_size=6, normalize=True),
    "hams": HAMsConfig(8, 12, widths=(4, 6), code_width=3, codebook_size=6),
    "selfvae": SelfVAEConfig(8, 12, **LATENT, levels=2),
    "vae": VAEConfig(8, 12, **LATENT),
    "hourglass": HourglassConfig(
        height=2, width=3, radices=(3, 3), classes=2, model_width=16, heads=2, depth=(1, 1, 1), shorten=(2,)
    ),
    "maskgit": HourglassConfig(
        height=3, width=2, radices=(3, 3), condition_width=3, model_width=16, heads=2, depth=(1, 1, 1), shorten=(2,)
    ),
    "realnvp": RealNVPConfig(height=2, width=3, channels=2, layers=4, model_width=4),
    "pixelcnn": PixelCNNConfig(
        height=4,
        width=6,
        radices=(3, 3),
        upper_radices=((4,),),
        upper_factors=(2,),
        model_width=8,
        layers=2,
        attention_every=2,
        heads=1,
        classes=2,
    ),
    "transformer": TransformerConfig(
        height=4,
        width=6,
        radices=(3, 3),
        upper_radices=((4,),),
        upper_factors=(2,),
        model_width=8,
        layers=2,
        heads=2,
        classes=2,
    ),
}
KINDS = sorted(models._MODULES, key=lambda key: (key[0] == "prior", key[1]))
ROWS = 22  # not a multiple of the batch size, so that batches span epochs
CONFIG = FitConfig(
    steps=12,
    batch_size=8,
    learning_rate=3e-3,
    warmup_steps=3,
    weight_decay=0.1,
    clip_norm=7.0,
    ema_decay=0.5,
    seed=5,
    log_steps=1,
    report_steps=4,
    save_steps=5,
)


class Rows:
    """A data set of any tensors."""

    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitems__(self, rows):
        numbers = torch.tensor(rows)
        return {**{name: column[numbers] for name, column in self.columns.items()}, "rows": numbers}


@dataclass(frozen=True)
class ToyConfig:
    width: int = 6


class Toy(Checkpointed):
    """A model with everything that resuming must restore: matrices, biases, running statistics, a counter, dropout."""

    family, kind, config_class = "tokenizer", "toy", ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.net = nn.Sequential(
            nn.Linear(3, config.width), nn.BatchNorm1d(config.width), nn.Dropout(0.2), nn.Linear(config.width, 1)
        )

    def forward(self, x):
        return self.net(x).squeeze(1)


class Regression(nn.Module):
    """Squared error to targets with noise drawn from the seeds."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        error = self.model(batch["x"]) - batch["y"] - 0.1 * uniform(batch["seeds"])
        return error.square().mean(), {"largest": error.detach().abs().max()}


def toy():
    """Returns (model, objective, training rows, held-out rows) of the toy model."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS + 5, 3, generator=generator)
    torch.manual_seed(1)
    model = Toy(ToyConfig())
    y = x.sum(1)
    return model, Regression(model), Rows(x=x[:ROWS], y=y[:ROWS]), Rows(x=x[ROWS:], y=y[ROWS:])


def plain_toy():
    """Does what `toy` does, without batch statistics and dropout, which depend on micro-batch, process and compiler."""
    model, *rest = toy()
    model.net[1], model.net[2] = nn.Identity(), nn.Identity()
    return model, *rest


def make(family, kind):
    """Returns (model, objective, training rows, held-out rows) of a registered kind."""
    config, generator = TINY[kind], torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    model = models.class_of_kind(family, kind)(config)
    shape = (ROWS + 5, config.height, config.width)
    if kind == "realnvp":
        objective = model.method.objective(model, model.method.objective_config())
        latents = torch.randn(ROWS + 5, *model.level.shape, generator=generator).exp()
        return model, objective, Rows(codes=latents[:ROWS]), Rows(codes=latents[ROWS:])
    if family == "prior":
        columns = {"codes": torch.randint(model.level.codebook_size, shape, generator=generator)}
        columns["labels"] = torch.arange(ROWS + 5) % 3 - 1
        if config.condition_width:
            columns["conditions"] = torch.randn(ROWS + 5, config.condition_width, generator=generator)
        for number, (radices, factor) in enumerate(zip(config.upper_radices, config.upper_factors, strict=True)):
            grid = (ROWS + 5, config.height // factor, config.width // factor)
            columns[f"upper_{number}"] = torch.randint(math.prod(radices), grid, generator=generator)
        objective = model.method.objective(model, model.method.objective_config())
        splits = [{k: v[split] for k, v in columns.items()} for split in (slice(ROWS), slice(ROWS, None))]
        return model, objective, *(Rows(**split) for split in splits)
    shape = (ROWS + 5, model.image_channels, config.height, config.width)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    model.init_from_data(images.float() / 127.5 - 1)
    return model, Reconstruction(model), Rows(images=images[:ROWS]), Rows(images=images[ROWS:])


def train(folder, build=toy, config=CONFIG, *, wrap=lambda rows: rows, run=None, process=None, **more):
    """Trains a newly built model in a folder, as each call of a command does; resumes a run that is there."""
    model, objective, rows, held_out = build()
    fit(
        process or accelerator("fp32"),
        phases(model, objective, config),
        wrap(rows),
        config,
        model=model,
        run=run or Run(folder, {"settings": "same"}),
        held_out=held_out,
        **more,
    )
    return model


def measured(folder):
    """Returns the lines of metrics.jsonl, without values that depend on the machine."""
    lines = [json.loads(line) for line in (folder / METRICS_NAME).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("rows_per_second", "memory_gib")} for line in lines]


def outcome(folder):
    """Returns what must be equal for two runs to be equal: weights, digest, provenance and metrics."""
    described = json.loads((folder / CONFIG_NAME).read_text())
    return (folder / WEIGHTS_NAME).read_bytes(), described["digest"], described["provenance"], measured(folder)


def one_phase(objective, config=CONFIG):
    return [Phase("only", objective, config.optimizer_of(objective))]


def phases(model, objective, config):
    """Returns the tokenizer's own phases if it has any, otherwise one phase of the objective."""
    own_phases = model.phases(config) if isinstance(model, Tokenizer) else []
    return own_phases or one_phase(objective, config)


def losses(lines):
    """Returns the loss of every step and phase."""
    return [value for line in lines for name, value in line.items() if name.split("/")[-1] == "loss"]


class BadRows:
    """Rows whose inputs are multiplied by `value` in the batches numbered in `at`, counted from 0."""

    def __init__(self, rows, at, value=math.nan):
        self.rows, self.at, self.value, self.batches = rows, at, value, 0

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, rows):
        batch = self.rows.__getitems__(rows)
        if self.batches in self.at:
            batch["x"] = batch["x"] * self.value
        self.batches += 1
        return batch


class Signalling:
    """Rows that send a signal to this process at batch number `at`, counted from 0."""

    def __init__(self, rows, at, number=signal.SIGINT):
        self.rows, self.at, self.number, self.batches = rows, at, number, 0

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, rows):
        if self.batches == self.at:
            os.kill(os.getpid(), self.number)
        self.batches += 1
        return self.rows.__getitems__(rows)


def untrained_pair():
    """Returns a tiny prior of two classes and its tokenizer, untrained, with 8x16 pixels and 4x8 codes.

    Their weights are large enough for the outputs to depend on the inputs.
    """
    torch.manual_seed(0)
    prior_config = HourglassConfig(
        4, 8, radices=(3, 3), classes=2, model_width=16, heads=2, depth=(1, 1, 1), shorten=(2,)
    )
    tokenizer_config = HRVQConfig(8, 16, widths=(6,), residual_blocks=3, code_width=5, depth=2, branching=3)
    prior = models.class_of_kind("prior", "hourglass")(prior_config).eval()
    tokenizer = models.class_of_kind("tokenizer", "hrvq")(tokenizer_config).eval()
    for parameter in tokenizer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # residual blocks start as the identity, which ignores neighbours
    tokenizer.init_from_data(torch.rand(16, 3, 8, 16) * 2 - 1)
    for table in (prior.head.weight, prior.of_class.vectors.weight):
        torch.nn.init.normal_(table)
    return prior, tokenizer


def log_probs(head, features):
    """Returns log p(code | features) of every code, in nats `(b, n, codes)`: all the logits that the tree avoids."""
    total = features.new_zeros(*features.shape[:2], 1, dtype=torch.float32)
    logits = F.linear(features, head.weight, head.bias).float().split(head.rows, dim=-1)
    for digit, radix in zip(logits, head.radices, strict=True):
        total = (total[..., None] + digit.unflatten(-1, (-1, radix)).log_softmax(-1)).flatten(2)
    return total
