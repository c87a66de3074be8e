"""A hierarchical variational autoencoder (VAE): its ELBO, and generation in five modes (selfVAE, Section 3).

The model has K representations of each image: none for a plain VAE (`vae.py`), those of a transformation for selfVAE
(`selfvae.py`). The networks are in `networks.py`; `modes.py` defines what each mode transmits.

Legend: b batch, c channels, h w pixels, d latent channels, y x grid of latents.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.core.codes import Codes, Digits, Layout, Level
from smalti.core.config import require_choice
from smalti.core.errors import UserError, require_at_least_one
from smalti.core.randomness import Stream, derive, normal, row_seeds
from smalti.core.realnvp_flow import Flow
from smalti.tokenizers.base import Tokenizer, TokenizerOutput, require_size
from smalti.tokenizers.layers.dense import DenseBlock, init_weight_norm_from_data
from smalti.tokenizers.selfvae.logistic import bits_per_number, to_bins
from smalti.tokenizers.selfvae.modes import MODES, GenerationMode, Pixels, Transmitted
from smalti.tokenizers.selfvae.networks import Decoder, Encoder, Gaussian, Shape
from smalti.tokenizers.selfvae.transformations import Form

START_IMAGES = 128  # images used by the data-dependent initialization


@dataclass(frozen=True)
class VAEConfig:
    """Settings that VAE and selfVAE share. The defaults are for 32x32 images on two CPU cores.

    The paper's networks have 32 to 42 million parameters. It calls `mixtures` I (Eqs. 14 and 16) and `flow_layers` F
    (Eq. 13).
    """

    height: int = 32
    """Height of the images in pixels. Other heights work too if 2**stages divides them."""
    width: int = 32
    """Width of the images in pixels."""
    image_channels: int = 3
    """3 for colour images, 1 for grey ones; 4 and 2 keep their alpha, other numbers are for images that have as many
    channels."""
    channels: int = 48
    """Channels of the networks."""
    growth: int = 16
    """Channels that each layer of a dense block adds."""
    dense_layers: int = 2
    """Layers of a dense block."""
    stages: int = 2
    """Number of times the networks halve the size. With 2, a 32x32 image has a grid of 8x8 latents."""
    latent_channels: int = 16
    """Values per position of a grid of latents. 8x8 positions of 16 are the paper's 1024 values."""
    mixtures: int = 3
    """Logistic components of the mixture that is a pixel's likelihood."""
    flow_layers: int = 8
    """Coupling layers of the RealNVP prior."""
    flow_width: int = 32
    """Channels of the coupling layers' networks."""
    warm_up: float = 0.0
    """KL warm-up: share of the training over which the weight of the latents' KL terms rises linearly to 1. Raise it
    against posterior collapse; the paper mentions none."""

    def __post_init__(self) -> None:
        require_at_least_one(
            self, "image_channels", "channels", "growth", "dense_layers", "latent_channels", "mixtures"
        )
        for name in ("stages", "flow_layers"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 0 <= self.warm_up <= 1:
            raise UserError(f"warm_up must be a share from 0 to 1, not {self.warm_up}")


VAEConfigT = TypeVar("VAEConfigT", bound=VAEConfig)


class Hierarchy(Tokenizer[VAEConfigT]):
    """Hierarchical VAE: the model p(x, y_1..y_K, z_1..z_K, u) (Eq. 21) and its variational posterior q (Eq. 22).

    In the code y[0] is x and y[k] the k-th representation. z[k] is inferred from y[k]: the paper's z_(k+1), and z[K] is
    u. Level k thus has q(z[k] | y[k]), p(y[k] | y[k+1], z[k]) and p(z[k] | y[k+1], z[k+1]); the coarsest level K has
    p(y[K] | u) and p(u). Images are float in [-1, 1] and are rounded to the nearest 8-bit values, 127.5 (x + 1).

    The code of an image is u, one continuous level: the mean of q(u | y_K). `decode` uses the mean of every
    distribution, level by level; `draw` samples the latents and uses the means of images.

    Args:
        config: settings of the networks.
        forms: channels, size and values of the images at each level.

    Raises:
        UserError: if the image size is not divisible by 2**stages, or the smallest representation would be smaller than
            the grid of latents.
    """

    uses: ClassVar[tuple[str, ...]] = ("seeds", "progress")
    training_settings: ClassVar[frozenset[str]] = frozenset({"warm_up"})

    def __init__(self, config: VAEConfigT, forms: Sequence[Form]) -> None:
        super().__init__(config)
        self.image_channels, self.downsampling, self.forms = config.image_channels, 2**config.stages, tuple(forms)
        require_size(config.height, config.width, self.downsampling)
        if forms[-1].halvings > config.stages:
            raise UserError(
                f"{forms[-1].halvings} halvings make representations smaller than the grid of latents, which has "
                f"{config.stages}; use fewer --levels or more --stages"
            )
        shape = Shape(
            channels=config.channels,
            growth=config.growth,
            layers=config.dense_layers,
            latent_channels=config.latent_channels,
            stages=config.stages,
            mixtures=config.mixtures,
        )
        self.posteriors = nn.ModuleList(Encoder(shape, form, conditional=False) for form in forms)
        self.likelihoods = nn.ModuleList(
            Decoder(shape, form, condition) for form, condition in zip(forms, (*forms[1:], None), strict=True)
        )
        self.priors = nn.ModuleList(Encoder(shape, form, conditional=True) for form in forms[1:])
        self.flow = Flow(config.latent_channels, layers=config.flow_layers, width=config.flow_width)

    @property
    def layout(self) -> Layout:
        """One continuous level, the real-valued latents u."""
        height, width = self.config.height // self.downsampling, self.config.width // self.downsampling
        return Layout((Level(height, width, channels=self.config.latent_channels),))

    @property
    def top(self) -> int:
        """K: the number of transformations, and the index of the coarsest level."""
        return len(self.forms) - 1

    def representations(self, images: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b _c _h _w"]]:
        """Returns y_0, ..., y_K (Eq. 20); y_0 is x rounded to 8-bit values."""
        require_size(images.shape[2], images.shape[3], self.downsampling)
        return [to_bins(images.float(), 256)]

    def posterior(self, level: int, y: Float[Tensor, "b c h w"]) -> Gaussian:
        """Returns the posterior of level k: q(z_(k+1) | y_k), or q(u | y_K) for the coarsest (Eqs. 17 and 18)."""
        return self.posteriors[level](y)

    def prior(self, level: int, y: Float[Tensor, "b c h w"], coarser: Float[Tensor, "b d y x"]) -> Gaussian:
        """Returns the prior p(z_k | y_k, z_(k+1)) of the latents of level k - 1, for k from 1 (Eq. 15).

        `coarser` are the latents z_(k+1) of level k; for k = K they are u.
        """
        return self.priors[level - 1](y, coarser)

    def terms(
        self, y: Sequence[Float[Tensor, "b _c _h _w"]], q: Sequence[Gaussian], seeds: Int64[Tensor, " b"]
    ) -> dict[str, Float[Tensor, " b"]]:
        """Computes the terms of the negative ELBO (Eq. 23; Eq. 11 for K = 1), in nats, for one sample of all latents.

        The latents are sampled by the reparameterization trick, so the terms have gradients to q.

        Returns:
            `x`, `y1`, ...: reconstruction terms, -ln p of each image. `z1`, ...: KL terms, ln q(z_k) - ln p(z_k | ...).
            `u`: the KL term ln q(u) - ln p(u). Their sum is the negative log importance weight of the sample; its
            expectation is the negative ELBO.
        """
        z = [posterior.sample(derive(seeds, level)) for level, posterior in enumerate(q)]
        terms = {}
        for level, (image, latents) in enumerate(zip(y, z, strict=True)):
            condition = () if level == self.top else (y[level + 1],)
            likelihood = self.likelihoods[level](latents, *condition)
            terms[f"y{level}" if level else "x"] = -likelihood.log_prob(image)
            if level < self.top:
                ln_p = self.prior(level + 1, y[level + 1], z[level + 1]).log_prob(latents)
            else:
                ln_p = self.flow.log_prob(latents)
            terms[f"z{level + 1}" if level < self.top else "u"] = q[level].log_prob(latents) - ln_p
        return terms

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        seeds: Int64[Tensor, " b"] | None = None,
        progress: Float[Tensor, " b"] | None = None,
    ) -> TokenizerOutput:
        """Computes the losses, whose sum is the negative ELBO (Eq. 23) in bits per dimension of x.

        Args:
            images: images in [-1, 1].
            seeds: one per image, for the samples of the latents; without seeds every call samples the same.
            progress: training progress from 0 to 1, for the KL warm-up.
        """
        seeds = row_seeds(0, torch.arange(len(images), device=images.device)) if seeds is None else seeds
        y = self.representations(images)
        q = [self.posterior(level, image) for level, image in enumerate(y)]
        unit, kl_weight = bits_per_number(images[0].numel()), torch.ones(len(images), device=images.device)
        if self.training and self.config.warm_up and progress is not None:
            kl_weight = (progress / self.config.warm_up).clamp(max=1)
        terms = self.terms(y, q, seeds).items()
        losses = {f"bits_{name}": (nats if name[0] in "xy" else kl_weight * nats).mean() * unit for name, nats in terms}
        return TokenizerOutput(None, (q[-1].mean.detach(),), losses)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c h w"]) -> Codes:
        """Returns the mean of q(u | y_K); see `Tokenizer.encode`."""
        return (self.posterior(self.top, self.representations(images)[-1]).mean,)

    def decode(self, codes: Codes, digits: Digits | None = None) -> Float[Tensor, "b c h w"]:
        """Decodes u by the mean of every distribution; see `Tokenizer.decode`."""
        if digits is not None:
            raise UserError(f"{self.kind} cannot decode some digits of codes: its latents are real-valued")
        (u,) = codes
        return self.decode_from(Transmitted(u=u))

    def draw(self, codes: Codes, seeds: Int64[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """Decodes u with sampled latents at the finer levels; see `Tokenizer.draw`."""
        (u,) = codes
        return self.decode_from(Transmitted(u=u), seeds)

    @property
    def modes(self) -> tuple[GenerationMode, ...]:
        """Generation modes of this model. A plain VAE has no representations, so it has only two."""
        return tuple(MODES) if self.top else ("generation", "reconstruction-1")

    @torch.no_grad()
    def transmit(
        self, images: Float[Tensor, "b c h w"], mode: GenerationMode, seeds: Int64[Tensor, " b"] | None = None
    ) -> Transmitted:
        """Returns the parts of images that a mode transmits.

        Latents are sampled from the posteriors, or are their means if there are no seeds, and rounded to half
        precision.

        Raises:
            UserError: if this model does not have the mode.
        """
        if mode not in self.modes:
            raise UserError(f"{self.kind} has no {mode}; its modes are {', '.join(self.modes)}")
        parts, y = MODES[mode], self.representations(images)
        levels = [*(range(self.top) if "z" in parts else ()), *((self.top,) if "u" in parts else ())]
        z = {
            level: self._sample_or_mean(self.posterior(level, y[level]), seeds, level).half().float()
            for level in levels
        }
        u = z.pop(self.top, None)
        return Transmitted(y[-1] if "y" in parts else None, u, tuple(z.values()))

    @torch.no_grad()
    def decode_from(
        self, transmitted: Transmitted, seeds: Int64[Tensor, " b"] | None = None, pixels: Pixels = "mean"
    ) -> Float[Tensor, "b c h w"]:
        """Decodes images, coarsest level first, with ancestral sampling of what is not transmitted (Section 3.3).

        Args:
            transmitted: parts of the images; all empty for new images.
            seeds: one per image, for all samples. Without seeds the mean of every distribution is used.
            pixels: how images and representations are taken from their likelihoods; without seeds, always the mean.

        Raises:
            UserError: if `pixels` is none of its choices.
        """
        require_choice("pixels", pixels, Pixels)
        y, latents = transmitted.y, transmitted.u
        if latents is None and y is None:
            assert seeds is not None, "new images need seeds"
            (grid,) = self.layout.levels
            latents = self.flow.from_base(normal(derive(seeds, Stream.VAE_LATENTS, self.top), *grid.shape))
        elif latents is None and not transmitted.z:
            assert y is not None
            latents = self._sample_or_mean(self.posterior(self.top, y), seeds, Stream.VAE_LATENTS, self.top)
        for level in range(self.top, -1, -1):
            if y is None or level < self.top:
                assert latents is not None
                likelihood = self.likelihoods[level](latents, *(() if y is None else (y,)))
                pixel_seeds = None if pixels == "mean" or seeds is None else derive(seeds, Stream.VAE_PIXELS, level)
                y = likelihood.nearest_to_mean() if pixel_seeds is None else likelihood.sample(pixel_seeds)
            if level and transmitted.z:
                latents = transmitted.z[level - 1]
            elif level:
                assert latents is not None
                prior = self.prior(level, y, latents)
                latents = self._sample_or_mean(prior, seeds, Stream.VAE_LATENTS, level - 1)
        assert y is not None
        return y

    def generation(self, seeds: Int64[Tensor, " b"], pixels: Pixels = "mean") -> Float[Tensor, "b c h w"]:
        """Generates new images (Fig. 3i): u ~ p(u), then ancestral sampling; nothing is transmitted."""
        return self.decode_from(Transmitted(), seeds, pixels)

    def bits_sent(self, transmitted: Transmitted) -> float:
        """Returns the bits transmitted per image, without entropy coding."""
        y = transmitted.y
        y_bits = 0.0 if y is None else y[0].numel() * math.log2(self.forms[-1].bins)
        return y_bits + transmitted.latent_bits

    def compression_ratio(self, transmitted: Transmitted, images: Float[Tensor, "b c h w"]) -> float:
        """Returns the bits of the 8-bit images over the transmitted bits; infinite if nothing is transmitted."""
        bits = self.bits_sent(transmitted)
        return 8 * images[0].numel() / bits if bits else math.inf

    def determines_latents(self, transmitted: Transmitted) -> bool:
        """Returns whether the transmitted parts determine all latents, so that decoding samples none."""
        return len(transmitted.z) == self.top and (transmitted.u is not None or transmitted.y is not None)

    def init_from_data(self, images: Float[Tensor, "b c h w"]) -> None:
        """Initializes all convolutions from data; see `init_weight_norm_from_data`."""
        init_weight_norm_from_data(self, lambda: self(images[:START_IMAGES]))

    def recomputable(self) -> list[nn.Module]:
        """Returns every dense block and the coupling layers' networks."""
        return [*(module for module in self.modules() if isinstance(module, DenseBlock)), *self.flow.networks()]

    @torch.no_grad()
    def reconstructions(self, images: Float[Tensor, "b c h w"]) -> dict[str, Float[Tensor, "b c h w"]]:
        """Returns the images of each mode, captioned with its compression ratio; see `Tokenizer.reconstructions`."""
        seeds, decoded = row_seeds(0, torch.arange(len(images), device=images.device)), {}
        for mode in self.modes:
            transmitted = self.transmit(images, mode, seeds)
            ratio = f", {self.compression_ratio(transmitted, images):.3g}:1" if MODES[mode] else ""
            decoded[f"{mode}{ratio}"] = self.decode_from(transmitted, seeds)
        return decoded

    @staticmethod
    def _sample_or_mean(gaussian: Gaussian, seeds: Tensor | None, *stream: int) -> Tensor:
        return gaussian.mean if seeds is None else gaussian.sample(derive(seeds, *stream))
