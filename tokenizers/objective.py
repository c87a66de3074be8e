"""The loss of a tokenizer that is trained by its own terms alone (the VQ-VAE family)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smalti.interfaces import Tokenizer
from smalti.preprocess import to_float


class Reconstruction(nn.Module):
    """The sum of a tokenizer's losses on a batch of images (HR-VQVAE, Eq. 5).

    Logs each term, and `mse`: the squared error in [0, 1] units of what decoding gives, as papers report it, where
    there is a reconstruction.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, batch: dict[str, Tensor]) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss, and scalars to log, of a batch whose `images` are uint8 `(b, c, h, w)`."""
        images = to_float(batch["images"])
        output = self.tokenizer(images, *(batch[name] for name in self.tokenizer.uses))
        loss = torch.stack(list(output.losses.values())).sum()
        terms = {}
        if output.reconstruction is not None:
            terms["mse"] = (output.reconstruction.detach().clamp(-1, 1) - images).square().mean() / 4
        return loss, terms | {name: value.detach() for name, value in output.losses.items()}
