"""Optimizers: AdamW, AdaMax, or Muon on linear layers and convolutions; gradient clipping and skipped steps."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from smalti.core.devices import has_native_bf16
from smalti.core.errors import UserError
from smalti.training.fsdp import full, local_shard, shard_of, split_like, total_norm

OptimizerName: TypeAlias = Literal["adamw", "muon", "adamax"]

BETAS = (0.9, 0.95)  # of AdamW; with torch's 0.999 the second moment would average over more steps than a short run has
ADAMAX_BETAS = (0.9, 0.999)  # the paper's (arXiv 1412.6980)
MUON_RATE_FACTOR = 5.0  # Muon's learning rate, as a multiple of AdamW's
MUON: dict[str, Any] = {
    "momentum": 0.95,
    "nesterov": True,
    "eps": 1e-7,
    "adjust_lr_fn": "match_rms_adamw",
}
"""The settings of Muon, `torch.optim.Muon`'s defaults but for the last."""
TURNS = 2
"""Steps in which Muon updates each matrix once, at as many times the rate. Momentum is updated in every step."""
QUERIES_AND_KEYS = frozenset({"to_q", "to_k"})
"""Names of the maps to queries and keys in x-transformers. AdamW trains them no worse than Muon and in less time, as
arXiv 2509.26030 found for language models. Our causal attention has one map to queries, keys and values."""
NEWTON_SCHULZ = (
    (8.2809, -23.9612, 17.4066),
    (3.9757, -2.9047, 0.5401),
    (3.1838, -1.9926, 0.3340),
    (2.4523, -1.7752, 0.4178),
)
"""Coefficients of x, x^3 and x^5 of each Newton-Schulz iteration, by which Muon orthogonalizes.

As in Polar Express (arXiv 2505.16932), each polynomial is the one whose largest distance from 1 is smallest where the
iterations before it take singular values of 0.0035 to 1, here with 1 % above for rounding, and 10 % for the third one,
which follows two at once (`orthogonalized`). The four together take these to 0.81 ... 1.19.
"""
FP32_UP_TO = 32
"""Matrices with at most this many rows, or columns, are computed in fp32, which costs little and rounds less."""
TWO_FROM_ASPECT = 2
"""Matrices whose longer side is at least this many times the shorter one take two iterations at once."""


class CombinedOptimizer:
    """Several optimizers, each over its own parameters, used as one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all parts."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """Takes one step of each part."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Returns the parts' states, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}


class BatchedMuon(torch.optim.Optimizer):
    """Muon (arXiv 2502.16982), orthogonalizing weights of one shape as a batch.

    Its steps and states are those of `torch.optim.Muon` with `match_rms_adamw`, but for the iterations (see
    `orthogonalized`). Besides matrices it takes the kernels of convolutions, as matrices of output channels by
    everything else. A batch is about twice as fast for networks with many small layers of few shapes.

    Deviation: each step updates only every second weight, in turn, at twice the rate (`TURNS`), which halves the cost.

    Args:
        parameters: weights with at least two dimensions.
        lr: the learning rate.
        weight_decay: decoupled weight decay.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "turn": 0, **MUON})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores the state; that of an older version has no turns."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("turn", 0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - as torch's own
        """Updates the momentum of every weight that has a gradient, and the weights whose turn it is."""
        assert closure is None
        for group in self.param_groups:
            if trained := [parameter for parameter in group["params"] if parameter.grad is not None]:
                self._update_momentum(trained, group["momentum"])
            shapes: defaultdict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for parameter in group["params"][group["turn"] :: TURNS]:
                if parameter.grad is not None:
                    shapes[_matrix_shape(parameter)].append(parameter)
            lr = TURNS * group["lr"]
            for (rows, columns), parameters in shapes.items():
                momenta = [full(momentum).flatten(1) for momentum in self._nesterov(parameters, group["momentum"])]
                updates = orthogonalized(momenta, group["eps"])
                rate = lr * 0.2 * math.sqrt(max(rows, columns))  # arXiv 2502.16982, Eq. 4
                for parameter, update in zip(parameters, updates, strict=True):
                    if group["weight_decay"]:
                        parameter.mul_(1 - lr * group["weight_decay"])
                    local_shard(parameter).add_(shard_of(update.view(parameter.shape), parameter), alpha=-rate)
        self.next_turn()

    def next_turn(self) -> None:
        """Makes it the next weights' turn, after a step or one that was skipped."""
        for group in self.param_groups:
            group["turn"] = (group["turn"] + 1) % TURNS

    def _update_momentum(self, parameters: list[Tensor], momentum: float) -> None:
        """Moves the momentum buffers towards the gradients."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        # torch has it but does not export it to type checkers
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            *self._buffers_and_gradients(parameters), 1 - momentum
        )

    def _nesterov(self, parameters: list[Tensor], momentum: float) -> Sequence[Tensor]:
        """Returns Nesterov momentum, the gradients moved towards the momentum buffers."""
        buffers, gradients = self._buffers_and_gradients(parameters)
        # torch has it but does not export it to type checkers
        return torch._foreach_lerp(gradients, buffers, momentum)  # pyright: ignore[reportPrivateImportUsage]

    def _buffers_and_gradients(self, parameters: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return [self.state[parameter]["momentum_buffer"] for parameter in parameters], gradients


def _matrix_shape(weight: Tensor) -> tuple[int, int]:
    """Returns rows and columns of a weight as a matrix of outputs by everything else."""
    return weight.shape[0], math.prod(weight.shape[1:])


def orthogonalized(matrices: Sequence[Float[Tensor, "r c"]], eps: float) -> Float[Tensor, "b r c"]:
    """Approximates the nearest matrices with orthonormal rows, or columns where these are fewer, by Newton-Schulz.

    It computes in bf16, which is exact enough, if the hardware has it; otherwise in fp32, which is then much faster.
    Small matrices are always computed in fp32. The iterations multiply X by polynomials of its Gram matrix X X^T
    (X^T X where X is tall), which commute. So where rows and columns differ much, two iterations are done on the Gram
    matrix alone, and X is multiplied once by both polynomials. More at once would let rounding grow, in fp32 too: the
    squares in a Gram matrix keep less of the small singular values than X does.

    Deviation from Muon: four iterations with coefficients of their own (`NEWTON_SCHULZ`), not five with the same; and
    the norm of X X^T, not that of X, scales singular values below 1. It is the nearer bound, the fourth root of the sum
    of their fourth powers. Zeros stay zeros; a norm below `eps`, which leaves a small result in Muon, does not here.
    """
    (rows, columns), device = matrices[0].shape, matrices[0].device
    shorter, longer = sorted((rows, columns))
    dtype = torch.bfloat16 if has_native_bf16(device.type) else torch.float32  # of the result
    inner_dtype = torch.float32 if shorter <= FP32_UP_TO else dtype
    x = torch.empty(len(matrices), rows, columns, dtype=inner_dtype, device=device)
    # stacks and converts in one pass, on a GPU in one kernel; torch has it but does not export it to type checkers
    torch._foreach_copy_(list(x), list(matrices))  # pyright: ignore[reportPrivateImportUsage]
    x /= x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)  # the squares of small values would be zero
    together = 2 if longer >= TWO_FROM_ASPECT * shorter else 1
    for first in range(0, len(NEWTON_SCHULZ), together):
        gram = x @ x.mT if rows <= columns else x.mT @ x
        norm = gram.norm(dim=(1, 2), keepdim=True).clamp(min=eps) if first == 0 else gram.new_ones(())
        gram = gram / norm
        factor = _polynomial(gram, *NEWTON_SCHULZ[first])
        product = factor / norm.sqrt()
        for coefficients in NEWTON_SCHULZ[first + 1 : first + together]:
            gram = factor @ gram @ factor
            factor = _polynomial(gram, *coefficients)
            product = factor @ product
        x = product @ x if rows <= columns else x @ product.mT  # rounded, polynomials do not commute
    return x.to(dtype)


def _polynomial(gram: Float[Tensor, "b r r"], a: float, b: float, c: float) -> Float[Tensor, "b r r"]:
    """Returns a + b G + c G^2, by a square: near its minimum large terms would cancel, which bf16 is too coarse for."""
    root = gram.clone()
    root.diagonal(dim1=1, dim2=2).add_(b / (2 * c))
    value = torch.baddbmm(root, root, root, beta=0, alpha=c)
    value.diagonal(dim1=1, dim2=2).add_(a - b * b / (4 * c))
    return value


Optimizer: TypeAlias = torch.optim.Optimizer | CombinedOptimizer
"""An optimizer of the training loop."""


def parts_of(optimizer: Optimizer) -> Sequence[torch.optim.Optimizer]:
    """Returns the parts of a combined optimizer; otherwise the optimizer itself."""
    return optimizer.parts if isinstance(optimizer, CombinedOptimizer) else [optimizer]


def restore(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Restores the state from full tensors, sharding them if the optimizer's own are sharded.

    Raises:
        UserError: for the state of another version, whose optimizer trained other parameters.
    """
    if isinstance(optimizer, CombinedOptimizer):
        for part, saved_part in zip(optimizer.parts, saved["parts"], strict=True):
            restore(part, saved_part)
        return
    counts, before = (
        [len(group["params"]) for group in groups] for groups in (optimizer.param_groups, saved["param_groups"])
    )
    if counts != before:
        raise UserError(
            "the run was begun by another version of smalti, whose optimizer trained other weights; resume it with "
            "that version, or give --resume never to start over"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            name: split_like(v, parameters[index]) if v.shape == parameters[index].shape else v
            for name, v in values.items()
        }
        for index, values in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})


def clip(parameters: Sequence[nn.Parameter], longest: float) -> Float[Tensor, ""]:
    """Clips gradients: scales all together down to a norm of `longest`. Returns the norm they had."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = total_norm(gradients)
    if norm.device.type != "cpu" or norm > longest:
        # torch has it but does not export it to type checkers
        torch._foreach_mul_(  # pyright: ignore[reportPrivateImportUsage]
            [local_shard(gradient) for gradient in gradients], (longest / (norm + 1e-6)).clamp(max=1)
        )
    return norm


def unscale(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
    """Divides the gradients by the loss scale of fp16 and records overflows for `scaler.update`."""
    for part in parts_of(optimizer):
        scaler.unscale_(part)


def step_unless(optimizer: Optimizer, bad: Bool[Tensor, ""]) -> None:
    """Takes a step unless `bad` is true, which leaves parameters and state unchanged. Does not wait for a GPU.

    A skipped step is still a turn of Muon's, since turns are counted on the CPU.
    """
    if bad.device.type == "cpu":
        if not bad:
            optimizer.step()
            return
        for part in parts_of(optimizer):
            if isinstance(part, BatchedMuon):
                part.next_turn()
        return
    for part in parts_of(optimizer):
        step_unless_on_device(part, bad)


def step_unless_on_device(optimizer: torch.optim.Optimizer, bad: Bool[Tensor, ""]) -> None:
    """Does what `step_unless` does without reading `bad` on the CPU.

    Fused kernels skip the step themselves; the step of other optimizers is undone.

    Deviation: Adamax counts its steps on the CPU, so a skipped step still advances its bias correction.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = bad.float()  # pyright: ignore[reportAttributeAccessIssue] - set by torch's GradScaler too
        optimizer.step()
        return

    def tensors() -> list[Tensor]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        states = (value for p in parameters for value in optimizer.state.get(p, {}).values())
        return [*parameters, *(value for value in states if isinstance(value, Tensor) and value.device == bad.device)]

    before = {tensor: tensor.detach().clone() for tensor in tensors()}
    optimizer.step()
    with torch.no_grad():
        for tensor in tensors():  # states that this step created are reset to zero
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
    """Returns an optimizer over a module's parameters, with weight decay only on those of two or more dimensions.

    `muon` orthogonalizes the momentum of the weights of every `nn.Linear` and of every `nn.Conv2d` without groups
    (arXiv 2502.16982, whose scaling makes one rate fit all shapes), at `MUON_RATE_FACTOR` times the rate. AdamW trains
    embeddings, tables, norms and biases. Deviation: it also trains the maps to queries and keys (`QUERIES_AND_KEYS`).
    `adamax` has its own betas, and its weight decay is torch's: a penalty in the gradient.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if name == "adamax":
        groups = _groups(trained, weight_decay)
        return torch.optim.Adamax(groups, lr=learning_rate, betas=ADAMAX_BETAS)
    if name == "adamw":
        return _adamw(trained, learning_rate, weight_decay, betas)
    layers = {
        id(layer.weight)
        for path, layer in module.named_modules()
        if path.rpartition(".")[2] not in QUERIES_AND_KEYS
        and (isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1))
    }
    matrices = [parameter for parameter in trained if id(parameter) in layers]
    rest = [parameter for parameter in trained if id(parameter) not in layers]
    parts: list[torch.optim.Optimizer] = [_adamw(rest, learning_rate, weight_decay, betas)] if rest else []
    if matrices:
        rate = MUON_RATE_FACTOR * learning_rate
        parts.append(BatchedMuon(matrices, lr=rate, weight_decay=weight_decay))
    return CombinedOptimizer(parts)


def _adamw(
    parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    return torch.optim.AdamW(_groups(parameters, weight_decay), lr=learning_rate, betas=betas, fused=True)


def _groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Groups matrices and kernels, with decay, and the rest, without: biases, gains, and limits of shape (c, 1, 1)."""
    decayed, rest = [], []
    for parameter in parameters:
        is_matrix = parameter.ndim == 2 or (parameter.ndim > 2 and parameter[0].numel() > 1)
        (decayed if is_matrix else rest).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
