"""The study of quantizers: every one at equal bits, with equal networks and steps, over several seeds.

Trained tokenizers and priors and what is measured of them are kept, so a study that was stopped resumes. What is
measured is in `scores.py`, the page in `report.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

from tyro.conf import Positional

from smalti.commands.build_latents import BuildLatents, build_latents
from smalti.commands.model_paths import RUNS, load_tokenizer, prior_class
from smalti.commands.presets import small
from smalti.commands.train_prior import TrainPrior, default_fit, grids, train_prior
from smalti.commands.train_tokenizer import train_tokenizer
from smalti.core.codes import Level
from smalti.core.devices import Precision
from smalti.core.errors import UserError, require_at_least_one
from smalti.images.image_set import ImageSet, open_images
from smalti.latentsets.reader import LatentSet
from smalti.studies.experiment import logged_hours, measure_once
from smalti.studies.priors.training import cpu_seconds, keyed, training_step
from smalti.studies.quantizers.scores import held_out_scores, nats_of_images, search_milliseconds
from smalti.tokenizers.quantizers.registry import QuantizerName
from smalti.tokenizers.vq.hrvq import HRVQConfig
from smalti.tokenizers.vq.vqvae import VQVAEConfig

SIZE = 32
"""Side of the images, in pixels."""
WIDTHS: dict[int, tuple[int, ...]] = {8: (64, 128), 16: (128,)}
"""Channels of the network's stages by the side of the grid of codes."""
RESIDUAL_BLOCKS, BATCH_SIZE = 2, 32
PRIOR, LATENTS_NAME = "transformer", "latents.h5"
DIGITS = 3
"""Digits of linked codebooks and residual VQ."""
FSQ_LEVELS = {9: (8, 8, 8), 12: (8, 8, 8, 8)}
"""Levels with exactly as many codes. The paper recommends none for 9 bits, and 4375 codes for 12."""
TIMED_STEPS = 10
"""Training steps of a prior that are timed, after one that is not."""
SMALLER: dict[str, Any] = {}
"""Settings of the priors' network that differ from the defaults; tests make it small."""


class Variant(NamedTuple):
    """A quantizer of the study.

    Attributes:
        quantizer: its name.
        label: its row in the table.
        settings: what it needs besides its size.
    """

    quantizer: QuantizerName
    label: str
    settings: Mapping[str, Any] = MappingProxyType({})


VARIANTS = (
    Variant("flat", "`flat`"),
    Variant("flat", "`flat`, rotation trick", {"gradient": "rotation"}),
    Variant("linked", "`linked`"),
    Variant("linked", "`linked`, commitment of the sum", {"commitment_weight": (0.0, 0.0, 0.25)}),
    Variant("residual", "`residual`"),
    Variant("residual", "`residual`, shared codebook", {"shared_codebooks": True}),
    Variant("cosine", "`cosine`, code width 8", {"code_width": 8}),
    Variant("simvq", "`simvq`"),
    Variant("dot", "`dot`"),
    Variant("gumbel", "`gumbel`"),
    Variant("fsq", "`fsq`"),
    Variant("lfq", "`lfq`"),
)


@dataclass(frozen=True)
class ReproduceQuantizers:
    """Settings of the study.

    Raises:
        UserError: for a number below 1, or no quantizer.
    """

    study: Positional[Literal["quantizers"]]
    """The study: smalti's own comparison of quantizers at equal bits."""
    images: str = "portraits"
    """Images to train on; any source that `--images` of train_tokenizer takes."""
    image_channels: int = 3
    """3 for colour images, 1 for grey ones."""
    quantizers: tuple[QuantizerName, ...] = get_args(QuantizerName)
    """Quantizers to train. The page also has what was trained before of others and of more seeds."""
    bits: tuple[Literal[9, 12], ...] = (9, 12)
    """Bits of a code: 512 or 4096 codes."""
    sides: tuple[Literal[8, 16], ...] = (8,)
    """Sides of the grid of codes, of images of 32x32 pixels."""
    seeds: int = 3
    """Seeds, and so trainings, of each quantizer."""
    steps: int = 1_000
    """Training steps, of 32 images."""
    prior_steps: int = 400
    """Training steps of the causal transformer over the codes of three digits, of 32 rows; over the codes of one digit
    and of bits for as many as take the same time. 0 trains none."""
    precision: Precision = "auto"
    """Precision of the networks in training."""
    work: Path = RUNS / "quantizers"
    """Folder of the runs."""
    out: Path = Path("docs/guide/quantizers.md")
    """The Markdown page. Its measured sections are replaced."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "seeds", "steps", "image_channels")
        if self.prior_steps < 0:
            raise UserError(f"--prior-steps must be at least 0, not {self.prior_steps}")
        if not (self.quantizers and self.bits and self.sides):
            raise UserError("the study needs at least one of each: --quantizers, --bits and --sides")


def model_of(variant: Variant, *, side: int, bits: int, image_channels: int) -> HRVQConfig | VQVAEConfig:
    """Returns the tokenizer of a variant: an `hrvq` for codes of several stages, else a `vqvae`."""
    network = {"height": SIZE, "width": SIZE, "image_channels": image_channels, "widths": WIDTHS[side]}
    shared: dict[str, Any] = {**network, "residual_blocks": RESIDUAL_BLOCKS, **variant.settings}
    match variant.quantizer:
        case "linked" | "residual":
            return HRVQConfig(quantizer=variant.quantizer, depth=DIGITS, branching=2 ** (bits // DIGITS), **shared)
        case "fsq":
            return VQVAEConfig(quantizer="fsq", codebook_size=2**bits, levels=FSQ_LEVELS[bits], **shared)
        case _:
            return VQVAEConfig(quantizer=variant.quantizer, codebook_size=2**bits, **shared)


class Quantizers:
    """The trainings of the study and what is measured of them; what is on the disk is not done again.

    `train_tokenizer` runs before any result is read: it returns at once for a finished run, and refuses one of other
    images, channels or precision, which the names of folders leave out.
    """

    def __init__(self, config: ReproduceQuantizers) -> None:
        self.config = config
        self.name = Path(config.images).stem
        """Name of the images, in names of files and sections."""

    def folder(self, variant: Variant, side: int, bits: int, seed: int) -> Path:
        """Returns the folder of a training, named by all that the trainings of one set of images differ in."""
        settings = (setting if isinstance(setting, tuple) else (setting,) for setting in variant.settings.values())
        details = "".join(f"-{value}" for setting in settings for value in setting if value is not True)
        shared = "-shared" if variant.settings.get("shared_codebooks") else ""
        name = f"{variant.quantizer}{shared}{details}-{side}x{side}-{bits}bits-{self.config.steps}steps-seed{seed}"
        return self.config.work / self.name / name

    def trained(self, variant: Variant, side: int, bits: int, seed: int) -> Path:
        """Returns the folder of a tokenizer, trained."""
        config = self.config
        model = model_of(variant, side=side, bits=bits, image_channels=config.image_channels)
        kind = "hrvq" if isinstance(model, HRVQConfig) else "vqvae"
        defaults = small(kind)
        fit = replace(defaults.fit, steps=config.steps, batch_size=BATCH_SIZE, seed=seed)
        settings = replace(defaults, model=model, fit=fit, images=config.images, precision=config.precision)
        return train_tokenizer(replace(settings, out=self.folder(variant, side, bits, seed)), self.images)

    def result(self, variant: Variant, side: int, bits: int, seed: int) -> dict[str, Any]:
        """Returns what is measured of a training, by name.

        Returns:
            `mse`, `codes_used` and `perplexity` on the held-out images; `seconds` a training step; `search`, the CPU
            milliseconds to find the codes of an image; `nats` an image of held-out codes by their prior, if there is
            one.
        """
        folder = self.trained(variant, side, bits, seed)

        def measure() -> dict[str, Any]:
            seconds = logged_hours(folder) * 3600 / self.config.steps
            return {**held_out_scores(load_tokenizer(str(folder)), self.images), "seconds": seconds}

        def search() -> dict[str, float]:
            return {"search": search_milliseconds(load_tokenizer(str(folder)), self.images)}

        scores = {**measure_once(folder / "scores.json", measure), **measure_once(folder / "search.json", search)}
        if not self.config.prior_steps:
            return scores
        prior = self.prior(folder, seed)
        latents = LatentSet(folder / LATENTS_NAME)
        return {**scores, **measure_once(prior / "scores.json", lambda: {"nats": nats_of_images(prior, latents)})}

    def is_measured(self, variant: Variant, side: int, bits: int, seed: int) -> bool:
        """Returns whether `result` has nothing left to train or to measure."""
        folder = self.folder(variant, side, bits, seed)
        last = self._prior_folder(folder) if self.config.prior_steps else folder
        return all(path.exists() for path in (folder / "scores.json", folder / "search.json", last / "scores.json"))

    def prior(self, tokenizer: Path, seed: int) -> Path:
        """Returns the folder of the prior over a tokenizer's codes, trained. The latent set has no mirror images."""
        latents = build_latents(BuildLatents(tokenizer=str(tokenizer), flips=False, out=tokenizer / LATENTS_NAME))
        steps = self.prior_steps(LatentSet(latents).layout.levels[0])
        model = prior_class(PRIOR).config_class(**SMALLER)
        defaults = TrainPrior(model=model, objective=prior_class(PRIOR).method.objective_config(), prior=PRIOR)
        fit = replace(default_fit(PRIOR), steps=steps, batch_size=BATCH_SIZE, seed=seed)
        settings = replace(defaults, fit=fit, latents=latents, precision=self.config.precision, sheet_samples=0)
        return train_prior(replace(settings, out=self._prior_folder(tokenizer)))

    def _prior_folder(self, tokenizer: Path) -> Path:
        return tokenizer / f"{PRIOR}-{self.config.prior_steps}steps"

    def prior_steps(self, level: Level) -> int:
        """Returns the training steps of a prior over codes that take as long as `--prior-steps` over three digits."""
        precision = self.config.precision
        digits = (round(level.codebook_size ** (1 / DIGITS)),) * DIGITS

        def seconds(radices: tuple[int, ...]) -> float:
            shape = grids((replace(level, radices=radices),), 0)
            name = keyed("seconds", {"shape": shape, "precision": precision, **SMALLER})
            config = prior_class(PRIOR).config_class(**{**shape, **SMALLER})

            def measure() -> dict[str, float]:
                return {"cpu": cpu_seconds(training_step(PRIOR, config, BATCH_SIZE, precision), TIMED_STEPS)}

            return measure_once(self.config.work / f"{name}.json", measure)["cpu"]

        return max(1, round(self.config.prior_steps * seconds(digits) / seconds(level.radices)))

    @cached_property
    def images(self) -> ImageSet:
        """The images."""
        return open_images(self.config.images, height=SIZE, width=SIZE, channels=self.config.image_channels)
