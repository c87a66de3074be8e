"""The tensors that a causal prior keeps from one position to the next while it decodes code by code."""

from jaxtyping import Float, Int64
from torch import Tensor


class RowCaches:
    """The tensors that `CausalPrior.decode_stepwise` keeps between positions; their first dimension counts the grids.

    With their rows exchanged, decoding continues other grids: a sampler can drop a grid and continue a copy of another.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def zeros(self, like: Tensor, *shape: int) -> Float[Tensor, "b *_rest"]:
        """Returns a tensor of zeros with the dtype and device of `like`, and keeps it."""
        self.keep(tensor := like.new_zeros(shape))
        return tensor

    def keep(self, tensor: Tensor) -> None:
        """Adds a tensor of one row for each grid; the decoder must change it in place only."""
        self._tensors.append(tensor)

    def clear(self) -> None:
        """Forgets all tensors, when the decoder reads none of them any more."""
        self._tensors.clear()

    def take(self, rows: Int64[Tensor, " b"]) -> None:
        """Replaces row i of every tensor by its row `rows[i]`."""
        for tensor in self._tensors:
            tensor.copy_(tensor[rows])
