"""How different two images look: a distance of the features of a trained network, with gradients."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from smalti.errors import UserError
from smalti.extractors import lite0_network

TAPS = (0, 2, 4, 10)  # the last blocks at 1/2, 1/4, 1/8 and 1/16 of the image's size
SMALLEST = 16  # pixels


class PerceptualDistance:
    """As LPIPS (arXiv 1801.03924, Eq. 1) without learned weights, on the features of EfficientNet-Lite0.

    At four scales the features of a position are scaled to length 1; their squared distances, means over positions and
    scales, are from 0 to 4. Not a module: it has nothing to train, to save or to share among processes.

    Raises:
        UserError: if the extra `metrics` is not installed.
    """

    def __init__(self) -> None:
        self._network = lite0_network(torch.device("cpu"))

    def __call__(self, images: Float[Tensor, "b c h w"], others: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
        """The mean distance of images to others, grey or colour, in [-1, 1]; gradients reach both."""
        self._network.to(images.device)
        pairs = zip(self._features(images), self._features(others), strict=True)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).mean()

    def check_size(self, height: int, width: int) -> None:
        """Refuses images of which there would be nothing left at the coarsest scale.

        Raises:
            UserError: so.
        """
        if min(height, width) < SMALLEST:
            raise UserError(
                f"images of {height}x{width} are too small for the perceptual loss; give --perceptual-weight 0"
            )

    def _features(self, images: Tensor) -> list[Tensor]:
        network, found = self._network, []
        x = (images.expand(-1, 3, -1, -1) * 127.5 + 0.5) / 128  # pixels of 0 to 255 less 127, over 128
        x = network._swish(network._bn0(network._conv_stem(x)))
        for number, block in enumerate(network._blocks[: TAPS[-1] + 1]):
            x = block(x)
            if number in TAPS:
                found.append(F.normalize(x.float(), dim=1, eps=1e-6))
        return found
