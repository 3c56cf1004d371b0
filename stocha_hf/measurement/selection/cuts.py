"""What a method does at one place of a model: InputCut at a projection's input, NeuronCut in a feed-forward layer.

Both answer which entries stay, as a mask of what they are given, whose last axis is the entries' and whose axis before
is the tokens'. applied.py hangs them on a model and counts what they read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from stocha_hf.errors import StochaError

GATE = ("up_proj",)  # of whose rows the dropped neurons' are not read: chosen when the gate is known
BEFORE = ("gate_proj", "up_proj")  # chosen before
AFTER = ()  # chosen when the hidden vector is known, so that only down_proj's columns are left


@dataclass
class InputCut:
    """Leaves out a projection's inputs x whose distance from `centre` is at most `threshold`: `centre` takes their
    place. A threshold of -inf keeps all.

    Args:
        threshold: A number, or one for each input [in].
        centre: 0, or what the inputs gather around (SCAP). W times it is a constant, read instead of the columns.
        signed: Leave out the inputs up to the threshold instead, negative ones first (ReLU after a norm).
        constant: A vector [out] that is added to the output (SPON), or None.
        factors: (A [rank, in], B [out, rank]), for B A (x - what is kept of it) to be added (R-Sparse), or None.
        folded: The differences between the inputs' thresholds are the weights' (input_scales.py), so none is read.
    """

    threshold: float | torch.Tensor
    centre: float = 0.0
    signed: bool = False
    constant: torch.Tensor | None = None
    factors: tuple[torch.Tensor, torch.Tensor] | None = None
    folded: bool = False

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        """Which entries of x [..., in] stay: bool, of its shape."""
        sizes = x if self.signed else (x - self.centre if self.centre else x).abs()
        return sizes > _on(x, self.threshold)

    def kept(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """x with `centre` in the place of what is left out."""
        return x.masked_fill(~keep, self.centre)

    def correction(self, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor | None:
        """What is added to the output for x [..., in], of which `kept` goes into the product: [..., out], or None."""
        added: Any = None
        if self.factors is not None:
            first, second = (_on(x, factor).to(x.dtype) for factor in self.factors)
            added = F.linear(F.linear(x - kept, first), second)
        if self.constant is not None:
            constant = _on(x, self.constant).to(x.dtype)
            added = constant if added is None else added + constant
        return added

    def extra_bytes(self, out: int, size: int) -> int:
        """Bytes read at every step beside the columns; `size` is that of a weight, `out` counts the outputs."""
        tensors = [self.constant, *(self.factors or ())]
        numbers = sum(tensor.numel() for tensor in tensors if tensor is not None) + (out if self.centre else 0)
        if isinstance(self.threshold, torch.Tensor) and not self.folded:
            numbers += self.threshold.numel()
        return numbers * size


def _on(x: torch.Tensor, value: Any) -> Any:
    """A tensor on x's device; a number as it is."""
    return value.to(x.device) if isinstance(value, torch.Tensor) else value


@dataclass
class NeuronCut:
    """Leaves out neurons of a feed-forward layer. This one keeps those whose score is above a threshold.

    Args:
        score: "gate" for |act(gate)|, "hidden" for |act(gate) * up|.
        threshold: A number, or one for each neuron [M].
    """

    remembers = False  # whether a step depends on steps before

    score: str
    threshold: float | torch.Tensor

    @property
    def rows(self) -> Sequence[str]:
        """The projections of which only the kept neurons' rows are read."""
        return GATE if self.score == "gate" else AFTER

    def sizes(self, act: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The neurons' scores, of the tensors' shape."""
        return (act if self.score == "gate" else hidden).abs()

    def keep(self, act: torch.Tensor, hidden: torch.Tensor, start: int) -> torch.Tensor:
        """Which neurons stay at the tokens from `start` on: bool [batch, tokens - start, M].

        Args:
            act: act(gate) of all tokens of this forward, [batch, tokens, M].
            hidden: act(gate) * up, the same.
            start: The first token that is cut; those before are the prompt. It is 0 where the prompt was read before.
        """
        return self.sizes(act[:, start:], hidden[:, start:]) > _on(hidden, self.threshold)

    def rows_read(self, keep: torch.Tensor) -> torch.Tensor:
        """The share of each projection of `rows` that each token reads, [batch, tokens]."""
        return keep.float().mean(-1)

    def begin(self) -> None:
        """Forget what was seen: called when a model is entered anew."""


@dataclass
class TopNeurons(NeuronCut):
    """Keeps the `count` neurons of largest score of each token."""

    threshold: float | torch.Tensor = 0.0
    count: int = 0

    def keep(self, act: torch.Tensor, hidden: torch.Tensor, start: int) -> torch.Tensor:
        return largest(self.sizes(act[:, start:], hidden[:, start:]), self.count)


@dataclass
class CoreNeurons(NeuronCut):
    """Keeps the same neurons at all tokens: those that were most often among the largest of the prompt's tokens."""

    remembers = True

    threshold: float | torch.Tensor = 0.0
    count: int = 0
    _core: torch.Tensor | None = field(default=None, repr=False)
    rows = BEFORE

    def keep(self, act: torch.Tensor, hidden: torch.Tensor, start: int) -> torch.Tensor:
        if start:
            sizes = self.sizes(act[:, :start], hidden[:, :start])
            votes = (largest(sizes, self.count) & (sizes > 0)).float().sum(1, keepdim=True)  # padding has no vote
            scale = sizes.float().mean(1, keepdim=True)
            self._core = largest(votes + scale / scale.amax(-1, keepdim=True).clamp_min(1e-9) / 2, self.count)
        if self._core is None:
            raise StochaError("this method chooses neurons by the prompt: expected one that is read before others")
        return self._core.expand(-1, hidden.shape[1] - start, -1)

    def begin(self) -> None:
        self._core = None


@dataclass
class ReusedNeurons(NeuronCut):
    """Keeps at `gamma` tokens what the token before them kept, so that nothing new is read; then chooses again."""

    remembers = True

    gamma: int = 0
    _before: torch.Tensor | None = field(default=None, repr=False)
    _age: int = field(default=0, repr=False)
    rows = BEFORE

    def keep(self, act: torch.Tensor, hidden: torch.Tensor, start: int) -> torch.Tensor:
        chosen = super().keep(act, hidden, start)
        period = self.gamma + 1
        if hidden.shape[1] > 1:  # a window
            first = torch.arange(chosen.shape[1], device=chosen.device) // period * period
            self._before, self._age = None, 0
            return chosen[:, first]
        if self._age % period == 0 or self._before is None:
            self._before = chosen
        self._age += 1
        return self._before

    def rows_read(self, keep: torch.Tensor) -> torch.Tensor:
        shares = keep.float().mean(-1)
        if keep.shape[1] == 1:
            fresh = torch.tensor([(self._age - 1) % (self.gamma + 1) == 0], device=keep.device)
        else:
            fresh = torch.arange(keep.shape[1], device=keep.device) % (self.gamma + 1) == 0
        return torch.where(fresh, torch.ones_like(shares), shares)

    def begin(self) -> None:
        self._before, self._age = None, 0


@dataclass
class GivenNeurons(NeuronCut):
    """Keeps what it is told from outside to keep, at each token of a forward: `given` is bool [batch, tokens, M]."""

    score: str = "given"
    threshold: float | torch.Tensor = 0.0
    given: torch.Tensor | None = field(default=None, repr=False)
    rows = BEFORE

    def keep(self, act: torch.Tensor, hidden: torch.Tensor, start: int) -> torch.Tensor:
        assert self.given is not None, "told before each forward"
        return self.given[:, start:]


def largest(sizes: torch.Tensor, count: int) -> torch.Tensor:
    """Mark the `count` largest entries along the last axis."""
    return torch.zeros_like(sizes, dtype=torch.bool).scatter_(-1, sizes.topk(count, dim=-1).indices, True)
