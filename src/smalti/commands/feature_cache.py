"""What frozen layers make of the images that the layer on top of them trains on: computed once, not at every step."""

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
"""Features that take more memory are computed at every step."""
_AT_ONCE = 256


class GivenRows(Dataset):
    """Rows of images, and in their batches `given`, the features of each."""

    def __init__(self, rows: ImageRows, given: Float[Tensor, "n c h w"]) -> None:
        self._rows, self._given = rows, given

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        """See `ImageRows`."""
        batch = self._rows.__getitems__(rows)
        return {**batch, "given": self._given[batch["rows"]]}


@torch.no_grad()
def with_given(below: HQA, rows: ImageRows, process: Accelerator) -> ImageRows | GivenRows:
    """The rows with what the layers below make of them, in the arithmetic of the training; as they are, if that takes
    more than `MOST_BYTES`.

    Args:
        below: the layers below.
        rows: what the layer on top trains on; nothing changes them from step to step.
        process: whose arithmetic that is, and whose device.
    """
    (level,) = below.layout.levels
    shape = (len(rows), below.config.code_width, level.height, level.width)
    if torch.Size(shape).numel() * 4 > MOST_BYTES:
        return rows
    given, network = torch.empty(shape), below.to(process.device).eval()
    with bar(what="features", total=len(rows), unit="image", shown=process.is_main_process) as progress:
        for chosen in torch.arange(len(rows)).split(_AT_ONCE):
            images = to_float(rows.__getitems__(chosen.tolist())["images"]).to(process.device)
            with process.autocast():
                given[chosen] = network.features(images).cpu()
            progress.update(len(chosen))
    return GivenRows(rows, given)
