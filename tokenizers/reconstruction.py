"""The loss of a tokenizer that is trained by its own terms alone (the VQ-VAE family)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smalti.images.decoding import to_float
from smalti.tokenizers.base import Tokenizer


def logged_mse(reconstruction: Float[Tensor, "b c h w"], images: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """The squared error in [0, 1] units, as papers report it, of what decoding gives; without gradient."""
    return (reconstruction.detach().clamp(-1, 1) - images).square().mean() / 4


class Reconstruction(nn.Module):
    """The sum of a tokenizer's losses on a batch of images (HR-VQVAE, Eq. 5).

    Logs each term, and where there is a reconstruction its `mse`, see `logged_mse`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, batch: dict[str, Tensor]) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss, and scalars to log, of a batch whose `images` are uint8 `(b, c, h, w)`.

        And in it, where frozen layers make them (`Tokenizer.build_on`) and they are known, `given`: their features.
        """
        images = to_float(batch["images"])
        known = {"given": batch["given"]} if "given" in batch else {}
        output = self.tokenizer(images, *(batch[name] for name in self.tokenizer.uses), **known)
        loss = torch.stack(list(output.losses.values())).sum()
        terms = {} if output.reconstruction is None else {"mse": logged_mse(output.reconstruction, images)}
        return loss, terms | {name: value.detach() for name, value in output.losses.items()}
