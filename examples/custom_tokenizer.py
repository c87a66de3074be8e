"""A tokenizer of your own, made a kind by one class and a decorator: FSQ (arXiv 2309.15505) on a small autoencoder.

$ python examples/custom_tokenizer.py
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smalti import Codes, Layout, Level, Tokenizer, TokenizerOutput
from smalti.commands.build_latents import BuildLatents, build_latents
from smalti.commands.train_tokenizer import TrainTokenizer, train_tokenizer
from smalti.core.codes import Digits, chosen_digits
from smalti.core.models import register
from smalti.training.config import FitConfig


@dataclass(frozen=True)
class FSQConfig:
    """Flags of the command line and fields of `config.json`."""

    height: int = 32
    width: int = 32
    levels: tuple[int, ...] = (7, 5, 5, 5)


@register
class FSQ(Tokenizer):
    """Each number of a code vector is bounded and rounded to one of a few levels; the levels are a code's digits."""

    kind: ClassVar[str] = "fsq"
    config_class: ClassVar[type] = FSQConfig
    image_channels, downsampling = 3, 4

    def __init__(self, config: FSQConfig) -> None:
        super().__init__(config)
        k = len(config.levels)
        self.encoder = nn.Sequential(nn.Conv2d(3, 64, 4, 4), nn.GELU(), nn.Conv2d(64, k, 1))
        self.decoder = nn.Sequential(nn.Conv2d(k, 64, 3, 1, 1), nn.GELU(), nn.ConvTranspose2d(64, 3, 4, 4))
        self.register_buffer("middle", torch.tensor([(n - 1) / 2 for n in config.levels]).view(1, k, 1, 1))

    @property
    def layout(self) -> Layout:
        """One grid of codes, whose radices are the levels."""
        return Layout((Level(self.config.height // 4, self.config.width // 4, self.config.levels),))

    def rounded(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k y x"]:
        """Levels of images, centred on zero; gradients pass straight through the rounding."""
        bounded = torch.tanh(self.encoder(images)) * self.middle
        return bounded + (bounded.round() - bounded).detach()

    def encode(self, images: Float[Tensor, "b c h w"]) -> Codes:  # noqa: D102 - as in Tokenizer
        return (self.layout.levels[0].join((self.rounded(images) + self.middle).round().long().movedim(1, -1)),)

    def decode(self, codes: Codes, digits: Digits | None = None) -> Float[Tensor, "b c h w"]:  # noqa: D102
        values = self.layout.levels[0].split(codes[0]).movedim(-1, 1) - self.middle
        chosen = chosen_digits(digits, values.shape[1])
        kept = values.new_tensor([[[index in chosen]] for index in range(values.shape[1])])
        return self.decoder(values * kept).clamp(-1, 1)

    def forward(self, images: Float[Tensor, "b c h w"]) -> TokenizerOutput:  # noqa: D102
        reconstruction = self.decoder(self.rounded(images))
        return TokenizerOutput(reconstruction, self.encode(images), {"mse": F.mse_loss(reconstruction, images)})


def main(out: Path = Path("runs/fsq"), images: str = "emoji", steps: int = 500) -> Path:
    """Trains it and stores the codes of its images; returns the latent set, on which a prior can be trained."""
    fit = FitConfig(steps=steps, batch_size=32)
    folder = train_tokenizer(TrainTokenizer(FSQConfig(), fit=fit, tokenizer="fsq", images=images, out=out))
    return build_latents(BuildLatents(tokenizer=str(folder), images=images, out=out / "latents.h5"))


if __name__ == "__main__":
    main()
