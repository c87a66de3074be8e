"""What commands ask of a prior; and, of one over codes, what objectives and samplers do, whatever its body: features of
codes, and a head that turns them into probabilities. Which of them belong to a kind, its `Method` says."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypedDict, runtime_checkable

import tyro
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from smalti.core.codes import Level
from smalti.core.errors import UserError
from smalti.core.models import Checkpointed, Family
from smalti.core.randomness import Stream, derive, uniform
from smalti.priors.conditioning import ClassEmbedding, UpperLevels
from smalti.priors.head import FactorizedHead


class Conditioning(TypedDict):
    """What `CodePrior.features` takes beside codes."""

    labels: Int64[Tensor, " b"] | None
    upper: tuple[Int64[Tensor, "b _y _x"], ...]


@dataclass(frozen=True)
class PriorConfig:
    """What a prior's config says of the codes it learns: from a latent set, and no flags. Kinds add their own, among it
    `model_width`, the numbers at each position.

    Raises:
        UserError: for a negative number of classes.
    """

    height: tyro.conf.Suppress[int] = 8
    """Rows of the grid of codes trained on; other grids run too."""
    width: tyro.conf.Suppress[int] = 8
    """Columns of the grid of codes trained on."""
    radices: tyro.conf.Suppress[tuple[int, ...]] = (8, 8, 8)
    """Digits of a code, most significant first: 8 8 8 for three linked layers of 8, 512 for a flat codebook."""
    classes: tyro.conf.Suppress[int] = 0
    """Classes of images; 0 for a prior that knows none."""
    upper_radices: tyro.conf.Suppress[tuple[tuple[int, ...], ...]] = ()
    """Digits of the codes of each level above, coarsest first."""
    upper_factors: tyro.conf.Suppress[tuple[int, ...]] = ()
    """How many times finer this level's grid is than that of each level above."""

    def __post_init__(self) -> None:
        if self.classes < 0:
            raise UserError(f"classes must not be negative, got {self.classes}")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What every objective can be told.

    Raises:
        UserError: for a share that is none.
    """

    label_dropout: float = 0.1
    """Share of rows whose class the prior is not told, so that it can draw without one, and be guided; 1 for a prior
    without classes."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_dropout <= 1:
            raise UserError(f"label_dropout must be from 0 to 1, got {self.label_dropout}")


class Prior(Checkpointed):
    """A distribution over one level's grids, of codes or of real numbers.

    Attributes:
        level: the grid it is trained on, and the radices of its codes or the channels of its numbers.
        classes: how many classes of images it tells apart; 0 for none.
        upper_levels: how many levels its own has above it, whose codes it is told.
        method: how it is trained and drawn from.
    """

    family: ClassVar[Family] = "prior"
    method: ClassVar["Method"]
    level: Level
    classes: int = 0
    upper_levels: int = 0


class CodePrior(Prior, ABC):
    """A prior over codes: a body, and the head that reads codes for it and predicts them from it.

    Attributes:
        head: embedding, likelihood and draws.
        of_class, of_upper: vectors that say the class and the upper levels; None where there are none.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = config.model_width
        self.level = Level(config.height, config.width, config.radices)
        self.classes, self.upper_levels = config.classes, len(config.upper_radices)
        self.head = FactorizedHead(config.radices, width)
        self.of_class = ClassEmbedding(config.classes, width) if config.classes else None
        self.of_upper = UpperLevels(config.upper_radices, config.upper_factors, width) if config.upper_radices else None

    @abstractmethod
    def features(
        self,
        codes: Int64[Tensor, "b h w"],
        labels: Int64[Tensor, " b"] | None = None,
        upper: tuple[Int64[Tensor, "b _y _x"], ...] = (),
    ) -> Float[Tensor, "b n d"]:
        """What the body knows of each position, in raster order (n = h w); the head's probabilities follow from it
        alone.

        Args:
            codes: grids to read.
            labels: the class of each, from 0; -1, or None for all, where it is not to be known. Without `classes` no
                label changes anything.
            upper: the same images' codes of the levels above, coarsest first.

        Raises:
            UserError: for upper levels that do not go with the codes.
        """

    def conditioning(self, batch: dict[str, Any], label_dropout: float = 0.0) -> Conditioning:
        """What a batch says beside its codes: `labels`, for a prior with classes, and `upper_0`, `upper_1`, ....

        Args:
            batch: as `LatentRows` makes it; for the dropout with `seeds`.
            label_dropout: share of rows whose class the prior is not told.
        """
        labels = batch["labels"] if self.classes else None
        if labels is not None and label_dropout:
            labels = labels.masked_fill(uniform(derive(batch["seeds"], Stream.LABEL_DROPOUT)) < label_dropout, -1)
        return {"labels": labels, "upper": tuple(batch[f"upper_{level}"] for level in range(self.upper_levels))}


class CausalPrior(CodePrior):
    """A prior whose features at a position hang on the codes before it in raster order only.

    So the head's probabilities of all positions multiply to that of the grid: its likelihood is exact, and codes are
    drawn one after the other.
    """

    @abstractmethod
    def decode_stepwise(
        self,
        b: int,
        h: int,
        w: int,
        labels: Int64[Tensor, " b"] | None = None,
        upper: tuple[Int64[Tensor, "b _y _x"], ...] = (),
    ) -> Generator[Float[Tensor, "b 1 d"], Int64[Tensor, "b 1"], None]:
        """`features`, a position at a time: a generator that gives those of the first, and of each next when it is sent
        the codes of the one before. What it has computed once it keeps."""


@runtime_checkable
class Sampler(Protocol):
    """What a sampler is called like."""

    def __call__(
        self,
        prior: Any,
        *,
        known: Int64[Tensor, "b h w"] | Float[Tensor, "b _c h w"],
        known_mask: Bool[Tensor, "b h w"],
        seeds: Int64[Tensor, " b"],
        labels: Int64[Tensor, " b"] | None = None,
        upper: tuple[Int64[Tensor, "b _y _x"], ...] = (),
        sampling: Any,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Int64[Tensor, "b h w"] | Float[Tensor, "b _c h w"]:
        """Grids whose unknown codes are drawn; see `sample_sundae` and `sample_ancestral`."""
        ...


@dataclass(frozen=True)
class Method:
    """How priors of a kind are trained and drawn from: what belongs together, by name, so that no command need ask.

    Attributes:
        objective: (prior, its config) -> a module whose `forward(batch)` is the loss.
        objective_config: a frozen dataclass, which for priors over codes has a `label_dropout` whatever else.
        sampler: draws codes.
        sampling: the sampler's config, a frozen dataclass; its `calls(h, w)` is how often the callback is called at
            most for a grid.
        filling: the same, with defaults for the missing part of given codes.
    """

    objective: Callable[[Any, Any], nn.Module]
    objective_config: type
    sampler: Sampler
    sampling: type
    filling: type
