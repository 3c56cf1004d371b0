"""Learn a threshold for each input of each projection by gradient, and fold them into the model's weights.

Allotting shares by curves (output_shares.py) cuts one input of a block at a time and adds up what that does. Here all
are cut at once, and thresholds follow the gradient of the predictions' divergence from the uncut model's, plus a price
times the bytes read. The forward pass cuts hard. In the backward pass the step at a threshold t is a sigmoid of
(log|x| - log t) / WIDTH, so t feels the entries near it. The price rises while more is read than was asked for.

No weight is trained. When it is done, each projection keeps one threshold, and the differences between its inputs
become scales that input_scales.py moves into the weights around it: the model computes what it did, up to rounding.

    cuts = learn_input_cuts(model, windows, 0.5)     # scales the model's weights
    patch(model, StochaConfig(activation="silu", inputs=cuts))
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from stocha_hf.cuts_stocha import cut_projections
from stocha_hf.errors import StochaError
from stocha_hf.measurement.blocks import Block, blocks
from stocha_hf.measurement.evaluation import check_vocabulary
from stocha_hf.measurement.selection.distributions import input_distributions
from stocha_hf.measurement.selection.input_scales import SHARED, inputs_of, scale_inputs, spread_over_heads
from stocha_hf.spec import InputCuts, is_number

STEPS, RATE = 140, 0.02  # of Adam on the logarithms of thresholds
WIDTH = 0.3  # of the sigmoid, in log|x|
UNCUT = 8  # a window's first part, of so many, that is computed in full and has no loss, as a prompt
STIFF = 20.0  # how much reading all bytes too many raises their price at once, beside what adds up
CHUNK = 256  # tokens whose predictions are compared at a time


@dataclass
class Group:
    """Projections of a block that read one input: the logarithms of its thresholds, and what it last kept."""

    block: Block
    names: tuple[str, ...]
    logs: nn.Parameter  # [inputs], of o_proj [key heads * head size]
    weight: float  # share of all projections' weights
    kept: torch.Tensor = field(default_factory=lambda: torch.ones(()))  # mean share of its inputs, with a gradient

    def limits(self) -> torch.Tensor:
        return spread_over_heads(self.block, self.logs) if self.names == ("o_proj",) else self.logs


def learn_input_cuts(
    model: Any, windows: torch.Tensor, share: float, *, steps: int = STEPS, batch: int = 16, **fields: Any
) -> InputCuts:
    """Learn which inputs to cut, all layers at once; the model's weights are scaled in place.

    Args:
        model: A CausalLM of a known architecture that does not cut its inputs, in eval mode.
        windows: Token ids, int64 [windows, length], of text as the model will meet it.
        share: Of the weights of all projections, that are not to be read, between 0 and 1.
        steps: Of the optimizer.
        batch: Windows a step; at most as many as there are.
        **fields: More of InputCuts.

    Returns:
        One threshold a projection, for the model as it is now.

    Raises:
        StochaError: the model cuts already or is quantized, the share is not between 0 and 1, there is no window, a
            token id is beyond the vocabulary, or what the model computes is not finite.
    """
    _check(model, windows, share)
    device = next(model.parameters()).device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    groups = _groups(model, windows, share)
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([group.logs for group in groups], lr=RATE, betas=(0.9, 0.95))
    price = 1.0
    try:
        for step in tqdm(range(steps), desc="Learning thresholds", unit="step", disable=None, leave=False):
            rows = windows[torch.randperm(len(windows), generator=order)[:batch]].to(device)
            for setting in optimizer.param_groups:
                setting["lr"] = RATE * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
            over = 0.0
            for row in rows:  # one at a time, as memory is what a head of many words takes
                over += _learn(model, groups, row[None], share, price, len(rows)) / len(rows)
            price = max(0.0, price + over)
            optimizer.step()
            optimizer.zero_grad()
        _meet(model, groups, windows[:batch].to(device), share)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return InputCuts(_fold(groups), share=share, **fields)


def _check(model: Any, windows: torch.Tensor, share: float) -> None:
    if cut_projections(model):
        raise StochaError("the model cuts its inputs already: expected one that does not; call stocha_hf.unpatch")
    if others := {
        type(x).__name__ for block in blocks(model) for x in block.linears.values() if type(x) is not nn.Linear
    }:
        raise StochaError(
            f"the model's projections are {', '.join(sorted(others))}: expected Linear, in full precision"
        )
    if not is_number(share) or not 0 < share < 1:
        raise StochaError(f"the share of weights not to read is {share!r}: expected a share between 0 and 1")
    if not len(windows):
        raise StochaError("there are no windows: expected at least one window of text to learn from")
    check_vocabulary(model.config, windows)


def _groups(model: Any, windows: torch.Tensor, share: float) -> list[Group]:
    """Every group, at the threshold that cuts the share of its inputs."""
    seen, found = input_distributions(model, windows), blocks(model)
    total = sum(linear.weight.numel() for block in found for linear in block.linears.values())
    device = next(model.parameters()).device
    groups = []
    for row, block in zip(seen, found, strict=True):
        for names in SHARED:
            start = math.log(max(row[names[0]].radius(share), 1e-6))
            logs = nn.Parameter(torch.full((inputs_of(block, names),), start, device=device))
            size = sum(block.linears[name].weight.numel() for name in names)
            groups.append(Group(block, names, logs, size / total))
    return groups


def _learn(model: Any, groups: list[Group], row: torch.Tensor, share: float, price: float, rows: int) -> float:
    """Add one window's gradient; returns by how much more is read than is to be."""
    start = row.shape[1] // UNCUT
    with torch.no_grad():
        aims = model(row, use_cache=False).logits[0, start:]
    with cutting(groups, start):
        logits = model(row, use_cache=False).logits[0, start:]
        read = torch.stack([group.weight * group.kept for group in groups]).sum()
    over = float(read.detach()) - (1 - share)
    parts = [
        F.kl_div(a.float().log_softmax(-1), b.float().log_softmax(-1), reduction="sum", log_target=True)
        for a, b in zip(logits.split(CHUNK), aims.split(CHUNK), strict=True)
    ]
    loss = torch.stack(parts).sum() / len(logits)
    if not loss.isfinite():
        raise StochaError(
            "the model's predictions are not finite on the windows: expected finite ones; check its weights"
        )
    ((loss + (price + STIFF * over) * read) / rows).backward()
    return over


@contextmanager
def cutting(groups: list[Group], start: int) -> Iterator[None]:
    """Inside, the groups' projections leave out what is at most its threshold, from position `start` on."""

    def cut(args: tuple[torch.Tensor, ...], group: Group) -> tuple[torch.Tensor, ...]:
        x = args[0]
        above = x.float().abs().clamp(min=1e-12).log() - group.limits()
        soft = torch.sigmoid(above / WIDTH)
        keep = (above > 0).float() + soft - soft.detach()
        group.kept = keep[:, start:].mean()
        whole = torch.ones_like(keep[:, :start])
        return x * torch.cat([whole, keep[:, start:]], 1).to(x.dtype), *args[1:]

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


@torch.no_grad()
def _meet(model: Any, groups: list[Group], rows: torch.Tensor, share: float) -> None:
    """Multiply all thresholds by one factor, with which so much is read of these rows."""

    def read() -> float:
        total = 0.0
        for row in rows:
            with cutting(groups, len(row) // UNCUT):
                model(row[None], use_cache=False, logits_to_keep=1)
            total += sum(group.weight * float(group.kept) for group in groups)
        return total / len(rows)

    low, high, now = -1.0, 1.0, 0.0
    for _ in range(10):
        middle = (low + high) / 2
        for group in groups:
            group.logs.add_(middle - now)
        now = middle
        low, high = (middle, high) if read() > 1 - share else (low, middle)


@torch.no_grad()
def _fold(groups: list[Group]) -> dict[str, list[float]]:
    """Scale each group's inputs so that one threshold is left, and return these."""
    found: dict[str, list[float]] = {}
    for group in groups:
        common = group.logs.mean()
        scale_inputs(group.block, group.names, (group.logs - common).exp())
        for name in group.names:
            found.setdefault(name, []).append(common.exp().item())
    return found
