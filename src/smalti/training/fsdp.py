"""Models split among processes by FSDP2: each holds a part of every weight, gradient, average and optimiser state.

What a tensor is where it is split, and what is read of Accelerate's configuration, is known here alone. Elsewhere a
process holds all of the model, and everything here leaves tensors as they are.
"""

import warnings
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from smalti.core.distributed import total
from smalti.core.errors import UserError


def refuse_engines() -> None:
    """Tells those who launch with DeepSpeed or Megatron-LM what to launch with.

    Raises:
        UserError: if Accelerate's environment asks for either.
    """
    for engine, flag in (("DeepSpeed", "ACCELERATE_USE_DEEPSPEED"), ("Megatron-LM", "ACCELERATE_USE_MEGATRON_LM")):
        if parse_flag_from_env(flag):
            raise UserError(
                f"{engine} brings a training loop of its own, which smalti does not run; to split the model among "
                "processes give Accelerate a configuration with distributed_type: FSDP and fsdp_version: 2"
            )


def plan(accelerator: Accelerator) -> FullyShardedDataParallelPlugin | None:
    """How Accelerate's configuration splits models; None where every process holds the whole.

    Raises:
        UserError: for settings that smalti does not follow.
    """
    if accelerator.num_processes == 1 or not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    from torch.distributed.fsdp import CPUOffloadPolicy

    # on CPUs Accelerate forgets what it read from the environment, which still says it
    plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise UserError("of FSDP smalti knows the second version; set fsdp_version: 2 in Accelerate's configuration")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise UserError("smalti keeps its part of a split model on the device; set fsdp_offload_params: false")
    if plugin.activation_checkpointing:
        raise UserError("set fsdp_activation_checkpointing: false and give --gradient-checkpointing, which does that")
    return plugin


def shard(
    objective: nn.Module,
    blocks: Sequence[nn.Module],
    param_groups: Sequence[dict[str, Any]],
    how: FullyShardedDataParallelPlugin,
) -> None:
    """Splits an objective, the same on all processes, in place; its optimiser, still without state, goes with it.

    Parameters stay float32 whatever the precision of the networks, which autocast sees to: in half precision codebooks
    would lose codes.

    Args:
        objective: put together for its forward and backward pass as a whole, but for the blocks. If on the CPU, it goes
            to the device block by block.
        blocks: within it, put together one at a time.
        param_groups: the optimiser's.
        how: whether blocks are taken apart again between forward and backward.
    """
    from torch.distributed.fsdp import fully_shard

    # a block's output, often a view, goes into a sum: never changed in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    for parameter in objective.parameters():
        parameter.data = parameter.data.contiguous()  # it splits no others, such as channels_last's
    apart_between = bool(how.reshard_after_forward)  # a word, as the type allows, is of FSDP's first version only
    for block in blocks:
        fully_shard(block, reshard_after_forward=apart_between)
    fully_shard(objective)
    parts = dict(objective.named_parameters())
    for group in param_groups:
        group["params"] = [parts[names[id(parameter)]] for parameter in group["params"]]


def is_split(module: nn.Module) -> bool:
    """Whether `shard` split it."""
    return hasattr(module, "unshard")


def _is_part(value: object) -> TypeGuard[Any]:
    """Whether it is a DTensor; that module takes a second to import, so this file does it only where it splits."""
    return hasattr(value, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory."""
    return tensor.to_local() if _is_part(tensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """All parts of a tensor together, on every process; all must ask for it."""
    return tensor.full_tensor() if _is_part(tensor) else tensor


@torch.no_grad()
def gathered(tree: Any, *, keep: bool) -> Any:
    """A nest of tensors with those that are split made whole, on the CPU; all processes must ask for it.

    Args:
        tree: dictionaries and lists.
        keep: whether this process wants it; to the others it is of no use.
    """

    def gather(value: Any) -> Any:
        if not _is_part(value):
            return value
        together = value.full_tensor()  # one at a time: the device may not hold them all
        return together.cpu() if keep else None

    return tree_map(gather, tree)


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, the same on every process, what this process holds of another one; all, where it holds all."""
    if not _is_part(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.contiguous(), like.device_mesh, like.placements, src_data_rank=None).to_local()


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of a whole tensor, the same on every process, as another one is: its device, its parts, and its order in
    memory, which fused optimisers take for the parameter's.
    """
    copy = torch.empty_like(like, requires_grad=False)
    local(copy).copy_(share(tensor, like))
    return copy


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The length of all tensors together, over all parts."""
    norm = nn.utils.get_total_norm([local(tensor) for tensor in tensors])
    if any(_is_part(tensor) for tensor in tensors):
        norm = total(norm.square()).sqrt()
    return norm
