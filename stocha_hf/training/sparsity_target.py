"""Steering the share of zeros while training, by a progressive L1 penalty on the hidden vectors.

This is the progressive L1 of ProSparse (Song et al., arXiv 2402.13516) with a controller in place of its hand-set
stages: the user names the share of zeros, the coefficient follows from what is measured. The penalty is not a term of
the loss but its gradient, added where the hidden vector's gradient passes. So there are no side tensors, and nothing
that activation checkpointing, accumulation, DDP, FSDP or torch.compile could lose. What it costs in quality depends on
model, data and target: compare tasks before and after.

    target = SparsityTarget(model, 0.8)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from stocha_hf.errors import StochaError
from stocha_hf.models import patched_layers


class _AddL1Gradient(torch.autograd.Function):
    """The identity; its backward adds weight / M * sign(hidden) to the gradient, M being hidden's last dimension."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        hidden, weight = ctx.saved_tensors
        return grad + hidden.sign() * (weight / hidden.shape[-1]), None


class SparsityTarget:
    """Steers the share of zeros of `model` to `target` while it trains, by an L1 penalty on the hidden vectors.

    The gradient that training gets is that of

        loss + coefficient * sum over layers of the mean over tokens and neurons of |hidden|

    when `loss` is a mean over tokens, and set_tokens was told how many tokens one optimizer step averages. The penalty
    sees every position, also those without a label. It is silent in eval() mode and without gradients. L1 makes zeros
    and cannot take them away: a model that has more than `target` keeps what training leaves it. Set `resting` while
    an activation without such zeros runs, as SiLU does: there is no penalty then, and `update` is not to be called.

    `update` moves `coefficient` so that the measured share follows half a cosine from its first value to `target`,
    reached after `ramp` of the training that is left at the first update; give it 20 updates or more. Raises
    StochaError for a target outside (0, 1), for a model without patched layers, and in forward for float16, whose loss
    scaling would not reach the penalty.
    """

    START = 0.1  # the coefficient at first
    LIMITS = (1e-4, 1e3)  # of the coefficient; at the lower one the penalty is as good as off
    INTEGRAL, PROPORTIONAL = 600.0, 20.0  # e-folds per unit of error and of training; e-folds per unit of error
    STEP = 1.0  # e-folds that one update may move

    def __init__(self, model: nn.Module, target: float, ramp: float = 0.8) -> None:
        if not 0 < target < 1:
            raise StochaError(f"the sparsity target is {target}: expected a share of zeros between 0 and 1")
        self.target, self.ramp = target, ramp
        self.coefficient = self.START
        self.resting = False
        self._first: tuple[float, float] | None = None  # progress and share at the first update
        self._last = (0.0, 0.0)  # progress and error at the last one
        self._weight = torch.zeros(())
        self._layers = patched_layers(model)
        self._hooks = [layer.down_proj.register_forward_pre_hook(self._penalise) for layer in self._layers]

    def _penalise(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        hidden = args[0]
        if not (module.training and torch.is_grad_enabled()):
            return None
        if hidden.dtype == torch.float16:
            raise StochaError("a sparsity target does not work in float16: train in bfloat16 or float32")
        return _AddL1Gradient.apply(hidden, self._weight), *args[1:]

    def set_tokens(self, tokens: torch.Tensor | float) -> None:
        """Say before each forward over how many tokens the loss is averaged in the optimizer step this one belongs to.

        That is Trainer's num_items_in_batch, divided by the number of ranks where DDP or FSDP average gradients.
        """
        device = next(self._layers[0].parameters()).device
        if self._weight.device != device:
            self._weight = self._weight.to(device)
        coefficient = 0.0 if self.resting else self.coefficient
        self._weight.copy_(coefficient / torch.as_tensor(tokens, dtype=torch.float32))

    def wanted(self, progress: float) -> float:
        """The share of zeros that the trajectory asks for at `progress` (0 to 1) of training."""
        begin, share = self._first or (progress, self.target)
        done = min(max((progress - begin) / max(self.ramp * (1 - begin), 1e-9), 0.0), 1.0)
        return self.target - (1 + math.cos(math.pi * done)) / 2 * max(self.target - share, 0.0)

    def update(self, progress: float, measured: float) -> None:
        """Move the coefficient, given the share of zeros now (the same on all ranks); call it every few steps."""
        if self._first is None:
            self._first, self._last = (progress, measured), (progress, 0.0)
        error = self.wanted(progress) - measured
        before, last_error = self._last
        move = self.INTEGRAL * error * (progress - before) + self.PROPORTIONAL * (error - last_error)
        low, high = self.LIMITS
        self.coefficient = min(max(self.coefficient * math.exp(min(max(move, -self.STEP), self.STEP)), low), high)
        self._last = (progress, error)

    def state_dict(self) -> dict[str, Any]:
        """All that `update` goes by, for JSON."""
        return {"coefficient": self.coefficient, "first": self._first, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.coefficient = state["coefficient"]
        self._first = state["first"] and tuple(state["first"])
        self._last = tuple(state["last"])

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
