"""Perceptual distances between images: differentiable distances of the features of a trained network, by name."""

import warnings
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from smalti.core.config import require_choice
from smalti.core.errors import UserError
from smalti.images.decoding import visible
from smalti.metrics.extractors import lite0_network

PerceptualName: TypeAlias = Literal["lite0", "lpips-vgg"]

TAPS = (0, 2, 4, 10)  # Lite0's last blocks at 1/2, 1/4, 1/8 and 1/16 of the image's size
SMALLEST = 16  # pixels: the coarsest features of both networks are at 1/16 of the image's size


class PerceptualDistance(ABC):
    """Distance between images. Not a module: it has nothing to train, to save or to share among processes.

    Attributes:
        name: name of the distance on the command line.
    """

    name: ClassVar[PerceptualName]

    def __init__(self, network: Any) -> None:
        self._network = network  # frozen, in evaluation mode

    def __call__(self, images: Float[Tensor, "b c h w"], others: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
        """Returns the mean distance between two batches of images in [-1, 1], grey or colour; both get gradients.

        Of images with alpha or more channels, it is the distance of the channels that pictures show.
        """
        self._network.to(images.device)
        return self.distance(*(visible(each).expand(-1, 3, -1, -1) for each in (images, others)))

    @abstractmethod
    def distance(self, images: Float[Tensor, "b 3 h w"], others: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
        """Returns the mean distance between two batches of colour images, with the network on their device."""


class Lite0Distance(PerceptualDistance):
    """LPIPS (arXiv 1801.03924, Eq. 1) without learned weights, on the features of EfficientNet-Lite0.

    The features of each position are scaled to length 1 at four scales. The distance is the mean over positions and
    scales of their squared differences, from 0 to 4.

    Raises:
        UserError: if the extra `metrics` is not installed.
    """

    name = "lite0"

    def __init__(self) -> None:
        super().__init__(lite0_network(torch.device("cpu")))

    def distance(self, images: Float[Tensor, "b 3 h w"], others: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
        """Returns the mean over scales; see `PerceptualDistance`."""
        pairs = zip(self._features(images), self._features(others), strict=True)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).mean()

    def _features(self, images: Tensor) -> list[Tensor]:
        network, features = self._network, []
        x = (images * 127.5 + 0.5) / 128  # (pixels from 0 to 255 - 127) / 128
        x = network._swish(network._bn0(network._conv_stem(x)))
        for number, block in enumerate(network._blocks[: TAPS[-1] + 1]):
            x = block(x)
            if number in TAPS:
                features.append(F.normalize(x.float(), dim=1, eps=1e-6))
        return features


class VGGDistance(PerceptualDistance):
    """LPIPS (arXiv 1801.03924, Eq. 1) on VGG-16, with version 0.1 of its learned weights, as in the VQ-GAN paper.

    Network and learned weights come from the package lpips. VGG-16's own weights, half a gigabyte, are downloaded at
    first use. The features of each position are scaled to length 1 at five scales. The distance is the weighted squared
    difference, averaged over positions and summed over scales, at least 0. Computed in float32 under autocast.

    Deviation of the package: weights multiply the squared differences, whereas Eq. 1 squares the weights too.

    Raises:
        UserError: if the extra `lpips` is not installed, torchvision does not fit torch, or VGG's weights cannot be
            downloaded.
    """

    name = "lpips-vgg"

    def __init__(self) -> None:
        super().__init__(_lpips_network())

    def distance(self, images: Float[Tensor, "b 3 h w"], others: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
        """Returns LPIPS, computed in float32; see `PerceptualDistance`."""
        with torch.autocast(images.device.type, enabled=False):
            return self._network(images.float(), others.float()).mean()


def find_perceptual(name: PerceptualName) -> PerceptualDistance:
    """Returns the distance of a name.

    Raises:
        UserError: as the distance's class does, or if there is no such name.
    """
    require_choice("perceptual", name, PerceptualName)
    return {kind.name: kind for kind in (Lite0Distance, VGGDistance)}[name]()


def check_size(height: int, width: int, remedy: str) -> None:
    """Refuses images that are too small for the coarsest features.

    Args:
        height: of the images, in pixels.
        width: of the images, in pixels.
        remedy: what to do instead, for the message.

    Raises:
        UserError: if height or width is below `SMALLEST`.
    """
    if min(height, width) < SMALLEST:
        raise UserError(f"images of {height}x{width} are too small for a perceptual distance; {remedy}")


def _lpips_network() -> Any:
    """Returns lpips' network with all its weights, frozen, in evaluation mode."""
    try:  # pyright does not find these packages: `make setup` does not install this extra
        import lpips  # pyright: ignore[reportMissingImports]
        from torchvision.models import VGG16_Weights  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision for another torch
        raise UserError(
            f"--perceptual lpips-vgg needs lpips and a torchvision that fits torch {torch.__version__} ({error}): "
            "pip install -e '.[lpips]' in a checkout; or use --perceptual lite0"
        ) from error
    url = VGG16_Weights.IMAGENET1K_V1.url
    try:
        weights = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: wrong digest
        raise UserError(
            f"the weights of VGG-16 cannot be downloaded ({error}): run once with network access, or put {url} into "
            f"{torch.hub.get_dir()}/checkpoints; or use --perceptual lite0"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips uses deprecated arguments of torchvision
        # random weights, replaced below: lpips itself would unpickle a download without checks
        network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    trunk = network.net  # VGG's layers, with the same numbers, in five slices
    trunk.load_state_dict({name: weights[f"features.{name.partition('.')[2]}"] for name in trunk.state_dict()})
    return network.eval().requires_grad_(False)
