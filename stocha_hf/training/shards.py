"""Clipping and optimizer steps on this rank's shards, under FSDP2; and what a forward without the head leaves.

Gradients, weights and optimizer state are there DTensors of one shard each. Every operation on lists of them is
dispatched in Python, tensor by tensor. That takes longer than the work itself where a model is small, and a GPU waits.
Clipping needs one number of the other ranks, and Adam none. So both run on the plain tensors that DTensors hold,
with the same results.

    steps_on_shards(optimizer)                       # once, before accelerate prepares it
    norm = clip_shards(model.parameters(), 1.0)      # at every step; None: these are not simple shards
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

ELEMENTWISE = (torch.optim.Adam, torch.optim.AdamW)  # others may look at a whole matrix


@torch.no_grad()
def clip_shards(parameters: Iterable[torch.Tensor], most: float) -> torch.Tensor | None:
    """Clip gradients to a norm of `most` over all ranks, in place.

    Returns:
        The norm before, 0-dim, the same on all ranks; None where nothing was done: a gradient is not split along the
        one dimension of the ranks that the others are split along.
    """
    whole = [parameter for parameter in parameters if parameter.grad is not None]
    meshes = {_mesh(parameter.grad) for parameter in whole}
    mesh = meshes.pop() if len(meshes) == 1 else None
    if mesh is None:
        return None
    shards = [_shard(parameter) for parameter in whole]
    square = get_total_norm([shard.grad for shard in shards if shard.grad is not None]).square()
    dist.all_reduce(square, group=mesh.get_group())
    norm = square.sqrt()
    clip_grads_with_norm_(shards, most, norm)
    return norm


def steps_on_shards(optimizer: torch.optim.Optimizer) -> None:
    """Let every step of this optimizer but its first run on plain tensors, where its weights are DTensors by then.

    The first makes its state, as DTensors, which checkpoints are written from. Optimizers that are not ELEMENTWISE
    are left as they are.
    """
    if type(optimizer) not in ELEMENTWISE:
        return
    kept: list[Any] = []

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        groups, state = optimizer.param_groups, optimizer.state
        weights = [weight for group in groups for weight in group["params"] if weight.grad is not None]
        if not weights or not all(_mesh(weight) is not None and state.get(weight) for weight in weights):
            return
        kept.extend((state, [group["params"] for group in groups]))
        optimizer.state = defaultdict(dict)
        with torch.no_grad():
            for group in groups:
                shards = [(weight, _shard(weight)) for weight in group["params"] if weight.grad is not None]
                group["params"] = [shard for _, shard in shards]
                for weight, shard in shards:
                    optimizer.state[shard] = {key: _plain(value) for key, value in state[weight].items()}

    def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if kept:
            optimizer.state, groups = kept
            for group, weights in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = weights
            kept.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def end_forward(model: torch.nn.Module) -> None:
    """Let the next forward gather all weights again, after one that did not call every module of a unit.

    trl's evaluations read the head's weight and do not call the head. PyTorch before 2.13 then waits for that call,
    and leaves the unit's weights sharded in the next training step.
    """
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            getattr(cast(Any, module)._get_fsdp_state(), "_modules_to_run_forward", set()).clear()


def _mesh(tensor: Any) -> Any:
    """The ranks that a tensor is split over, or None where it is whole, or also repeated."""
    mesh = getattr(tensor, "device_mesh", None)
    return mesh if mesh is not None and mesh.ndim == 1 and tensor.placements[0].is_shard() else None


def _plain(value: Any) -> Any:
    return value.to_local() if hasattr(value, "to_local") else value


def _shard(parameter: torch.Tensor) -> torch.Tensor:
    """A plain tensor, with its gradient, that shares this rank's part of a DTensor."""
    shard = _plain(parameter).detach()
    shard.grad = _plain(parameter.grad)
    return shard
