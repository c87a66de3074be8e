"""The contract of priors: what a new kind of prior implements, and how it is trained and sampled.

`Prior` is what the commands need of any prior. `CodePrior` is a prior over discrete codes: a network, and a
`FactorizedHead` that turns its features into probabilities. `CausalPrior` can also decode code by code. Each kind names
a `Method`, which pairs a training objective with its sampler. The networks are in `smalti.priors.networks`, the methods
in `smalti.priors.methods`.

Legend: b batch, c channels, h w grid, y x grid of a coarser level, n positions (n = h w), d width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypedDict, runtime_checkable

import torch
import tyro
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from smalti.core.codes import Layout, Level
from smalti.core.config import added
from smalti.core.errors import UserError
from smalti.core.models import Checkpointed, Family
from smalti.core.randomness import Stream, derive, uniform
from smalti.priors.conditioning import ClassEmbedding, Condition, UpperLevels, VectorEmbedding, no_condition
from smalti.priors.head import FactorizedHead
from smalti.priors.row_caches import RowCaches


class Conditioning(TypedDict):
    """The arguments of `CodePrior.features` besides the codes."""

    condition: Condition | None
    upper: tuple[Int64[Tensor, "b _y _x"], ...]


@dataclass(frozen=True)
class PriorConfig:
    """The settings that every prior over codes has.

    The command fills them in from the latent set, so they are no flags. A kind's config extends this class with the
    settings of its network; `model_width`, the width of the features, must be among them.

    Raises:
        UserError: for a negative number of classes or width of vectors, or if both are given.
    """

    height: tyro.conf.Suppress[int] = 8
    """Rows of the grid of codes in training; other grids can be sampled too."""
    width: tyro.conf.Suppress[int] = 8
    """Columns of the grid of codes in training."""
    radices: tyro.conf.Suppress[tuple[int, ...]] = (8, 8, 8)
    """Radices of a code's digits, most significant first: 8 8 8 for three linked layers of 8, 512 for a flat
    codebook."""
    classes: tyro.conf.Suppress[int] = 0
    """Number of image classes; 0 for a prior without class conditioning."""
    upper_radices: tyro.conf.Suppress[tuple[tuple[int, ...], ...]] = ()
    """Radices of the codes of each coarser level, coarsest first."""
    upper_factors: tyro.conf.Suppress[tuple[int, ...]] = ()
    """For each coarser level, positions of this level's grid per position of that grid, along one axis."""
    condition_width: tyro.conf.Suppress[int] = added(off=0)
    """Numbers in the vector that each image is conditioned on; 0 for a prior without such vectors."""

    def __post_init__(self) -> None:
        if min(self.classes, self.condition_width) < 0:
            raise UserError(
                f"classes and condition_width must not be negative, got {self.classes} and {self.condition_width}"
            )
        if self.classes and self.condition_width:
            raise UserError("a prior is conditioned on classes or on vectors, not on both; set one of them to 0")


def require_dropout(dropout: float) -> None:
    """Checks the setting `dropout` of a network.

    Raises:
        UserError: if it is outside [0, 1).
    """
    if not 0 <= dropout < 1:
        raise UserError(f"dropout must be at least 0 and less than 1, got {dropout}")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The settings that every objective over codes has.

    Raises:
        UserError: for a label dropout outside [0, 1].
    """

    label_dropout: float = 0.1
    """Share of training rows whose class label or vector is dropped, so that the prior also learns to sample without
    one and classifier-free guidance works. 1 trains a prior without classes."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_dropout <= 1:
            raise UserError(f"label_dropout must be from 0 to 1, got {self.label_dropout}")


class Prior(Checkpointed):
    """A trainable distribution over one level's grids: of discrete codes, or of real-valued latents.

    Derive from it only for real-valued latents (as `RealNVP` does); for codes, derive from `CodePrior`. A subclass sets
    `kind`, `config_class` and `method`, and `level` in its constructor.

    Attributes:
        level: the grid in training, with the radices of its codes or the channels of its latents.
        method: the objective and the sampler of this kind.
        classes: number of image classes it is conditioned on; 0 for none.
        condition_width: numbers in the vectors it is conditioned on; 0 for none. Not both are above 0.
        upper_levels: number of coarser levels whose codes it is conditioned on.
    """

    family: ClassVar[Family] = "prior"
    method: ClassVar["Method"]
    level: Level
    classes: int = 0
    condition_width: int = 0
    upper_levels: int = 0

    @property
    def conditional(self) -> bool:
        """True if it is conditioned on classes or on vectors."""
        return bool(self.classes or self.condition_width)

    def facts(self) -> dict[str, str]:
        """Returns what the model's card says of the prior."""
        below = f"conditioned on those of {self.upper_levels} coarser level(s)" if self.upper_levels else ""
        codes = ", ".join(filter(None, [str(Layout((self.level,))), below]))
        return {"codes of an image": codes, **super().facts()}


class CodePrior(Prior, ABC):
    """A prior over discrete codes: p(code | features) at every position of a grid.

    The network computes the features; the head reads codes for the network and predicts codes from its features. Only
    the head handles radices. Objectives and samplers use nothing but `features`, `conditioning`, `head` and the
    attributes of `Prior`.

    A new kind is one class and its config:

        @dataclass(frozen=True)
        class MyConfig(PriorConfig):
            model_width: int = 128

        @register
        class MyPrior(CodePrior):
            kind = "my-prior"  # the name in `--prior my-prior` and in config.json
            config_class = MyConfig
            method = SUNDAE  # or AUTOREGRESSIVE (a CausalPrior only), MASKED (codes may be MASK_TOKEN), or another

            def __init__(self, config: MyConfig) -> None:
                super().__init__(config)  # sets everything listed under Attributes
                ...

            def features(self, codes, condition=None, upper=()): ...

    To save memory by gradient checkpointing, it also overrides `recomputable`.

    Args:
        config: an instance of the kind's `config_class`, which extends `PriorConfig`.

    Attributes:
        head: embeds codes, computes likelihoods and samples codes.
        of_class: embeds class labels, `of_class(labels, b)` -> `(b, d)`; None if `classes` is 0.
        of_vector: embeds condition vectors, `(b, condition_width)` -> `(b, d)`; None if the width is 0.
        of_upper: embeds the codes of the coarser levels, `of_upper(upper, h, w)` -> `(b, h, w, d)`; None if
            there are none. Conditioning has an effect only if `features` uses these.
    """

    fills: ClassVar[bool] = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = config.model_width
        self.level = Level(config.height, config.width, config.radices)
        self.classes, self.upper_levels = config.classes, len(config.upper_radices)
        self.condition_width = config.condition_width
        self.head = FactorizedHead(config.radices, width)
        self.of_class = ClassEmbedding(config.classes, width) if config.classes else None
        self.of_vector = VectorEmbedding(config.condition_width, width) if config.condition_width else None
        self.of_upper = UpperLevels(config.upper_radices, config.upper_factors, width) if config.upper_radices else None

    @abstractmethod
    def features(
        self,
        codes: Int64[Tensor, "b h w"],
        condition: Condition | None = None,
        upper: tuple[Int64[Tensor, "b _y _x"], ...] = (),
    ) -> Float[Tensor, "b n d"]:
        """Computes the features of every position, from which alone the head predicts its code.

        Objectives and samplers rely on these promises:

        - Positions are in raster order (n = h w), and d is `config.model_width`.
        - Rows are independent: no row's features depend on another row of the batch.
        - Grids of at least 1x1 and at most the size in training work, so that windows of a canvas do.
        - In evaluation mode the result is deterministic.
        - Which codes the features of a position may depend on is up to the method: all of them for
          SUNDAE; all of them, some replaced by `MASK_TOKEN`, for masked codes; those before it in raster
          order for a `CausalPrior`.

        Args:
            codes: the grids that the network reads.
            condition: the class of each row, from 0, or -1 for no class; or the vector of each row, or NaN
                for no vector. None is no class or vector for all rows. A prior without either ignores it.
            upper: the codes of the coarser levels of the same images, coarsest first.

        Raises:
            UserError: if the number of coarser levels or their grids do not fit.
        """

    def condition_vector(self, condition: Condition | None, b: int) -> Float[Tensor, "b d"] | None:
        """Returns the embedding of each row's class or vector; None for a prior without either."""
        embed = self.of_class or self.of_vector
        return embed(condition, b) if embed else None

    def conditioning(self, batch: dict[str, Any], dropout: float = 0.0) -> Conditioning:
        """Returns the arguments of `features` besides the codes, with dropout for classifier-free guidance.

        Args:
            batch: a batch of `LatentRows`. Read are `labels` int64 `(b,)` if the prior has classes, or
                `conditions` float32 `(b, v)` if it has vectors; the coarser codes `upper_0`, `upper_1`, ...;
                and for dropout `seeds` int64 `(b,)`.
            dropout: probability that a row's class or vector is dropped.
        """
        condition = batch["labels"] if self.classes else batch["conditions"] if self.condition_width else None
        if condition is not None and dropout:
            dropped = uniform(derive(batch["seeds"], Stream.LABEL_DROPOUT)) < dropout
            dropped = dropped.view(-1, *(1 for _ in condition.shape[1:]))
            condition = torch.where(dropped, no_condition(condition), condition)
        return {"condition": condition, "upper": tuple(batch[f"upper_{level}"] for level in range(self.upper_levels))}


class CausalPrior(CodePrior):
    """An autoregressive prior: features of a position depend only on the codes before it in raster order.

    The product of the head's probabilities over all positions is the exact likelihood of a grid (chain rule). Samplers
    do not split canvases into windows: grids of any size must work. A network whose receptive field is not bounded by
    convolutions reads larger ones through `smalti.priors.methods.causal_canvas`.
    """

    def condition_vectors(
        self,
        b: int,
        h: int,
        w: int,
        condition: Condition | None,
        upper: tuple[Int64[Tensor, "b _y _x"], ...],
    ) -> Float[Tensor, "_b _h _w d"] | None:
        """Returns the sum of the vectors of condition, coarser levels and positions, which broadcasts; or None."""
        vectors = self.of_upper(upper, h, w) if self.of_upper else None
        if (vector := self.condition_vector(condition, b)) is not None:
            vector = rearrange(vector, "b d -> b 1 1 d")
            vectors = vector if vectors is None else vectors + vector
        if (positions := self.position_vectors(h, w)) is not None:
            vectors = positions if vectors is None else vectors + positions
        return vectors

    def position_vectors(self, _h: int, _w: int) -> Float[Tensor, "1 _h _w d"] | None:
        """Returns the absolute position embeddings of a grid; None for a network without them."""
        return None

    @abstractmethod
    def decode_stepwise(
        self,
        b: int,
        h: int,
        w: int,
        condition: Condition | None = None,
        upper: tuple[Int64[Tensor, "b _y _x"], ...] = (),
        caches: RowCaches | None = None,
    ) -> Generator[Float[Tensor, "b 1 d"], Int64[Tensor, "b 1"], None]:
        """Computes `features` one position at a time, reusing the work of earlier positions from caches.

        `next` yields the features of the first position; each `send` of the codes at a position yields the features of
        the next one, which equal those of `features` up to rounding.

        Args:
            b: grids.
            h: rows of a grid.
            w: columns of a grid.
            condition: as for `features`.
            upper: as for `features`.
            caches: keep what later positions need; between two `send`, their rows can be exchanged.
        """


@runtime_checkable
class Sampler(Protocol):
    """The signature that all samplers share: `sample_sundae`, `sample_masked`, `sample_ancestral`, `sample_flow`.

    A sampler fills in the unknown positions of grids; generation is inpainting with nothing known. A row's result is a
    function of its own seed, known codes, condition and coarser codes: another batch around it changes nothing but the
    rounding of sums.
    """

    def __call__(
        self,
        prior: Any,
        *,
        known: Int64[Tensor, "b h w"] | Float[Tensor, "b _c h w"],
        known_mask: Bool[Tensor, "b h w"],
        seeds: Int64[Tensor, " b"],
        condition: Condition | None = None,
        upper: tuple[Int64[Tensor, "b _y _x"], ...] = (),
        sampling: Any,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Int64[Tensor, "b h w"] | Float[Tensor, "b _c h w"]:
        """Returns grids that agree with `known` where `known_mask` is True and are sampled elsewhere.

        Args:
            prior: in evaluation mode, on the device of the other tensors.
            known: known codes, each from 0 to the codebook size - 1, ignored where the mask is False. Its shape is that
                of the result; grids larger than those in training are allowed.
            known_mask: True where a code is known and kept.
            seeds: one random seed per row; they decide every draw.
            condition: the class or vector of each row, as for `CodePrior.features`.
            upper: the codes of the coarser levels, coarsest first; empty if the prior has none.
            sampling: an instance of the method's `sampling` or `filling` config.
            callback: called after each step with the step's number, from 0, and the codes after it.

        Raises:
            UserError: for a known code outside the codebook, a label that the prior has no class for, vectors of
                another width, or coarser levels that do not fit.
        """
        ...


@dataclass(frozen=True)
class Method:
    """The training objective and the sampler of a kind of prior; commands read it and need no case for each kind.

    Attributes:
        objective: maps (prior, objective config) to a module whose `forward(batch)` returns the loss and a dictionary
            of detached metrics.
        objective_config: the objective's config, a frozen dataclass; for priors over codes an `ObjectiveConfig`.
        sampler: samples grids.
        sampling: the sampler's config for generation, a frozen dataclass. Its `calls(h, w)` is the most calls of the
            callback for a grid.
        filling: the sampler's config for inpainting: `sampling`, or a subclass of it with other defaults.
    """

    objective: Callable[[Any, Any], nn.Module]
    objective_config: type
    sampler: Sampler
    sampling: type
    filling: type
