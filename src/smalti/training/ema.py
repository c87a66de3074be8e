"""The moving average of a model's weights: what is saved and sampled from, while training moves the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from smalti.training.fsdp import local, split_like


class EMA:
    """theta_ema <- d theta_ema + (1 - d) theta, with d = min(decay, (1 + step) / (10 + step)).

    So a short run forgets its start. Integer buffers are copied. A `decay` of 0 keeps no average: the model itself is
    what is saved.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after step `step`."""
        if not self.decay:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        state = self.model.state_dict()
        floats = [name for name, tensor in state.items() if tensor.is_floating_point()]
        mix = get_ema_multi_avg_fn(decay)  # all tensors in one kernel
        mix([local(self.average[name]) for name in floats], [local(state[name]) for name in floats], step)
        for name in state.keys() - set(floats):
            self.average[name].copy_(state[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model has the averaged weights."""
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
        """The average, for resuming; split where the model is."""
        return self.average

    def load_state_dict(self, average: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`, from whole tensors."""
        assert average.keys() == self.average.keys()
        self.average = {name: split_like(tensor, self.average[name]) for name, tensor in average.items()}
