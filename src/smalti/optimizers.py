"""What runs are optimised with: AdamW, as the papers do, or Muon on linear layers beside AdamW on the rest."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

OptimizerName: TypeAlias = Literal["adamw", "muon"]

BETAS = (0.9, 0.95)  # AdamW's; the second below torch's 0.999, which remembers longer than a short run lasts
MUON_TIMES = 5.0  # Muon's rate, as a multiple of AdamW's beside it


class Together:
    """Several optimisers, each over parameters of its own, as one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parts."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """One step of each part."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The parts' states, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)


Optimizer: TypeAlias = torch.optim.Optimizer | Together
"""What the training loop steps and saves."""


def make_optimizer(
    module: nn.Module, name: OptimizerName, *, learning_rate: float, weight_decay: float = 0.0
) -> Optimizer:
    """An optimiser over a module's parameters, with weight decay on matrices and larger only.

    `muon` orthogonalises the momentum of every `nn.Linear`'s weight (arXiv 2502.16982, whose scaling lets one rate
    serve all shapes), at `MUON_TIMES` the rate; embeddings, tables, convolutions, norms and biases stay with AdamW.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if name == "adamw":
        return _adamw(trained, learning_rate, weight_decay)
    linear = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Linear)}
    matrices = [parameter for parameter in trained if id(parameter) in linear]
    rest = [parameter for parameter in trained if id(parameter) not in linear]
    parts: list[torch.optim.Optimizer] = [_adamw(rest, learning_rate, weight_decay)] if rest else []
    if matrices:
        rate = MUON_TIMES * learning_rate
        parts.append(torch.optim.Muon(matrices, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    return Together(parts)


def _adamw(parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=True)
