"""A hierarchy of variational autoencoders: its bound, and the ways to make images of what is sent (selfVAE, Section 3).

Written for K representations of an image, of which a plain VAE (`vae.py`) has none, and selfVAE (`selfvae.py`) those
that its transformation makes. The networks are in `selfvae_networks.py`.

Legend: b batch, c channels, h w pixels, d latent channels, y x grid of latents.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.core.codes import Codes, Layout, Level
from smalti.core.errors import UserError, require_at_least_one
from smalti.core.randomness import Stream, derive, normal, row_seeds
from smalti.core.realnvp_flow import Flow
from smalti.tokenizers.base import Tokenizer, TokenizerOutput, require_size
from smalti.tokenizers.layers.dense import DenseBlock, start_from_data
from smalti.tokenizers.selfvae.logistic import bits_per_number, to_bins
from smalti.tokenizers.selfvae.networks import Decoder, Encoder, Gaussian, Shape
from smalti.tokenizers.selfvae.transformations import Form

Way: TypeAlias = Literal[
    "generation", "conditional-generation", "conditional-reconstruction", "reconstruction-1", "reconstruction-2"
]
"""The five of Section 3.3."""
Pixels: TypeAlias = Literal["mean", "sample"]
"""What is taken of a likelihood of pixels: its mean, to the nearest possible value, or a sample."""

MODES: dict[Way, str] = {
    "generation": "",
    "conditional-generation": "y",
    "conditional-reconstruction": "yz",
    "reconstruction-1": "u",
    "reconstruction-2": "uz",
}
"""What is sent in each: y_K, all z_k, u."""
START_IMAGES = 128  # that the data-dependent start sees
SENT_BITS = 16  # of a latent number: what is decoded has been rounded to half precision


@dataclass(frozen=True)
class Transmitted:
    """What one sends of images for them to be made again; what is None or empty, the receiver draws.

    Attributes:
        y: the last representation, y_K.
        u: the last latents.
        z: z_1, ..., z_K.
    """

    y: Float[Tensor, "b _c _h _w"] | None = None
    u: Float[Tensor, "b d y x"] | None = None
    z: tuple[Float[Tensor, "b d y x"], ...] = ()


@dataclass(frozen=True)
class VAEConfig:
    """What both kinds share. The defaults are for 32x32 images on two CPU cores; the paper's networks have some 40M."""

    height: int = 32
    """Height of the images in pixels; others that divide by 2**stages work too."""
    width: int = 32
    """Width of the images in pixels."""
    image_channels: int = 3
    """3 for colour, 1 for grey."""
    channels: int = 48
    """Channels of the networks."""
    growth: int = 16
    """Channels that each layer of a dense block adds."""
    dense_layers: int = 2
    """Layers of a dense block."""
    stages: int = 2
    """How often the grid of latents halves the image's size: 32x32 images have 8x8."""
    latent_channels: int = 16
    """Numbers at each position of a grid of latents: 8x8 of 16 make the paper's 1024."""
    mixtures: int = 3
    """Logistics whose mixture is the likelihood of a pixel (I in Eqs. 14 and 16)."""
    flow_layers: int = 8
    """Couplings of the RealNVP prior (F in Eq. 13)."""
    flow_width: int = 32
    """Channels of the couplings' networks."""
    warm_up: float = 0.0
    """Share of the training over which what latents cost comes into the loss, linearly; the paper has 0."""

    def __post_init__(self) -> None:
        require_at_least_one(
            self, "image_channels", "channels", "growth", "dense_layers", "latent_channels", "mixtures"
        )
        for name in ("stages", "flow_layers"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 0 <= self.warm_up <= 1:
            raise UserError(f"warm_up must be a share from 0 to 1: got {self.warm_up}")


class Hierarchy(Tokenizer):
    """p(x, y_1..y_K, z_1..z_K, u) (Eq. 21), and its variational family (Eq. 22).

    In the code y[0] is x, y[k] the k-th representation; z[k] is what q infers from y[k], the paper's z_(k+1), and z[K]
    is u. So level k has q(z[k] | y[k]), p(y[k] | y[k+1], z[k]) and p(z[k] | y[k+1], z[k+1]); the last, p(y[K] | u) and
    p(u). Images are float in [-1, 1] of 8-bit values 127.5 (x + 1); others count as the nearest of these.

    The code of an image is u, one continuous level: the means of q(u | y_K). `decode` goes down from it by the means of
    every distribution, `draw` by sampled latents and the means of images.

    Args:
        config: the networks' settings.
        forms: of the images at each level.

    Raises:
        UserError: if the image size does not divide by 2**stages, or the smallest representation would be smaller than
            the grid of latents.
    """

    uses: ClassVar[tuple[str, ...]] = ("seeds", "progress")

    def __init__(self, config: VAEConfig, forms: Sequence[Form]) -> None:
        super().__init__(config)
        self.image_channels, self.downsampling, self.forms = config.image_channels, 2**config.stages, tuple(forms)
        require_size(config.height, config.width, self.downsampling)
        if forms[-1].halvings > config.stages:
            raise UserError(
                f"{forms[-1].halvings} halvings go below the grid of latents, which halves the size {config.stages} "
                "times; give fewer --levels or more --stages"
            )
        shape = Shape(
            channels=config.channels,
            growth=config.growth,
            layers=config.dense_layers,
            latent_channels=config.latent_channels,
            stages=config.stages,
            mixtures=config.mixtures,
        )
        self.posteriors = nn.ModuleList(Encoder(shape, form, told=False) for form in forms)
        self.likelihoods = nn.ModuleList(
            Decoder(shape, form, given) for form, given in zip(forms, (*forms[1:], None), strict=True)
        )
        self.priors = nn.ModuleList(Encoder(shape, form, told=True) for form in forms[1:])
        self.flow = Flow(config.latent_channels, layers=config.flow_layers, width=config.flow_width)

    @property
    def layout(self) -> Layout:
        """One level, of real numbers: u."""
        height, width = self.config.height // self.downsampling, self.config.width // self.downsampling
        return Layout((Level(height, width, channels=self.config.latent_channels),))

    @property
    def top(self) -> int:
        """K: how many transformations there are."""
        return len(self.forms) - 1

    def representations(self, images: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b _c _h _w"]]:
        """y_0 = x to the nearest 8-bit values, y_1, ..., y_K (Eq. 20)."""
        require_size(images.shape[2], images.shape[3], self.downsampling)
        return [to_bins(images.float(), 256)]

    def posterior(self, level: int, y: Float[Tensor, "b c h w"]) -> Gaussian:
        """q(z_(k+1) | y_k) of level k; of the last, q(u | y_K) (Eqs. 17 and 18)."""
        return self.posteriors[level](y)

    def prior(self, level: int, y: Float[Tensor, "b c h w"], above: Float[Tensor, "b d y x"]) -> Gaussian:
        """p(z_k | y_k, z_(k+1)) for k from 1, the last told u (Eq. 15): of the latents inferred at level k - 1."""
        return self.priors[level - 1](y, above)

    def terms(
        self, y: Sequence[Float[Tensor, "b _c _h _w"]], q: Sequence[Gaussian], seeds: Int64[Tensor, " b"]
    ) -> dict[str, Float[Tensor, " b"]]:
        """The terms of Eq. 23 (Eq. 11 of one transformation), negative, in nats, for one draw of all latents.

        Returns:
            `x`, `y1`, ...: -ln p of each image. `z1`, ...: ln q(z_k) - ln p(z_k | ...). `u`: ln q(u) - ln p(u). Their
            sum is the negative logarithm of the importance weight of the draw; its expectation, the negative bound.
        """
        z = [of.sample(derive(seeds, level)) for level, of in enumerate(q)]
        found = {}
        for level, (image, latents) in enumerate(zip(y, z, strict=True)):
            given = () if level == self.top else (y[level + 1],)
            likelihood = self.likelihoods[level](latents, *given)
            found[f"y{level}" if level else "x"] = -likelihood.log_prob(image)
            if level < self.top:
                ln_p = self.prior(level + 1, y[level + 1], z[level + 1]).log_prob(latents)
            else:
                ln_p = self.flow.log_prob(latents)
            found[f"z{level + 1}" if level < self.top else "u"] = q[level].log_prob(latents) - ln_p
        return found

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        seeds: Int64[Tensor, " b"] | None = None,
        progress: Float[Tensor, " b"] | None = None,
    ) -> TokenizerOutput:
        """The losses, whose sum is the negative bound of Eq. 23 in bits for each number of x.

        Args:
            images: [-1, 1].
            seeds: of the images, which decide the draws of the latents; without, they draw the same each time.
            progress: of the training, from 0 to 1: until it is past the warm-up, latents cost a share.
        """
        seeds = row_seeds(0, torch.arange(len(images), device=images.device)) if seeds is None else seeds
        y = self.representations(images)
        q = [self.posterior(level, image) for level, image in enumerate(y)]
        unit, share = bits_per_number(images[0].numel()), torch.ones(len(images), device=images.device)
        if self.training and self.config.warm_up and progress is not None:
            share = (progress / self.config.warm_up).clamp(max=1)
        terms = self.terms(y, q, seeds).items()
        losses = {f"bits_{name}": (nats if name[0] in "xy" else share * nats).mean() * unit for name, nats in terms}
        return TokenizerOutput(None, (q[-1].mean.detach(),), losses)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c h w"]) -> Codes:
        """See `Tokenizer.encode`: the means of q(u | y_K)."""
        return (self.posterior(self.top, self.representations(images)[-1]).mean,)

    def decode(self, codes: Codes, digits: int | None = None) -> Float[Tensor, "b c h w"]:
        """See `Tokenizer.decode`: down from u by means."""
        if digits is not None:
            raise UserError(f"{self.kind} has no digits to leave out: its codes are real numbers")
        (u,) = codes
        return self.decode_from(Transmitted(u=u))

    def draw(self, codes: Codes, seeds: Int64[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """See `Tokenizer.draw`: down from u by sampled latents."""
        (u,) = codes
        return self.decode_from(Transmitted(u=u), seeds)

    @property
    def modes(self) -> tuple[Way, ...]:
        """Those there are: of a VAE, whose images have no representation, two."""
        return tuple(MODES) if self.top else ("generation", "reconstruction-1")

    @torch.no_grad()
    def transmit(
        self, images: Float[Tensor, "b c h w"], mode: Way, seeds: Int64[Tensor, " b"] | None = None
    ) -> Transmitted:
        """What is sent of images: latents as the posteriors draw them, or of no seeds their means, in half precision.

        Raises:
            UserError: for a way that this model does not have.
        """
        if mode not in self.modes:
            raise UserError(f"{self.kind} has no {mode}; its modes are {', '.join(self.modes)}")
        what, y = MODES[mode], self.representations(images)
        needed = [*(range(self.top) if "z" in what else ()), *((self.top,) if "u" in what else ())]
        z = {level: self._taken(self.posterior(level, y[level]), seeds, level).half().float() for level in needed}
        u = z.pop(self.top, None)
        return Transmitted(y[-1] if "y" in what else None, u, tuple(z.values()))

    @torch.no_grad()
    def decode_from(
        self, sent: Transmitted, seeds: Int64[Tensor, " b"] | None = None, pixels: Pixels = "mean"
    ) -> Float[Tensor, "b c h w"]:
        """Images of what was sent (Section 3.3, Fig. 3); what was not is drawn, or of no seeds the mean.

        Args:
            sent: of these images; nothing, for new ones.
            seeds: one for each image, which decide all that is drawn.
            pixels: what is taken of the images' likelihoods, the representations' too; without seeds, the mean.
        """
        y, above = sent.y, sent.u
        if above is None and y is None:
            assert seeds is not None, "images of nothing are drawn"
            (grid,) = self.layout.levels
            above = self.flow.from_base(normal(derive(seeds, Stream.VAE_LATENTS, self.top), *grid.shape))
        elif above is None and not sent.z:
            assert y is not None
            above = self._taken(self.posterior(self.top, y), seeds, Stream.VAE_LATENTS, self.top)
        for level in range(self.top, -1, -1):
            if y is None or level < self.top:
                assert above is not None
                likelihood = self.likelihoods[level](above, *(() if y is None else (y,)))
                of_level = None if pixels == "mean" or seeds is None else derive(seeds, Stream.VAE_PIXELS, level)
                y = likelihood.nearest_to_mean() if of_level is None else likelihood.sample(of_level)
            if level and sent.z:
                above = sent.z[level - 1]
            elif level:
                assert above is not None
                above = self._taken(self.prior(level, y, above), seeds, Stream.VAE_LATENTS, level - 1)
        assert y is not None
        return y

    def generation(self, seeds: Int64[Tensor, " b"], pixels: Pixels = "mean") -> Float[Tensor, "b c h w"]:
        """Fig. 3i: u ~ p(u), and down; nothing is sent."""
        return self.decode_from(Transmitted(), seeds, pixels)

    def conditional_generation(
        self, images: Float[Tensor, "b c h w"], seeds: Int64[Tensor, " b"] | None = None, pixels: Pixels = "mean"
    ) -> Float[Tensor, "b c h w"]:
        """Fig. 3ii: y_K is sent; u ~ q(u | y_K), z_K ~ p(z_K | u, y_K), and down."""
        return self.decode_from(self.transmit(images, "conditional-generation", seeds), seeds, pixels)

    def conditional_reconstruction(
        self, images: Float[Tensor, "b c h w"], seeds: Int64[Tensor, " b"] | None = None, pixels: Pixels = "mean"
    ) -> Float[Tensor, "b c h w"]:
        """Fig. 3iii: y_K and all z_k are sent."""
        return self.decode_from(self.transmit(images, "conditional-reconstruction", seeds), seeds, pixels)

    def reconstruction_1(
        self, images: Float[Tensor, "b c h w"], seeds: Int64[Tensor, " b"] | None = None, pixels: Pixels = "mean"
    ) -> Float[Tensor, "b c h w"]:
        """Fig. 3iv: u is sent; the rest is generated down from it."""
        return self.decode_from(self.transmit(images, "reconstruction-1", seeds), seeds, pixels)

    def reconstruction_2(
        self, images: Float[Tensor, "b c h w"], seeds: Int64[Tensor, " b"] | None = None, pixels: Pixels = "mean"
    ) -> Float[Tensor, "b c h w"]:
        """Fig. 3v: u and all z_k are sent."""
        return self.decode_from(self.transmit(images, "reconstruction-2", seeds), seeds, pixels)

    def bits_sent(self, sent: Transmitted) -> float:
        """Bits of what is sent of one image, as it is: no entropy coding."""
        latents = [*sent.z, *(() if sent.u is None else (sent.u,))]
        of_y = 0.0 if sent.y is None else sent.y[0].numel() * math.log2(self.forms[-1].bins)
        return of_y + SENT_BITS * sum(each[0].numel() for each in latents)

    def compression_ratio(self, sent: Transmitted, images: Float[Tensor, "b c h w"]) -> float:
        """How many times more bits the images' 8-bit values are; infinite where nothing is sent."""
        bits = self.bits_sent(sent)
        return 8 * images[0].numel() / bits if bits else math.inf

    def says_all(self, sent: Transmitted) -> bool:
        """Whether no latents are left to draw."""
        return len(sent.z) == self.top and (sent.u is not None or sent.y is not None)

    def init_from_data(self, images: Float[Tensor, "b c h w"]) -> None:
        """See `start_from_data`."""
        start_from_data(self, lambda: self(images[:START_IMAGES]))

    def recomputable(self) -> list[nn.Module]:
        """Every dense block, and the couplings' networks."""
        return [*(module for module in self.modules() if isinstance(module, DenseBlock)), *self.flow.networks()]

    @torch.no_grad()
    def reconstructions(self, images: Float[Tensor, "b c h w"]) -> dict[str, Float[Tensor, "b c h w"]]:
        """See `Tokenizer.reconstructions`: each way to make images, and what is sent of one."""
        seeds, found = row_seeds(0, torch.arange(len(images), device=images.device)), {}
        for mode in self.modes:
            sent = self.transmit(images, mode, seeds)
            ratio = f", {self.compression_ratio(sent, images):.3g}:1" if MODES[mode] else ""
            found[f"{mode}{ratio}"] = self.decode_from(sent, seeds)
        return found

    @staticmethod
    def _taken(gaussian: Gaussian, seeds: Tensor | None, *stream: int) -> Tensor:
        return gaussian.mean if seeds is None else gaussian.sample(derive(seeds, *stream))
