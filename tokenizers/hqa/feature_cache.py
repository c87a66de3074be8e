"""The feature cache of HQA, which is trained layer by layer.

The layers below the one in training are frozen, so their features of each image are computed once
instead of at every step.
"""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from smalti.core.progress import bar
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows
from smalti.tokenizers.hqa.hqa import HQA
from smalti.training.batches import Batch

MOST_BYTES = 2**30
"""Features that take more memory than this are computed at every step."""
_BATCH_SIZE = 256


class RowsWithFeatures(Dataset):
    """Rows of images whose batches also hold `features`, the cached features of each image."""

    def __init__(self, rows: ImageRows, features: Float[Tensor, "n c h w"]) -> None:
        self._rows, self._features = rows, features

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        """Returns a batch; see `ImageRows`."""
        batch = self._rows.__getitems__(rows)
        return {**batch, "features": self._features[batch["rows"]]}


@torch.no_grad()
def with_feature_cache(lower: HQA, rows: ImageRows, process: Accelerator) -> ImageRows | RowsWithFeatures:
    """Adds the features of the frozen `lower` layers to `rows`, in the training's precision.

    Returns `rows` unchanged if the features would take more than `MOST_BYTES`.

    Args:
        lower: the frozen layers.
        rows: the training images; they must not change from step to step.
        process: sets precision and device.
    """
    first_image = to_float(rows.__getitems__([0])["images"]).to(lower.device)
    shape = (len(rows), *lower.eval().features(first_image).shape[1:])
    if torch.Size(shape).numel() * 4 > MOST_BYTES:
        return rows
    features, network = torch.empty(shape), lower.to(process.device)
    with bar(what="features", total=len(rows), unit="image", shown=process.is_main_process) as progress:
        for indices in torch.arange(len(rows)).split(_BATCH_SIZE):
            images = to_float(rows.__getitems__(indices.tolist())["images"]).to(process.device)
            with process.autocast():
                features[indices] = network.features(images).cpu()
            progress.update(len(indices))
    return RowsWithFeatures(rows, features)
