"""Skipping the gate too: a copy of gate_proj in 8 bits says which neurons can be active, at half the bytes.

This is for bfloat16, float16 and float32 on a CPU; for quantized gates see thin_gate.py, for a GPU packed_gate.py.

Each row is rounded to 255 steps of a scale of its own. An entry is then off by at most half a scale, so a
pre-activation by at most half a scale times |x|_1: neurons that stay below the threshold by more are skipped, and
results are exact. Rounding errors being independent, their standard deviation is scale times |x|_2 / sqrt(12), which
is much less: with a `recall`, neurons are skipped that are below the threshold by its quantile. For the rest the
exact gate is computed as before.

The copies take half of the gates' memory, a sixth of a model's FFNs, so they are made when asked for.

    predict_gates(model)                  # exact results
    predict_gates(model, recall=0.999)    # an active neuron is missed at most once in 1000 times
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch

from stocha_hf.decoding.packed_gate import PackedGate
from stocha_hf.decoding.state import DecodeState, key_of
from stocha_hf.decoding.structs import GateCopy, is_quantized, pointer
from stocha_hf.decoding.thin_gate import ThinGate
from stocha_hf.errors import StochaError

STEPS = 127  # of a scale, to each side


@dataclass(frozen=True)
class CoarseGate:
    """A gate in 8 bits: `weights` int8 [M, H] times `scales` float32 [M]; `margin` in standard deviations of the
    rounding error, 0 for its bound. `key` tells whether the gate has changed since.
    """

    weights: torch.Tensor
    scales: torch.Tensor
    margin: float
    key: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return self.weights.nbytes + self.scales.nbytes

    @classmethod
    def of(cls, gate: torch.Tensor, recall: float | None = None) -> CoarseGate:
        """Raises StochaError for a recall that is not a share of at least a half."""
        _check(recall)
        margin = 0.0 if recall is None else NormalDist().inv_cdf(recall)
        gate_32 = gate.detach().float()
        scales = gate_32.abs().amax(1).clamp(min=1e-30) / STEPS
        weights = (gate_32 / scales.unsqueeze(1)).round_().to(torch.int8)
        return cls(weights, scales, margin, key_of(gate))

    def structure(self) -> GateCopy:
        """Return it as the kernels take it."""
        return GateCopy(pointer(self.weights), pointer(self.scales), None, self.margin)

    def most(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the gates of x [tokens, H] are at most, with a recall up to it, [tokens, M]."""
        x = x.float()
        slack = self.margin * (x.square().sum(1) / 12).sqrt() if self.margin else x.abs().sum(1) / 2
        return (x @ self.weights.float().T + slack.unsqueeze(1)) * self.scales


def predict_gates(model: Any, recall: float | None = None) -> int:
    """Give each FFN of a patched model a small copy of its gate for decoding.

    On a CPU it has 8 bits, or 2 of a quantized gate (thin_gate.py); on a GPU 4 (packed_gate.py). A copy is not part of
    the state dict, and is ignored once its gate's weights change.

    Args:
        model: A patched model.
        recall: The share of active neurons to find at the threshold itself; of all active ones more are found.
            None finds all, by a copy in 8 bits.

    Returns:
        The number of FFNs.

    Raises:
        StochaError: For a model without patched FFNs, a recall that is not between 0.5 and 1, none for a quantized
            gate or on a GPU, or a quantized gate that cuts its input.
    """
    mlps = [module for module in model.modules() if "decode_state" in module.__dict__]
    if not mlps:
        raise StochaError(f"the model is a {type(model).__name__}: expected a patched one, see stocha_hf.patch")
    _check(recall)
    gates = [_copy_of(mlp.gate_proj, recall) for mlp in mlps]
    for mlp, gate in zip(mlps, gates, strict=True):
        mlp.decode_state = mlp.decode_state or DecodeState()
        mlp.decode_state.coarse = gate
    return len(mlps)


def _check(recall: float | None) -> None:
    if recall is not None and not 0.5 < recall < 1:
        raise StochaError(f"the recall is {recall}: expected a share between 0.5 and 1, or None for exact results")


def _copy_of(module: Any, recall: float | None) -> CoarseGate | PackedGate | ThinGate:
    gate = module.weight
    if gate.is_cuda:
        if recall is None or gate.shape[1] % 8:
            raise StochaError(
                f"the gate is {list(gate.shape)} on a GPU and the recall is {recall}: expected a recall, such as "
                "0.999, since 4 bits give no exact bound, and a hidden size that 8 divides"
            )
        return PackedGate.of(gate, recall)
    if not is_quantized(module):
        return CoarseGate.of(gate, recall)
    if recall is None or module.transposed:
        raise StochaError(
            f"the gate is in {module.bits} bits, its rows are {'inputs' if module.transposed else 'outputs'}, and the "
            f"recall is {recall}: expected a recall, such as 0.9, since the copy's 2 bits give no exact bound, and "
            "rows that are outputs, so no input cuts"
        )
    return ThinGate.of(module, recall)


def candidates(copy: CoarseGate | ThinGate, x: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which gates of x [tokens, H] the kernel computes exactly, in PyTorch: bool [tokens, M]."""
    return copy.most(x) > threshold - abs(threshold) / 128
