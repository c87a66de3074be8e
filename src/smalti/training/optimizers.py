"""What runs are optimised with: AdamW, as most papers do, Muon on linear layers beside AdamW on the rest, or AdaMax."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from smalti.core.devices import has_native_bf16
from smalti.training.fsdp import full, local, share, split_like, total_norm

OptimizerName: TypeAlias = Literal["adamw", "muon", "adamax"]

BETAS = (0.9, 0.95)  # AdamW's; the second below torch's 0.999, which remembers longer than a short run lasts
ADAMAX_BETAS = (0.9, 0.999)  # the paper's (arXiv 1412.6980)
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


class BatchedMuon(torch.optim.Muon):
    """Torch's Muon with `match_rms_adamw`, whose matrices of one shape are orthogonalised together.

    Transformers have many small layers of few shapes: on one core 14 ms a step for the demonstration's prior, which
    torch's takes 30 for. States are torch's.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step of every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            shapes: defaultdict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for parameter in trained:
                rows, columns = parameter.shape
                shapes[min(rows, columns), max(rows, columns)].append(parameter)
            for (_, columns), parameters in shapes.items():
                updates = _wide([full(momentum) for momentum in self._momenta(parameters, group["momentum"])])
                updates = orthogonalized(updates, group["ns_coefficients"], group["ns_steps"], group["eps"])
                rate = group["lr"] * 0.2 * math.sqrt(columns)  # arXiv 2502.16982, Eq. 4
                for parameter, update in zip(parameters, updates, strict=True):
                    tall = parameter.shape[0] > parameter.shape[1]
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    local(parameter).add_(share(update.T if tall else update, parameter), alpha=-rate)

    def _momenta(self, parameters: list[Tensor], momentum: float) -> Sequence[Tensor]:
        """Nesterov's: the gradients led towards their running means, which this moves on."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        means = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        # torch has these but does not export them to type checkers
        torch._foreach_lerp_(means, gradients, 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]
        return torch._foreach_lerp(gradients, means, momentum)  # pyright: ignore[reportPrivateImportUsage]


def orthogonalized(
    matrices: Float[Tensor, "b r c"], coefficients: tuple[float, float, float], steps: int, eps: float
) -> Float[Tensor, "b r c"]:
    """Nearly the nearest matrices with orthonormal rows (r <= c), by Newton-Schulz iterations.

    In bf16, which is exact enough, where it is fast; else in fp32: for 256 rows of 720 on a CPU without AMX, 29 ms in
    place of 730.
    """
    x = matrices.bfloat16() if has_native_bf16(matrices.device.type) else matrices.float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _wide(matrices: Sequence[Tensor]) -> Tensor:
    """One batch of matrices and transposes of matrices, with at least as many columns as rows."""
    return torch.stack([matrix.T if matrix.shape[0] > matrix.shape[1] else matrix for matrix in matrices])


Optimizer: TypeAlias = torch.optim.Optimizer | Together
"""What the training loop steps and saves."""


def restore(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """The inverse of `state_dict`, from whole tensors; also where the optimiser's own are split."""
    if isinstance(optimizer, Together):
        for part, of_part in zip(optimizer.parts, saved["parts"], strict=True):
            restore(part, of_part)
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            name: split_like(v, parameters[index]) if v.shape == parameters[index].shape else v
            for name, v in of.items()
        }
        for index, of in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})


def clip(parameters: Sequence[nn.Parameter], longest: float) -> Float[Tensor, ""]:
    """Shortens the gradients, taken together, to a length of `longest`; the length that they had."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = total_norm(gradients)
    if norm.device.type != "cpu" or norm > longest:
        # torch has it but does not export it to type checkers
        torch._foreach_mul_(  # pyright: ignore[reportPrivateImportUsage]
            [local(gradient) for gradient in gradients], (longest / (norm + 1e-6)).clamp(max=1)
        )
    return norm


def step_unless(optimizer: Optimizer, bad: Bool[Tensor, ""]) -> None:
    """A step, unless `bad` is true: then parameters and state stay as they are. Waits for no device."""
    if bad.device.type == "cpu":
        if not bad:
            optimizer.step()
        return
    for part in optimizer.parts if isinstance(optimizer, Together) else [optimizer]:
        step_unless_on_device(part, bad)


def step_unless_on_device(optimizer: torch.optim.Optimizer, bad: Bool[Tensor, ""]) -> None:
    """`step_unless` without a look at `bad`: told to the fused kernels, which know how; undone elsewhere.

    Deviation: Adamax counts its steps on the CPU, where a bad one counts too, which its bias correction sees.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = bad.float()  # pyright: ignore[reportAttributeAccessIssue] - how torch's scaler tells them
        optimizer.step()
        return

    def held() -> list[Tensor]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        states = (value for p in parameters for value in optimizer.state.get(p, {}).values())
        return [*parameters, *(value for value in states if isinstance(value, Tensor) and value.device == bad.device)]

    before = {tensor: tensor.detach().clone() for tensor in held()}
    optimizer.step()
    with torch.no_grad():
        for tensor in held():  # what the first step made starts again from zero
            old = before[tensor] if tensor in before else torch.zeros_like(tensor)
            tensor.copy_(torch.where(bad, old, tensor))


def make_optimizer(
    module: nn.Module,
    name: OptimizerName,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = BETAS,
) -> Optimizer:
    """An optimiser over a module's parameters, with weight decay on matrices and larger only.

    `muon` orthogonalises the momentum of every `nn.Linear`'s weight (arXiv 2502.16982, whose scaling lets one rate
    serve all shapes), at `MUON_TIMES` the rate; embeddings, tables, convolutions, norms and biases stay with AdamW.
    `adamax` has betas of its own, and its weight decay is torch's, a penalty in the gradient.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if name == "adamax":
        groups = _groups(trained, weight_decay)
        return torch.optim.Adamax(groups, lr=learning_rate, betas=ADAMAX_BETAS)
    if name == "adamw":
        return _adamw(trained, learning_rate, weight_decay, betas)
    linear = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Linear)}
    matrices = [parameter for parameter in trained if id(parameter) in linear]
    rest = [parameter for parameter in trained if id(parameter) not in linear]
    parts: list[torch.optim.Optimizer] = [_adamw(rest, learning_rate, weight_decay, betas)] if rest else []
    if matrices:
        rate = MUON_TIMES * learning_rate
        parts.append(BatchedMuon(matrices, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    return Together(parts)


def _adamw(
    parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    return torch.optim.AdamW(_groups(parameters, weight_decay), lr=learning_rate, betas=betas, fused=True)


def _groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and larger, with decay; the rest, without."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
