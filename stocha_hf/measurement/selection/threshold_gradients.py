"""Groups of projections that read one input, cut at thresholds that have a gradient: what learned.py trains.

The forward pass cuts hard. In the backward pass the step at a threshold t is a sigmoid of (log|x| - log t) / WIDTH, so
t feels the entries near it. Thresholds are kept as logarithms, one for each input; `fold` leaves one threshold
a group, and moves the differences into the weights. Training cuts by SeenCut (training/learned_inputs.py).

    groups = groups_of(model, [(rows, at)], 0.5)    # at the thresholds that cut half of these inputs
    with cutting(groups, at):
        model(rows)                                 # and each group's `kept` is what it read
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from stocha_hf.cuts import SHARED
from stocha_hf.measurement.blocks import Block, blocks, in_float32
from stocha_hf.measurement.selection.distributions import Distribution, watching
from stocha_hf.measurement.selection.input_scales import inputs_of, scale_inputs, spread_over_heads

WIDTH = 0.3  # of the sigmoid, in log|x|


@dataclass
class Group:
    """Projections of a block that read one input: the logarithms of its thresholds, and what it last kept."""

    block: Block
    names: tuple[str, ...]
    logs: nn.Parameter  # float32 [inputs], of o_proj [key heads * head size]
    weight: float  # share of all projections' weights
    kept: torch.Tensor = field(default_factory=lambda: torch.ones(()))  # mean share of its inputs, with a gradient
    last: tuple[Any, Any] = (None, None)  # an input, and what was left of it: the projections read the same one

    def limits(self) -> torch.Tensor:
        return spread_over_heads(self.block, self.logs) if self.names == ("o_proj",) else self.logs


def groups_of(model: Any, passes: list[tuple[torch.Tensor, torch.Tensor]], share: float) -> list[Group]:
    """Return every group, at the threshold that cuts the share of its inputs on these windows."""
    found, now = blocks(model), passes[0][1]
    total = sum(linear.weight.numel() for block in found for linear in block.linears.values())
    places = [(block, names, Distribution()) for block in found for names in SHARED]
    watched = [(block.linears[names[0]], lambda x, seen=seen: seen.add(x[now].abs())) for block, names, seen in places]
    with torch.no_grad(), watching(watched):
        for rows, now in passes:  # noqa: B007 - which the functions above read
            model(rows, use_cache=False, logits_to_keep=1)
    groups = []
    for block, names, seen in places:
        start = math.log(max(seen.quantile(share), 1e-6))
        logs = nn.Parameter(torch.full((inputs_of(block, names),), start, device=now.device))
        size = sum(block.linears[name].weight.numel() for name in names)
        groups.append(Group(block, names, logs, size / total))
    return groups


class _Cut(torch.autograd.Function):
    """Inputs x [windows, length, inputs] above their limit, and the mean share of them at the tokens that are cut.

    A function of its own, since autograd would keep nine tensors of x's size in float32 where this keeps x.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, limits: torch.Tensor, at: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, limits, at)
        above = x.float().abs().log() > limits
        kept = (above & at[..., None]).sum() / (at.sum() * x.shape[-1])
        return torch.where(above | ~at[..., None], x, 0), kept

    @staticmethod
    def backward(ctx: Any, *of: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, limits, at = ctx.saved_tensors
        of_cut, of_kept = of[0].float(), of[1] / (at.sum() * x.shape[-1])
        above, slope = _near(x, limits, at)
        pull = (of_cut * x + of_kept) * slope
        return _of_input(x, of_cut, pull, above, at), -pull.sum((0, 1)), None


class SeenCut(torch.autograd.Function):
    """Inputs x above their limit, as _Cut leaves them, for a loss that does not know what reading costs.

    What would read more or less comes out as the gradients of `more` and `seen` [inputs], whose values are not used:
    by how much all entries together would be more for a logarithm that is smaller, and how many there are. So passes
    add up, one that is computed again for its backward is counted once, and the price is set when all have been.
    They are two and not one stack: inductor's mix_order_reduction, for large batches on a GPU, gives each sum a buffer
    of its own, and returns the stack's unwritten.

    `paid` says at which tokens reading counts: at those that are cut, and where a step is computed again without;
    None: at those that are cut. (A compiler does not take one tensor for two arguments.)
    Tokens may add to all limits, `logs` [windows, length, 1]; the gradient of `fewer`, of that shape, is by how much
    what a token reads grows with them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        limits: torch.Tensor,
        more: torch.Tensor,
        seen: torch.Tensor,
        logs: torch.Tensor | None,
        fewer: torch.Tensor | None,
        at: torch.Tensor,
        paid: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, limits, logs, at, paid)
        limits = limits if logs is None else limits + logs
        return torch.where((x.float().abs().log() > limits) | ~at[..., None], x, 0)

    @staticmethod
    def backward(ctx: Any, *of: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, limits, logs, at, paid = ctx.saved_tensors
        paid = at if paid is None else paid
        of_cut = of[0].float()
        above, slope = _near(x, limits if logs is None else limits + logs, paid)
        pull = of_cut * x * slope * at[..., None]
        kept = (above & paid[..., None]).float()
        of_logs = of_fewer = None
        if logs is not None:
            of_logs, of_fewer = -pull.sum(-1, keepdim=True), -slope.sum(-1, keepdim=True)
        of_x = _of_input(x, of_cut, pull, above, at)
        return of_x, -pull.sum((0, 1)), slope.sum((0, 1)), kept.sum((0, 1)), of_logs, of_fewer, None, None


def _near(x: torch.Tensor, limits: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which entries are above their limits, and the slope of the sigmoid there at some tokens."""
    above = x.float().abs().log() - limits
    soft = torch.sigmoid(above / WIDTH)
    return above > 0, soft * (1 - soft) / WIDTH * at[..., None]


def _of_input(
    x: torch.Tensor, of_cut: torch.Tensor, pull: torch.Tensor, above: torch.Tensor, at: torch.Tensor
) -> torch.Tensor:
    """The gradient of the inputs themselves, which a pull on their logarithms moves too."""
    value = x.float()
    of_x = torch.where(above | ~at[..., None], of_cut, 0) + pull / value.masked_fill(value == 0, math.inf)
    return of_x.to(x.dtype)


@contextmanager
def cutting(groups: list[Group], at: torch.Tensor) -> Iterator[None]:
    """Inside, the groups' projections leave out what is at most its threshold, at the tokens that `at` says."""

    def cut(args: tuple[torch.Tensor, ...], group: Group) -> tuple[torch.Tensor, ...]:
        if group.last[0] is not args[0]:
            left, group.kept = _Cut.apply(args[0], group.limits(), at)
            group.last = args[0], left
        return group.last[1], *args[1:]

    hooks = [
        group.block.linears[name].register_forward_pre_hook(lambda module, args, group=group: cut(args, group))
        for group in groups
        for name in group.names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for group in groups:
            group.last = (None, None)


@torch.no_grad()
def meet(model: Any, groups: list[Group], passes: list[tuple[torch.Tensor, torch.Tensor]], share: float) -> None:
    """Multiply all thresholds by one factor, with which so much is read of these rows."""
    tokens = sum(int(at.sum()) for _, at in passes)

    def read() -> float:
        total = 0.0
        for rows, at in passes:
            with cutting(groups, at):
                model(rows, use_cache=False, logits_to_keep=1)
            total += int(at.sum()) / tokens * sum(group.weight * float(group.kept) for group in groups)
        return total

    low, high, now = -1.0, 1.0, 0.0
    for _ in range(10):
        middle = (low + high) / 2
        for group in groups:
            group.logs.add_(middle - now)
        now = middle
        low, high = (middle, high) if read() > 1 - share else (low, middle)


@torch.no_grad()
def fold(groups: list[Group]) -> dict[str, list[float]]:
    """Scale each group's inputs so that one threshold is left, and return these."""
    found: dict[str, list[float]] = {}
    for first in range(0, len(groups), len(SHARED)):
        of_block = groups[first : first + len(SHARED)]
        with in_float32(of_block[0].block.module):
            for group in of_block:
                common = group.logs.mean()
                scale_inputs(group.block, group.names, (group.logs - common).exp())
                for name in group.names:
                    found.setdefault(name, []).append(common.exp().item())
    return found
