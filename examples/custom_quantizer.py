"""A quantizer of your own in smalti's networks: product quantization, a codebook for each group of channels.

$ python examples/custom_quantizer.py
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.commands.build_latents import BuildLatents, build_latents
from smalti.commands.train_tokenizer import TrainTokenizer, train_tokenizer
from smalti.core.codes import Digits, Level, chosen_digits
from smalti.core.models import register
from smalti.tokenizers.quantizers.linked import QuantizerOutput
from smalti.tokenizers.quantizers.registry import QUANTIZERS, Registered
from smalti.tokenizers.vq.vqvae import VQVAE, VQVAEConfig
from smalti.training.config import FitConfig


class ProductQuantizer(nn.Module):
    """Keeps the contract of `Quantizer`; each digit of a code is the nearest codeword of a group of channels."""

    def __init__(self, *, code_width: int, radices: tuple[int, ...]) -> None:
        super().__init__()
        self.radices, self.level = radices, Level(1, 1, radices)
        self.codebooks = nn.Parameter(torch.randn(len(radices), radices[0], code_width // len(radices)))

    def init_from_data(self, z_e: Float[Tensor, "b d h w"]) -> None:  # noqa: D102 - as in Quantizer
        groups = self.groups(z_e)
        self.codebooks.data = groups[:, torch.linspace(0, groups.shape[1] - 1, self.radices[0]).long()]

    def groups(self, z_e: Float[Tensor, "b d h w"]) -> Float[Tensor, "g n e"]:
        """The vectors of each group, at all positions of all images."""
        return z_e.detach().float().movedim(1, -1).reshape(-1, *self.codebooks.shape[::2]).movedim(1, 0)

    def encode(self, z_e: Float[Tensor, "b d h w"]) -> Int64[Tensor, "b h w"]:  # noqa: D102 - as in Quantizer
        digits = torch.cdist(self.groups(z_e), self.codebooks).argmin(-1)  # g n
        return self.level.join(digits.T.reshape(len(z_e), *z_e.shape[2:], -1))

    def lookup(self, codes: Int64[Tensor, "b h w"], digits: Digits | None = None) -> Float[Tensor, "b d h w"]:  # noqa: D102 - as in Quantizer
        digit, shown = self.level.split(codes).movedim(-1, 0), chosen_digits(digits, len(self.radices))
        parts = [book[digit[i]] * (i in shown) for i, book in enumerate(self.codebooks)]
        return torch.cat(parts, -1).movedim(-1, 1)

    def forward(self, z_e: Float[Tensor, "b d h w"]) -> QuantizerOutput:  # noqa: D102 - as in Quantizer
        z, z_q = z_e.float(), self.lookup(codes := self.encode(z_e))
        losses = {"codebook": (z_q - z.detach()).square().mean(), "commitment": (z - z_q.detach()).square().mean() / 4}
        return QuantizerOutput(z + (z_q - z).detach(), codes, losses)


QUANTIZERS["product"] = Registered(ProductQuantizer, settings={}, starts_from_data=True)


@dataclass(frozen=True)
class ProductVAEConfig(VQVAEConfig):  # noqa: D101 - fields are flags and in config.json
    quantizer: Literal["product"] = "product"
    radices: tuple[int, ...] = (64, 64)  # codewords of each group of channels


@register
class ProductVAE(VQVAE):  # noqa: D101 - VQ-VAE but for its quantizer
    kind: ClassVar[str] = "product-vae"
    config_class: ClassVar[type] = ProductVAEConfig
    radices = property(lambda self: self.config.radices)


def main(out: Path = Path("runs/product"), images: str = "emoji", steps: int = 500) -> Path:
    """Trains it and stores the codes of its images; returns the latent set, on which a prior can be trained."""
    config, fit = ProductVAEConfig(), FitConfig(steps=steps, batch_size=32)
    folder = train_tokenizer(TrainTokenizer(config, fit=fit, tokenizer="product-vae", images=images, out=out))
    return build_latents(BuildLatents(tokenizer=str(folder), images=images, out=out / "latents.h5"))


if __name__ == "__main__":
    main()
