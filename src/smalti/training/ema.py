"""EMA: the exponential moving average of a model's weights, which is what is saved and evaluated."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from smalti.training.fsdp import local_shard, split_like


class EMA:
    """Updates theta_ema <- d theta_ema + (1 - d) theta, with d = min(decay, (1 + step) / (10 + step)).

    The smaller d of early steps lets a short run forget its initial weights. Integer buffers are copied. With a `decay`
    of 0 there is no average, and the model itself is saved.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Updates the average with the weights after step `step`."""
        if not self.decay:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        state = self.model.state_dict()
        floats = [name for name, tensor in state.items() if tensor.is_floating_point()]
        mix = get_ema_multi_avg_fn(decay)  # one kernel for all tensors
        mix([local_shard(self.average[name]) for name in floats], [local_shard(state[name]) for name in floats], step)
        for name in state.keys() - set(floats):
            self.average[name].copy_(state[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Gives the model the averaged weights within the block."""
        if not self.decay:
            yield
            return
        raw = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        try:
            yield
        finally:
            self.model.load_state_dict(raw)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the average, for the snapshot; sharded if the model is."""
        return self.average

    def load_state_dict(self, average: dict[str, Tensor]) -> None:
        """Restores the average from full (not sharded) tensors."""
        assert average.keys() == self.average.keys()
        self.average = {name: split_like(tensor, self.average[name]) for name, tensor in average.items()}
