"""What objectives and samplers ask of a prior, whatever its body: features of codes, and a head that turns them into
probabilities. Which of them belong to a kind, its `Method` says."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypedDict, runtime_checkable

from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from smalti.checkpoint import Checkpointed
from smalti.codes import Level
from smalti.priors.head import FactorizedHead
from smalti.randomness import derive, uniform
from smalti.registry import Family

LABEL = 4
"""The stream of a row's seed that decides whether its class is told; objectives have those below."""


class Told(TypedDict):
    """What `Prior.features` takes beside codes."""

    labels: Int64[Tensor, " b"] | None
    upper: tuple[Int64[Tensor, "b _y _x"], ...]


class Prior(Checkpointed, ABC):
    """A distribution over one level's grids of codes: a body, and the head that reads codes for it and predicts them
    from it.

    Attributes:
        level: the grid it is trained on, and the radices of its codes.
        classes: how many classes of images it tells apart; 0 for none.
        upper_levels: how many levels its own has above it, whose codes it is told.
        method: how it is trained and drawn from.
        head: embedding, likelihood and draws.
    """

    family: ClassVar[Family] = "prior"
    method: ClassVar["Method"]
    level: Level
    classes: int
    upper_levels: int
    head: FactorizedHead

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

    def told(self, batch: dict[str, Any], label_dropout: float = 0.0) -> Told:
        """What a batch says beside its codes: `labels`, for a prior with classes, and `upper_0`, `upper_1`, ....

        Args:
            batch: as `LatentRows` makes it; for the dropout with `seeds`.
            label_dropout: share of rows whose class the prior is not told.
        """
        labels = batch["labels"] if self.classes else None
        if labels is not None and label_dropout:
            labels = labels.masked_fill(uniform(derive(batch["seeds"], LABEL)) < label_dropout, -1)
        return {"labels": labels, "upper": tuple(batch[f"upper_{level}"] for level in range(self.upper_levels))}


class CausalPrior(Prior):
    """A prior whose features at a position hang on the codes before it in raster order only.

    So the head's probabilities of all positions multiply to that of the grid: its likelihood is exact, and codes are
    drawn one after the other.
    """

    @abstractmethod
    def walk(
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
        known: Int64[Tensor, "b h w"],
        known_mask: Bool[Tensor, "b h w"],
        seeds: Int64[Tensor, " b"],
        labels: Int64[Tensor, " b"] | None = None,
        upper: tuple[Int64[Tensor, "b _y _x"], ...] = (),
        sampling: Any,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Int64[Tensor, "b h w"]:
        """Grids whose unknown codes are drawn; see `sample_sundae` and `sample_ancestral`."""
        ...


@dataclass(frozen=True)
class Method:
    """How priors of a kind are trained and drawn from: what belongs together, by name, so that no command need ask.

    Attributes:
        objective: (prior, its config) -> a module whose `forward(batch)` is the loss.
        objective_config: a frozen dataclass, which has a `label_dropout` whatever else.
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
