"""The registry of quantizers: the names of `--quantizer`, and the settings that each of them uses.

Each quantizer is in a file of its own. `linked`, `flat` and `cosine` are one class, in `linked.py`; HQA builds its own,
in `stochastic.py`. `examples/custom_quantizer.py` adds one from outside of the package.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Float, Int64
from torch import Tensor

from smalti.core.codes import Digits
from smalti.core.errors import UserError
from smalti.tokenizers.quantizers.fsq import FSQ, LEVELS
from smalti.tokenizers.quantizers.gumbel import GumbelQuantizer
from smalti.tokenizers.quantizers.inner_product import InnerProductQuantizer
from smalti.tokenizers.quantizers.lfq import LFQ
from smalti.tokenizers.quantizers.linked import LinkedQuantizer, QuantizerOutput
from smalti.tokenizers.quantizers.residual import ResidualQuantizer
from smalti.tokenizers.quantizers.simvq import SimVQ
from smalti.tokenizers.quantizers.tree import weights_of

QuantizerName: TypeAlias = Literal["linked", "flat", "cosine", "gumbel", "residual", "fsq", "lfq", "simvq", "dot"]


@runtime_checkable
class Quantizer(Protocol):
    """A module that maps vectors to codes and back. All are float32 under autocast.

    Those whose codebooks learn without gradients also have an `after_step`, see `smalti.training.config`.
    """

    @property
    def radices(self) -> tuple[int, ...]:
        """Radices of a code, most significant digit first."""
        ...

    def __call__(self, z_e: Float[Tensor, "b d h w"], *seeds: Int64[Tensor, " b"]) -> QuantizerOutput:
        """Quantizes a grid of any size and computes the losses. Only those that sample take seeds, one per image."""
        ...

    def encode(self, z_e: Float[Tensor, "b d h w"]) -> Int64[Tensor, "b h w"]:
        """Returns the codes alone. Equal vectors have equal codes."""
        ...

    def lookup(self, codes: Int64[Tensor, "b h w"], digits: Digits | None = None) -> Float[Tensor, "b d h w"]:
        """Returns the vectors of codes, or of some of their digits: a number for the first ones, or a slice.

        Raises:
            UserError: if the codes do not have these digits.
        """
        ...

    def init_from_data(self, z_e: Float[Tensor, "b d h w"]) -> None:
        """Initializes the codebooks from encoder outputs."""
        ...


@dataclass(frozen=True)
class Registered:
    """A quantizer in the registry.

    Attributes:
        build: builds it from `code_width`, `radices` and the arguments that `settings` names.
        settings: the config fields that it uses, with its names for them.
        coarse_to_fine: whether its codes have digits of which the first ones alone decode to a coarser image.
        starts_from_data: whether `init_from_data` does anything.
        samples: whether it takes seeds.
        remedy: its own remedy against codebook collapse, if it has one.
    """

    build: Callable[..., Quantizer]
    settings: Mapping[str, str]
    coarse_to_fine: bool = False
    starts_from_data: bool = False
    samples: bool = False
    remedy: str = ""


def _linked(*, radices: tuple[int, ...], **settings: Any) -> LinkedQuantizer:
    return LinkedQuantizer(branching=radices, **settings)


def _cosine(*, radices: tuple[int, ...], **settings: Any) -> LinkedQuantizer:
    return LinkedQuantizer(branching=radices, cosine=True, **settings)


def _residual(*, radices: tuple[int, ...], **settings: Any) -> ResidualQuantizer:
    return ResidualQuantizer(stages=len(radices), codebook_size=radices, **settings)


def _lfq(*, radices: tuple[int, ...], **settings: Any) -> LFQ:
    return LFQ(bits=len(radices), **settings)


def _of_one_codebook(quantizer: Callable[..., Quantizer]) -> Callable[..., Quantizer]:
    """Returns a function that builds a quantizer with one codebook, whose size is the only radix."""
    return lambda *, radices, **settings: quantizer(codebook_size=radices[0], **settings)


_COMMITMENT = {"commitment_weight": "commitment_weight"}
_NEAREST = {**_COMMITMENT, "gradient": "gradient"}
_START = "codebook_init"
_CODEBOOK = {
    **_NEAREST,
    **{"codebook_learning": "learning", "codebook_decay": "decay", "revive_below": "revive_below", _START: "start"},
}
_LINKED = {**_CODEBOOK, "combined_commitment_weight": "combined_commitment_weight"}
_ENTROPY = {**_COMMITMENT, "entropy_weight": "entropy_weight"}
_MORE_ENTROPY = "a higher --entropy-weight"

QUANTIZERS: dict[str, Registered] = {
    "linked": Registered(_linked, _LINKED, coarse_to_fine=True, starts_from_data=True),
    "flat": Registered(_linked, _CODEBOOK, starts_from_data=True),
    "cosine": Registered(_cosine, _CODEBOOK, starts_from_data=True),
    "gumbel": Registered(
        _of_one_codebook(GumbelQuantizer),
        {"temperature": "temperature", "kl_weight": "kl_weight"},
        samples=True,
        remedy="a higher --kl-weight",
    ),
    "residual": Registered(
        _residual, {**_CODEBOOK, "shared_codebooks": "shared"}, coarse_to_fine=True, starts_from_data=True
    ),
    "fsq": Registered(FSQ, {}),
    "lfq": Registered(_lfq, _ENTROPY, remedy=_MORE_ENTROPY),
    "simvq": Registered(_of_one_codebook(SimVQ), _NEAREST, starts_from_data=True),
    "dot": Registered(_of_one_codebook(InnerProductQuantizer), _ENTROPY, remedy=_MORE_ENTROPY),
}
_LAYERED = ("linked", "residual")
"""The quantizers with several layers of codebooks, which may differ in size and weight."""
_SIZES = ("codebook_size", "branching", "depth")


def code_radices(name: str, sizes: tuple[int, ...], levels: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Returns the radices of a quantizer's codes.

    Args:
        name: of the quantizer.
        sizes: codewords of each layer of codebooks, as the config has them; a single number of codes for quantizers
            without layers.
        levels: of FSQ, others do not use them; empty for those that its paper recommends for the number of codes.

    Raises:
        UserError: if the quantizer has no codes of these sizes.
    """
    if name in _LAYERED:
        return sizes
    if len(sizes) != 1:
        use = f"use --depth 1 and one --branching, not {len(sizes)} layers"
        raise UserError(f"--quantizer {name} needs codes of one layer; {use}")
    size = sizes[0]
    if size < 2:
        raise UserError(f"--quantizer {name} needs at least 2 codes, not {size}")
    if name == "lfq":
        if size & (size - 1):
            nearest = 2 ** round(math.log2(size))
            raise UserError(f"--quantizer lfq needs a power of two codes, such as {nearest}, not {size}")
        return (2,) * (size.bit_length() - 1)
    if name == "fsq":
        if not levels and size not in LEVELS:
            known = ", ".join(map(str, LEVELS))
            raise UserError(
                f"--quantizer fsq has no recommended levels for {size} codes, but for {known}; give --levels"
            )
        return levels or LEVELS[size]
    return sizes


def build_quantizer(name: str, *, code_width: int, radices: tuple[int, ...], config: Any) -> Quantizer:
    """Builds a quantizer with the settings that it uses.

    Raises:
        UserError: if there is no such quantizer, or they are unsuitable.
    """
    if not radices:
        raise UserError("codes need at least one digit; use a --depth of at least 1")
    if (registered := QUANTIZERS.get(name)) is None:
        raise UserError(f"there is no quantizer {name!r}; quantizers: {', '.join(QUANTIZERS)}")
    settings = {argument: getattr(config, field) for field, argument in registered.settings.items()}
    if settings.get("start") == "kmeans":  # `init_from_data` then replaces the random numbers
        settings["start"] = "uniform"
    if "commitment_weight" in settings and name not in _LAYERED:
        (settings["commitment_weight"],) = weights_of(settings["commitment_weight"], 1)
    return registered.build(code_width=code_width, radices=radices, **settings)


def unused_settings(name: str, levels: tuple[int, ...] = ()) -> set[str]:
    """Returns the config fields of quantizers that this one does not use.

    With `levels`, FSQ uses no other size.
    """
    every = {field for registered in QUANTIZERS.values() for field in registered.settings} | {"levels"}
    used = {*QUANTIZERS[name].settings, *([_START] if QUANTIZERS[name].starts_from_data else [])}
    if name == "fsq":
        used.add("levels")
        every.update(_SIZES if levels else ())
    return every - used
