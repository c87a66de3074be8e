"""The contract that every tokenizer implements. Commands and priors use tokenizers only through these classes.

To add a tokenizer, write a frozen config dataclass and a subclass of `Tokenizer`, mark the subclass with
`smalti.core.models.register`, and implement `layout`, `encode`, `decode` and `forward`. The other methods have defaults
that suit most tokenizers. `tokenizers/vq/vqvae.py` is a short example.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from smalti.core.codes import Codes, Digits, Layout
from smalti.core.config import require_choice
from smalti.core.errors import UserError
from smalti.core.hub.cards import code
from smalti.core.models import Checkpointed, Family, digest
from smalti.tokenizers.input_checks import checking_first, require_codes, require_images
from smalti.training.config import FitConfig, Phase

ConfigT = TypeVar("ConfigT")
SAME_CODES = "same_codes"
PartName: TypeAlias = Literal["encoder", "decoder", "codebook"]


@dataclass(frozen=True)
class TokenizerOutput:
    """Result of a tokenizer's `forward` on a batch of images.

    Attributes:
        reconstruction: reconstructed images in [-1, 1], not clamped; None if training does not compute them.
        codes: one tensor per level, as `encode` returns them. In training they may be samples.
        losses: scalar loss terms by name, already weighted. Their sum is the objective.
    """

    reconstruction: Float[Tensor, "b c h w"] | None
    codes: Codes
    losses: dict[str, Float[Tensor, ""]]


def require_size(height: int, width: int, downsampling: int, whose: str = "this tokenizer's downsampling") -> None:
    """Refuses images whose height or width is not divisible by `downsampling`; `whose` names it in the message.

    Raises:
        UserError: if the size is not divisible, or not positive.
    """
    if min(height, width) < 1:
        raise UserError(f"images of {height}x{width} have no pixels; height and width must be at least {downsampling}")
    if height % downsampling or width % downsampling:
        raise UserError(
            f"images of {height}x{width} are not divisible by {downsampling}, {whose}; crop or resize the images"
        )


class Tokenizer(Checkpointed, ABC, Generic[ConfigT]):
    """Stage one: an autoencoder that maps images to grids of codes and back.

    Images are float, `(b, c, h, w)`, in [-1, 1]. A tokenizer accepts any height and width divisible by `downsampling`;
    `layout` describes the codes of images of the size in the config.

    A subclass sets the class attributes `kind` (its name on the command line) and `config_class`. Its constructor takes
    one instance of `config_class`, passes it to `super().__init__`, and sets `image_channels` and `downsampling`.
    Everything that inference needs must be a parameter, a buffer or a config field: only these are saved.

    `forward(images)` is the training pass and returns a `TokenizerOutput`. If `uses` names further entries of the
    batch, `forward` receives them as positional arguments after the images, in that order, each optional.

    `encode`, `decode` and `draw` of every subclass refuse wrong input before they run; see `input_checks.py`.

    Codebook search, losses and moving averages must stay float32 under autocast. A module that learns other than by
    gradients, e.g. a codebook with EMA updates, implements `smalti.training.config.LearnsAfterSteps`.

    Attributes:
        uses: batch entries that `forward` takes after the images. `seeds`, int64 `(b,)`: one per image; every random
            draw must depend on them alone, so that runs are reproducible. `progress`, float `(b,)`: training progress
            from 0 to 1, e.g. for a temperature.
        parts: names of the modules that make the encoder, the decoder and the codebooks; empty if they cannot be
            trained apart. Those of the decoder have no influence on `encode`.
        training_settings: names of config fields that matter in training alone.
        config: settings from which the tokenizer is rebuilt.
        image_channels: 3 for colour images, 1 for grey ones.
        downsampling: factor by which height and width of the images must be divisible.
    """

    family: ClassVar[Family] = "tokenizer"
    uses: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[Mapping[PartName, tuple[str, ...]]] = {}
    training_settings: ClassVar[frozenset[str]] = frozenset()
    config: ConfigT
    image_channels: int
    downsampling: int

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        checks = {
            "encode": ("images", Tokenizer._require_images),
            "decode": ("codes", Tokenizer._require_codes),
            "draw": ("codes", Tokenizer._require_codes),
        }
        for method, check in checks.items():
            if method in cls.__dict__:
                setattr(cls, method, checking_first(cls.__dict__[method], *check))

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """Returns the levels of the codes of one image of the size in the config, coarsest first."""

    @abstractmethod
    def encode(self, images: Float[Tensor, "b c h w"]) -> Codes:
        """Encodes images, without gradients. Deterministic: equal images have equal codes, whatever the mode.

        Args:
            images: float32, or in the dtype of the weights, in [-1, 1]; `smalti.images.decoding.to_float` makes them
                from pixels. Their values are checked on the CPU only, as the check would delay an accelerator.

        Raises:
            UserError: if the images' size is not divisible by `downsampling`, or as `require_images` does.
        """

    @abstractmethod
    def decode(self, codes: Codes, digits: Digits | None = None) -> Float[Tensor, "b c h w"]:
        """Decodes codes to images, clamped to [-1, 1]. Deterministic.

        Args:
            codes: one tensor per level, on grids of any size. Their values are checked on the CPU only, as the check
                would delay an accelerator.
            digits: decode only some digits of each code: a number for the first ones, for coarser images, or a slice,
                such as `slice(1, None)` for what all but the first add; None decodes all.

        Raises:
            UserError: if the codes do not have these digits, or as `require_codes` does.
        """

    def facts(self) -> dict[str, str]:
        """Returns what the model's card says of the tokenizer."""
        height, width = self.config.height, self.config.width  # pyright: ignore[reportAttributeAccessIssue] - of every config
        channels = "grey" if self.image_channels == 1 else "colour" if self.image_channels == 3 else "other"
        return {
            "images": f"{height}×{width}, {channels}",
            "codes of an image": str(self.layout),
            "encodes as": ", ".join(code(str(other)) for other in self.digests_of_codes()[1:]),
            **super().facts(),
        }

    def draw(self, codes: Codes, seeds: Int64[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """Decodes codes that a prior sampled. Override it if codes leave details open, and sample them from `seeds`.

        Args:
            codes: one tensor per level.
            seeds: one per image; every random draw depends on them alone.
        """
        return self.decode(codes)

    def code_digest(self) -> str:
        """Returns a SHA-256 over what decides the codes of an image: kind, config and all weights but the decoder's.

        Tokenizers with equal code digests encode alike, so each decodes the codes of the other. Settings that matter
        in training alone do not count.
        """
        decoder = self.parts.get("decoder", ())
        state = {name: tensor for name, tensor in self.state_dict().items() if name.partition(".")[0] not in decoder}
        return digest(self.kind, self.config, state, without=self.training_settings)

    def digests_of_codes(self) -> list[str]:
        """Returns the digests of all tokenizers that are known to encode as this one does; the first is its own.

        The others are those it was trained from with encoder and codebook frozen (`same_codes` in its provenance).
        They do not count if its own code digest has changed since then.
        """
        recorded = self.provenance.get(SAME_CODES)
        if not isinstance(recorded, dict) or recorded.get("code_digest") != self.code_digest():
            return [self.digest()]
        digests = recorded.get("digests")
        return [self.digest(), *(digests if isinstance(digests, list) else [])]

    def keep_codes_of(self, other: "Tokenizer") -> None:
        """Records that this tokenizer, which has the weights of the other one's encoder and codebooks, keeps them."""
        self.provenance[SAME_CODES] = {"code_digest": self.code_digest(), "digests": other.digests_of_codes()}

    def freeze(self, parts: Sequence[PartName]) -> None:
        """Keeps parts of the tokenizer as they are in training.

        Raises:
            UserError: if there are no such parts, this kind has none, or nothing is left to train.
        """
        for part in parts:
            require_choice("freeze", part, PartName)
        if parts and not self.parts:
            raise UserError(f"--freeze is not for {self.kind}, whose parts cannot be trained apart")
        for part in parts:
            for name in self.parts[part]:
                self.get_submodule(name).requires_grad_(False)
        if parts and set(parts) >= {"encoder", "decoder"}:
            raise UserError("--freeze encoder decoder leaves nothing to train; leave one of them out")

    def init_from_data(self, images: Float[Tensor, "b c h w"]) -> None:
        """Initializes weights from some training images; called once, before training. The default does nothing."""

    def init_new_from_data(self, images: Float[Tensor, "b c h w"], taken: Collection[str]) -> None:
        """Initializes weights from images after the tensors named `taken` were copied from a trained tokenizer.

        The default initializes all that `init_from_data` does.
        """
        self.init_from_data(images)

    def starts_from_data(self, *, tuned: bool = False) -> bool:
        """Returns whether `init_from_data` initializes anything; with `tuned`, whether `init_new_from_data` does."""
        return type(self).init_from_data is not Tokenizer.init_from_data

    def phases(self, fit: FitConfig) -> list[Phase]:
        """Returns the phases of a training step: objectives with optimizers, such as generator and discriminator.

        The default, an empty list, means one phase: one optimizer minimizes the sum of `forward`'s losses.
        """
        return []

    @classmethod
    def stages(cls, config: ConfigT) -> Sequence[ConfigT]:
        """Returns the configs of the tokenizers that are trained one after the other, each on top of the one before.

        The last one is `config` itself. The default is a single stage.
        """
        return [config]

    def build_on(self, below: "Tokenizer") -> None:
        """Copies the trained weights of the stage before into this tokenizer. Needed if there are several `stages`."""
        raise NotImplementedError  # never called with the default `stages`

    @torch.no_grad()
    def reconstructions(self, images: Float[Tensor, "b c h w"]) -> dict[str, Float[Tensor, "b c h w"]]:
        """Returns reconstructions to show next to images during training, by caption.

        The default decodes all digits of the codes, then ever fewer of them.
        """
        codes = self.encode(images)
        decoded = {f"from {str(self.layout).replace('×', 'x')}": self.decode(codes)}
        digits = max(len(level.radices) for level in self.layout.levels)
        for first in range(digits - 1, 0, -1):
            decoded[f"first digit{'s' if first > 1 else ''} ({first} of {digits})"] = self.decode(codes, first)
        return decoded

    @classmethod
    def unused_settings(cls, config: ConfigT) -> tuple[str, set[str]]:
        """Returns the choice in a config that leaves other settings unused, as errors name it, and those settings.

        The default is that all are used.
        """
        return "", set()

    @classmethod
    def require_used(cls, config: ConfigT, defaults: ConfigT) -> None:
        """Refuses a config with settings that it does not use, unless they are the defaults.

        Args:
            config: the config.
            defaults: the config before the user changed it.

        Raises:
            UserError: naming the first such setting.
        """
        choice, unused = cls.unused_settings(config)
        for field in sorted(unused):
            if getattr(config, field, None) != getattr(defaults, field, None):
                raise UserError(f"{choice} does not use --{field.replace('_', '-')}; leave it out")

    def _require_images(self, images: object) -> None:
        require_images(images, self.image_channels, self._weights_dtype)

    def _require_codes(self, codes: object) -> None:
        require_codes(codes, self.layout.levels, self._weights_dtype)

    @property
    def _weights_dtype(self) -> torch.dtype:
        return next((weights.dtype for weights in self.parameters()), torch.float32)

    def collapse_remedy(self) -> str:
        """Returns advice against codebook collapse. It completes the sentence "Try ..." of a warning."""
        return "fewer codes, more images, or a lower --learning-rate"
