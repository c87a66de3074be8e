"""The training objective of tokenizers whose loss is the sum of their own terms, such as the VQ-VAE family.

VQ-GAN's objectives, with perceptual and adversarial losses, are in `vqgan/losses.py`.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smalti.images.decoding import to_float
from smalti.tokenizers.base import Tokenizer


def logged_mse(reconstruction: Float[Tensor, "b c h w"], images: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Returns the mean squared error of the clamped reconstruction, in [0, 1] units, without gradient."""
    return (reconstruction.detach().clamp(-1, 1) - images).square().mean() / 4


class Reconstruction(nn.Module):
    """Objective: the sum of a tokenizer's loss terms on a batch of images (HR-VQVAE, Eq. 5).

    Logs each term and, if the tokenizer computes reconstructions, their `mse` (see `logged_mse`).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, batch: dict[str, Tensor]) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Returns the loss and the scalars to log.

        Args:
            batch: `images`, uint8 `(b, c, h, w)`; the entries that `Tokenizer.uses` names; and, if they are cached,
                `features`, the features of the frozen layers below the one in training (`Tokenizer.build_on`).
        """
        images = to_float(batch["images"])
        cached = {"features": batch["features"]} if "features" in batch else {}
        output = self.tokenizer(images, *(batch[name] for name in self.tokenizer.uses), **cached)
        loss = torch.stack(list(output.losses.values())).sum()
        terms = {} if output.reconstruction is None else {"mse": logged_mse(output.reconstruction, images)}
        return loss, terms | {name: value.detach() for name, value in output.losses.items()}
