"""Benchmarks of priors: training steps, the hourglass, and SUNDAE's sampler.

Each function yields comparisons; measuring and the report are in `comparison.py` and `run.py`. The head is in
`head.py`, ancestral sampling in `ancestral.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.benchmarks.comparison import Comparison, Variant
from smalti.core.devices import Precision, autocast, best_device
from smalti.core.randomness import row_seeds
from smalti.priors.base import CodePrior
from smalti.priors.methods.sundae import Sundae, SundaeConfig, SundaeSampling, sample_sundae
from smalti.priors.networks.hourglass import Hourglass, HourglassConfig
from smalti.priors.networks.pixelcnn import PixelCNNConfig
from smalti.training.accelerator import subnormals_flushed
from smalti.training.config import FitConfig
from smalti.training.optimizers import MUON_RATE_FACTOR, CombinedOptimizer, OptimizerName, clip

DEMONSTRATION = HourglassConfig()

DEMONSTRATION_PIXELCNN = PixelCNNConfig()

LARGE = tuple((16, HourglassConfig(side, side, model_width=512, heads=8, depth=(2, 8, 2))) for side in (16, 32))
"""Batch sizes and configs of large networks."""

SMALLEST_SHARE = 1 / 1.05
"""Share of a sampling step's time that the bare forward pass must take, for a large network."""

MUON_STEP = 1.15
"""Most that a training step with Muon may take, as a multiple of one with AdamW."""

SHORTER_TARGET = 2.0
"""Factor by which a flat transformer of as many parameters must be slower than the hourglass, at 32x32."""


def prior(*, batch: int = 64, config: HourglassConfig = DEMONSTRATION) -> Iterator[Comparison]:
    """Compares SUNDAE's loss and gradients with those of its unrolled forward passes alone; then training with Muon.

    The network is that of the demonstration.
    """
    device = best_device()
    network, unrolled = Hourglass(config).to(device), SundaeConfig().unrolled_steps
    objective, codes = Sundae(network, SundaeConfig()), random_codes(network, batch)
    seeds = row_seeds(0, torch.arange(batch, device=device))

    def ours(precision: Precision) -> None:
        network.zero_grad()
        with autocast(device, precision):
            loss, _ = objective({"codes": codes, "seeds": seeds})
        loss.backward()

    def body(precision: Precision) -> None:
        network.zero_grad()
        for _ in range(unrolled):
            with autocast(device, precision):
                loss = network.features(codes).float().square().mean()
            loss.backward()

    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    for precision in precisions:
        yield Comparison(
            f"prior, loss and gradients of a batch of {batch}, {precision}",
            (
                Variant("smalti, SUNDAE", lambda precision=precision: ours(precision)),
                Variant(f"limit: features alone, {unrolled} times", lambda precision=precision: body(precision)),
            ),
        )
    yield training_steps(config)
    yield optimizers(Hourglass(config).to(device))


def training_steps(config: HourglassConfig, *, batch: int = 32, steps: int = 8) -> Comparison:
    """Compares training steps with Muon and with AdamW: loss, gradients, clipping and the optimizer's step."""
    device, seeds = best_device(), row_seeds(0, torch.arange(batch, device=best_device()))

    def trained_by(name: OptimizerName) -> Callable[[], None]:
        objective = Sundae(Hourglass(config).to(device), SundaeConfig())
        fit, parameters = FitConfig(optimizer=name), list(objective.parameters())
        optimizer, codes = fit.optimizer_of(objective), random_codes(objective.prior, batch)

        def step() -> None:
            objective.zero_grad()
            with autocast(device, "auto"):
                loss, _ = objective({"codes": codes, "seeds": seeds})
            loss.backward()
            clip(parameters, fit.clip_norm)
            optimizer.step()

        def work() -> None:
            with subnormals_flushed():  # as in every training
                for _ in range(steps):
                    step()

        return work

    return Comparison(
        f"a training step of the same prior, batch of {batch}",
        (
            Variant("smalti, Muon", trained_by("muon"), units=steps),
            Variant("smalti, AdamW", trained_by("adamw"), units=steps, target=1 / MUON_STEP),
        ),
    )


def optimizers(network: Hourglass) -> Comparison:
    """Compares steps of our Muon and torch's on the same matrices with a step of AdamW on all parameters."""
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    muon, adamw = (FitConfig(optimizer=name).optimizer_of(network) for name in ("muon", "adamw"))
    assert isinstance(muon, CombinedOptimizer)
    assert isinstance(adamw, torch.optim.Optimizer)
    *_, ours = muon.parts
    theirs = torch.optim.Muon(
        ours.param_groups[0]["params"], lr=MUON_RATE_FACTOR * 1e-3, adjust_lr_fn="match_rms_adamw"
    )
    return Comparison(
        "an optimizer's step of the same prior",
        (
            Variant("smalti, Muon", ours.step),
            Variant("torch, Muon", theirs.step),
            Variant("limit: torch, AdamW fused", adamw.step),
        ),
    )


def hourglass(*, batch: int = 4, side: int = 32, width: int = 256, blocks: int = 8) -> Iterator[Comparison]:
    """Compares loss and gradients of an hourglass with those of flat transformers, one smaller and one larger than it.

    Down- and upsampling have the parameters of two thirds of a block, so no flat transformer has exactly as many.
    """
    device = best_device()
    shape = HourglassConfig(side, side, model_width=width, heads=width // 32, depth=(1, blocks - 2, 1))
    flat = [replace(shape, depth=(depth,), shorten=()) for depth in (blocks, blocks + 1)]
    networks = [Hourglass(config).to(device) for config in (shape, *flat)]
    sizes = [sum(parameter.numel() for parameter in network.parameters()) / 1e6 for network in networks]
    codes = random_codes(networks[0], batch)

    def step(network: Hourglass) -> None:
        network.zero_grad()
        with autocast(device, "auto"):
            loss, _ = Sundae(network, SundaeConfig())(
                {"codes": codes, "seeds": row_seeds(0, torch.arange(batch, device=device))}
            )
        loss.backward()

    names = [f"hourglass 1-{blocks - 2}-1", *(f"flat, {config.depth[0]} blocks" for config in flat)]
    yield Comparison(
        f"loss and gradients of {batch} grids of {side}×{side}, width {width}",
        [
            Variant(f"{name}, {size:.3f} M", partial(step, network), target=SHORTER_TARGET if number else None)
            for number, (name, size, network) in enumerate(zip(names, sizes, networks, strict=True))
        ],
    )


def sampler(
    *,
    batch: int = 64,
    steps: int = 10,
    config: HourglassConfig = DEMONSTRATION,
    large: Sequence[tuple[int, HourglassConfig]] = LARGE,
    compiled: bool = True,
) -> Iterator[Comparison]:
    """Compares a step of SUNDAE's sampler with a bare forward pass and, if `compiled`, with the compiled step.

    Networks are that of the demonstration and large ones.
    """
    device = best_device()
    networks = [(batch, config, steps, None), *((number, shape, 2, SMALLEST_SHARE) for number, shape in large)]
    for number, shape, steps_timed, target in networks:
        network = Hourglass(shape).to(device).eval()
        yield Comparison(
            f"sampler, one step of {number} samples of {shape.height}×{shape.width}, {shape_of(shape)}",
            ways_to_draw(network, number, steps_timed, units=steps_timed, target=target, compiled=compiled),
        )


def shape_of(config: HourglassConfig) -> str:
    """Describes a network in the name of a comparison."""
    return f"width {config.model_width}, depth {'-'.join(map(str, config.depth))}"


def ways_to_draw(
    network: Hourglass, batch: int, steps: int, *, units: int, target: float | None = None, compiled: bool
) -> list[Variant]:
    """Returns the variants that sample `batch` grids in `steps` steps of SUNDAE's sampler, and its limit.

    The limit is as many bare forward passes. If `compiled`, the compiled step is a variant too.
    """
    device = network.head.weight.device
    codes, seeds = random_codes(network, batch), row_seeds(0, torch.arange(batch, device=device))
    nothing, chain = torch.zeros_like(codes, dtype=torch.bool), SundaeSampling(steps=steps, min_steps=steps)

    def ours(sampling: SundaeSampling) -> Tensor:
        with autocast(device, "auto"):
            return sample_sundae(network, known=codes, known_mask=nothing, seeds=seeds, sampling=sampling)

    @torch.no_grad()
    def forward() -> None:
        with autocast(device, "auto"):
            for _ in range(steps):
                F.linear(network.features(codes), network.head.weight, network.head.bias)

    compiled_variant = (
        [Variant("smalti, --compile", partial(ours, replace(chain, compile=True)), units)] if compiled else []
    )
    limit = Variant("limit: features and the logits of every node", forward, units, target=target)
    return [Variant("smalti", partial(ours, chain), units), limit, *compiled_variant]


def random_codes(network: CodePrior, batch: int) -> Tensor:
    """Returns random codes on a network's grid, on its device."""
    level, device = network.level, network.head.weight.device
    return torch.randint(level.codebook_size, (batch, level.height, level.width), device=device)
