"""Thresholds of the projections' inputs, calibrated on text: one quantile for all, or allotted within each block.

TEAL (Liu et al., arXiv 2408.14690) leaves a projection's inputs of small magnitude out: y = W (x * [|x| > t]). A step
then reads the other inputs' columns of W. How large t is follows from the share of inputs that is to be left out, and
that share is either the same everywhere, or chosen greedily: a block's projections give up inputs step by step, next
always the one whose loss raises the error of the block's output least for each byte saved, until the block as a whole
reads as much less as was asked for. Every block gets the same share.

    seen = input_distributions(model, windows)
    shares = greedy_shares(model, windows, seen, 0.4)  # or uniform_shares(model, 0.4)
    thresholds(seen, shares)                           # [{"q_proj": 0.31, ...}, ...], a mapping a block
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from stocha_hf.measurement.blocks import PROJECTIONS, Block, blocks
from stocha_hf.measurement.selection.distributions import Distribution
from stocha_hf.progress import Progress

STEP = 0.05  # of a projection's inputs, that a step of the greedy allocation leaves out
MOST = 0.95  # that it leaves out at most
MEASURED_TOKENS = 2048  # on which a block's error is measured, at most


def uniform_shares(model: nn.Module, share: float) -> list[dict[str, float]]:
    """The same share for every projection of every block."""
    return [dict.fromkeys(PROJECTIONS, share) for _ in blocks(model)]


def thresholds(seen: list[dict[str, Distribution]], shares: list[dict[str, float]]) -> list[dict[str, float]]:
    """Each projection's threshold: |x| is at most so large for the share of its inputs that is to be left out."""
    return [
        {name: row[name].radius(share) for name, share in wanted.items()}
        for row, wanted in zip(seen, shares, strict=True)
    ]


@torch.no_grad()
def greedy_shares(
    model: nn.Module,
    windows: torch.Tensor,
    seen: list[dict[str, Distribution]],
    share: float,
    names: Sequence[str] = PROJECTIONS,
) -> list[dict[str, float]]:
    """Allot the inputs that are left out within each block.

    Args:
        model: A causal language model.
        windows: Token ids, int64 [windows, length]; as many of them as hold MEASURED_TOKENS tokens are used.
        seen: The distributions of its projections' inputs.
        share: Of each block's projection weights, that are not to be read: 0 to MOST.
        names: The projections that leave inputs out, and of whose weights this is the share.

    Returns:
        For each block the share of each of these projections' inputs that is left out.
    """
    found: list[dict[str, float]] = []
    hooks = []
    for block, row in zip(blocks(model), seen, strict=True):

        def search(module: Any, args: Any, kwargs: Any, output: Any, block: Block = block, row: Any = row) -> None:
            bar.update()
            again = lambda: _stream(module.forward(*args, **kwargs))  # noqa: E731
            found.append(_within(block, {name: row[name] for name in names}, share, again, _stream(output)))

        hooks.append(block.module.register_forward_hook(search, with_kwargs=True))
    some = spread(windows, MEASURED_TOKENS).to(next(model.parameters()).device)
    try:
        with Progress(total=len(seen), desc="Allotting", unit="block") as bar:
            model(some, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def spread(windows: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return as many of the windows, evenly spaced, as hold so many tokens; at least one."""
    most = max(tokens // windows.shape[1], 1)
    return windows[:: max(len(windows) // most, 1)][:most]


@contextmanager
def cutting(block: Block, limits: dict[str, float], uncut: int = 0) -> Iterator[None]:
    """Leave out the inputs of these projections that are at most so large, by `limits` as they are at each call.

    The first tokens, `uncut` of them, keep all.
    """

    def cut(args: tuple[torch.Tensor, ...], name: str) -> tuple[torch.Tensor, ...]:
        small = args[0].abs() <= limits[name]
        small[:, :uncut] = False
        return args[0].masked_fill(small, 0), *args[1:]

    hooks = [
        block.linears[name].register_forward_pre_hook(lambda module, args, name=name: cut(args, name))
        for name in limits
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _within(
    block: Block, seen: dict[str, Distribution], share: float, again: Callable[[], torch.Tensor], output: torch.Tensor
) -> dict[str, float]:
    """One block's shares. `again` runs the block on the input whose `output` without cuts is given.

    A step's cost, the rise of the squared error for each weight saved, grows as more is cut. So the costs found before
    are a lower bound, and only the projection that seems cheapest is measured again.
    """
    sizes = {name: block.linears[name].in_features * block.linears[name].out_features for name in seen}
    shares, limits = dict.fromkeys(seen, 0.0), dict.fromkeys(seen, 0.0)
    now, left = 0.0, share * sum(sizes.values())

    def step(name: str) -> float:
        return min(STEP, MOST - shares[name], left / sizes[name])

    def error(name: str) -> float:
        """The squared error of the block's output after one more step of this projection."""
        before, limits[name] = limits[name], seen[name].radius(shares[name] + step(name))
        found = (again().float() - output.float()).square().sum().item()
        limits[name] = before
        return found

    costs = dict.fromkeys(seen, -math.inf)  # a weight saved; not measured yet
    with cutting(block, limits):
        while left >= 1 and costs:
            name = min(costs, key=lambda name: costs[name])
            if step(name) * sizes[name] < 1:  # it has no more to give
                del costs[name]
                continue
            after = error(name)
            costs[name] = (after - now) / (step(name) * sizes[name])
            if costs[name] <= min(costs.values()):
                given = step(name)
                shares[name], now, left = shares[name] + given, after, left - given * sizes[name]
                limits[name] = seen[name].radius(shares[name])
    return shares


def _stream(output: Any) -> torch.Tensor:
    """A block's stream: its output, or the first of them."""
    return output[0] if isinstance(output, tuple) else output
