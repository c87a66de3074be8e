"""How different two images look: a distance of the features of a trained network, with gradients, by its name."""

import warnings
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from smalti.core.errors import UserError
from smalti.metrics.extractors import lite0_network

PerceptualName: TypeAlias = Literal["lite0", "lpips-vgg"]

TAPS = (0, 2, 4, 10)  # the last blocks at 1/2, 1/4, 1/8 and 1/16 of the image's size
SMALLEST = 16  # pixels: what both networks see last is at 1/16


class PerceptualDistance(ABC):
    """A distance of images. Not a module: it has nothing to train, to save or to share among processes.

    Attributes:
        name: of the distance, on the command line.
    """

    name: ClassVar[PerceptualName]

    def __init__(self, network: Any) -> None:
        self._network = network  # frozen, in evaluation mode

    def __call__(self, images: Float[Tensor, "b c h w"], others: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
        """The mean distance of images to others, grey or colour, in [-1, 1]; gradients reach both."""
        self._network.to(images.device)
        return self.distance(images.expand(-1, 3, -1, -1), others.expand(-1, 3, -1, -1))

    @abstractmethod
    def distance(self, images: Float[Tensor, "b 3 h w"], others: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
        """The same of colour images, with the network on their device."""


class Lite0Distance(PerceptualDistance):
    """As LPIPS (arXiv 1801.03924, Eq. 1) without learned weights, on the features of EfficientNet-Lite0.

    At four scales the features of a position are scaled to length 1; their squared distances, means over positions and
    scales, are from 0 to 4.

    Raises:
        UserError: if the extra `metrics` is not installed.
    """

    name = "lite0"

    def __init__(self) -> None:
        super().__init__(lite0_network(torch.device("cpu")))

    def distance(self, images: Float[Tensor, "b 3 h w"], others: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
        """See `PerceptualDistance`."""
        pairs = zip(self._features(images), self._features(others), strict=True)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).mean()

    def _features(self, images: Tensor) -> list[Tensor]:
        network, found = self._network, []
        x = (images * 127.5 + 0.5) / 128  # pixels of 0 to 255 less 127, over 128
        x = network._swish(network._bn0(network._conv_stem(x)))
        for number, block in enumerate(network._blocks[: TAPS[-1] + 1]):
            x = block(x)
            if number in TAPS:
                found.append(F.normalize(x.float(), dim=1, eps=1e-6))
        return found


class VGGDistance(PerceptualDistance):
    """LPIPS (arXiv 1801.03924, Eq. 1) on VGG-16, version 0.1 of its learned weights: the VQ-GAN paper's.

    Network and learned weights are those of the package lpips; VGG's own, half a gigabyte, are downloaded at first
    use. At five scales the features of a position are scaled to length 1, and the squared differences of each channel
    weighted; means over positions, summed over scales, from 0. In float32, whatever the autocast.

    Deviation, the package's own: weights multiply the squares, where Eq. 1 squares them too.

    Raises:
        UserError: if the extra `lpips` is not installed or torchvision does not fit torch, or VGG's weights are not
            there and cannot be downloaded.
    """

    name = "lpips-vgg"

    def __init__(self) -> None:
        super().__init__(_lpips_network())

    def distance(self, images: Float[Tensor, "b 3 h w"], others: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
        """See `PerceptualDistance`."""
        with torch.autocast(images.device.type, enabled=False):
            return self._network(images.float(), others.float()).mean()


def find_perceptual(name: PerceptualName) -> PerceptualDistance:
    """A distance by its name.

    Raises:
        UserError: as each of them does.
    """
    return {kind.name: kind for kind in (Lite0Distance, VGGDistance)}[name]()


def check_size(height: int, width: int) -> None:
    """Refuses images of which there would be nothing left at the coarsest scale.

    Raises:
        UserError: so.
    """
    if min(height, width) < SMALLEST:
        raise UserError(f"images of {height}x{width} are too small for the perceptual loss; give --perceptual-weight 0")


def _lpips_network() -> Any:
    """The network of lpips with all its weights, frozen, in evaluation mode."""
    try:  # pyright does not find them, as `make setup` leaves this extra out
        import lpips  # pyright: ignore[reportMissingImports]
        from torchvision.models import VGG16_Weights  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        raise UserError(
            f"--perceptual lpips-vgg needs lpips, and the torchvision that fits torch {torch.__version__} ({error}): "
            "pip install 'smalti[lpips]', in a checkout pip install -e '.[lpips]'; or take --perceptual lite0"
        ) from error
    url = VGG16_Weights.IMAGENET1K_V1.url
    try:
        weights = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: what came has another digest
        raise UserError(
            f"the weights of VGG-16 cannot be downloaded ({error}): let --perceptual lpips-vgg reach the network once, "
            f"or put {url} into {torch.hub.get_dir()}/checkpoints; or take --perceptual lite0"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision as it was long ago
        # a random trunk, filled below, as lpips would run any pickle that it downloads
        network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    trunk = network.net  # its layers are VGG's, numbered alike, in five slices
    trunk.load_state_dict({name: weights[f"features.{name.partition('.')[2]}"] for name in trunk.state_dict()})
    return network.eval().requires_grad_(False)
