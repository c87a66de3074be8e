"""FSDP2: models sharded among processes, each with a shard of every weight, gradient, average and optimizer state.

Only this file handles sharded tensors and reads Accelerate's FSDP configuration. Without FSDP every process holds the
whole model, and the functions here return tensors unchanged.
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
    """Refuses launches with DeepSpeed or Megatron-LM.

    Raises:
        UserError: if Accelerate's environment asks for either; recommends FSDP.
    """
    for engine, flag in (("DeepSpeed", "ACCELERATE_USE_DEEPSPEED"), ("Megatron-LM", "ACCELERATE_USE_MEGATRON_LM")):
        if parse_flag_from_env(flag):
            raise UserError(
                f"{engine} has its own training loop, which smalti does not run; to shard the model among processes "
                "give Accelerate a configuration with distributed_type: FSDP and fsdp_version: 2"
            )


def fsdp_plugin(accelerator: Accelerator) -> FullyShardedDataParallelPlugin | None:
    """Returns Accelerate's FSDP settings; None if every process holds the whole model.

    Raises:
        UserError: for settings that smalti does not support.
    """
    if accelerator.num_processes == 1 or not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    from torch.distributed.fsdp import CPUOffloadPolicy

    # on CPUs Accelerate drops the plugin it made from the environment, so it is made again
    plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise UserError("smalti supports FSDP version 2 only; set fsdp_version: 2 in Accelerate's configuration")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise UserError("smalti keeps the shards on the device; set fsdp_offload_params: false")
    if plugin.activation_checkpointing:
        raise UserError("set fsdp_activation_checkpointing: false and give --gradient-checkpointing instead")
    if accelerator.scaler is not None:  # GradScaler checks each process's shards alone, so the scales would diverge
        raise UserError("--precision fp16 does not work with FSDP; use bf16 or fp32")
    return plugin


def shard(
    objective: nn.Module,
    blocks: Sequence[nn.Module],
    param_groups: Sequence[dict[str, Any]],
    plugin: FullyShardedDataParallelPlugin,
) -> None:
    """Shards an objective in place, together with its optimizer, which has no state yet.

    Parameters stay float32 in mixed precision, where autocast converts them: in half precision codebooks would lose
    codes.

    Args:
        objective: equal on all processes. Everything outside the blocks is gathered for the whole forward and backward
            pass. If it is on the CPU, it moves to the device block by block.
        blocks: modules within it that are gathered one at a time.
        param_groups: the optimizer's.
        plugin: sets whether blocks are sharded again between forward and backward pass.
    """
    from torch.distributed.fsdp import fully_shard

    # a block's output, often a view, goes into a sum and is never changed in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    for parameter in objective.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 shards no other layout, such as channels_last
    reshard_after_forward = bool(plugin.reshard_after_forward)  # the type also allows words, which are FSDP1's
    for block in blocks:
        fully_shard(block, reshard_after_forward=reshard_after_forward)
    fully_shard(objective)
    shards = dict(objective.named_parameters())
    for group in param_groups:
        group["params"] = [shards[names[id(parameter)]] for parameter in group["params"]]


def is_sharded(module: nn.Module) -> bool:
    """Returns whether `shard` was applied to the module."""
    return hasattr(module, "unshard")


def _is_dtensor(value: object) -> TypeGuard[Any]:
    """Returns whether a value is a sharded tensor (DTensor), without importing its module, which takes a second."""
    return hasattr(value, "full_tensor")


def local_shard(tensor: Tensor) -> Tensor:
    """Returns this process's shard of a tensor, sharing its memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if _is_dtensor(tensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """Gathers a sharded tensor on every process. All processes must call it."""
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor


@torch.no_grad()
def gather_full(tree: Any, *, keep: bool) -> Any:
    """Gathers every sharded tensor in nested dictionaries and lists onto the CPU. All processes must call it.

    Args:
        tree: the dictionaries and lists.
        keep: whether this process needs the result; others get None for sharded tensors.
    """

    def gather(value: Any) -> Any:
        if not _is_dtensor(value):
            return value
        gathered = value.full_tensor()  # one at a time: the device may not have room for all
        return gathered.cpu() if keep else None

    return tree_map(gather, tree)


def shard_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns this process's shard of `tensor`, sharded like `like`; `tensor` itself if `like` is not sharded.

    `tensor` must be full, and equal on all processes.
    """
    if not _is_dtensor(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.contiguous(), like.device_mesh, like.placements, src_data_rank=None).to_local()


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Copies a full tensor to the device, sharding and memory layout of `like`.

    Fused optimizers need their states in the parameter's memory layout. `tensor` must be equal on all processes.
    """
    copy = torch.empty_like(like, requires_grad=False)
    local_shard(copy).copy_(shard_of(tensor, like))
    return copy


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the norm of all tensors together, over all shards."""
    norm = nn.utils.get_total_norm([local_shard(tensor) for tensor in tensors])
    if any(_is_dtensor(tensor) for tensor in tensors):
        norm = total(norm.square()).sqrt()
    return norm
