"""Skipping the gate too: a small copy of gate_proj says which neurons can be active, and only their rows are read.

Exact results need a copy in 8 bits. Each row is rounded to 255 steps of a scale of its own, so an entry is off by at
most half a scale, and a pre-activation by at most half a scale times |x|_1: neurons that stay below the threshold by
more are skipped. With a `recall` a copy in 2 bits does (thin_gate.py), of quantized gates as well; on a GPU one in 4
(packed_gate.py). For the neurons that may be active the exact gate is computed as before.

Copies take memory, those in 8 bits a sixth of a bfloat16 model's FFNs, so they are made when asked for.

    predict_gates(model)              # exact results
    predict_gates(model, recall=0.9)  # an active neuron at the threshold is missed once in 10 times
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from stocha_hf.decoding.packed_gate import PackedGate
from stocha_hf.decoding.state import DecodeState, key_of
from stocha_hf.decoding.structs import GateCopy, is_cut, is_quantized, pointer
from stocha_hf.decoding.thin_gate import ThinGate
from stocha_hf.errors import StochaError

STEPS = 127  # of a scale, to each side


@dataclass(frozen=True)
class CoarseGate:
    """A gate in 8 bits: `weights` int8 [M, H] times `scales` float32 [M]. `key` tells whether the gate has changed
    since.
    """

    weights: torch.Tensor
    scales: torch.Tensor
    key: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return self.weights.nbytes + self.scales.nbytes

    @classmethod
    def of(cls, gate: torch.Tensor) -> CoarseGate:
        """Return the copy of a gate [M, H]."""
        gate_32 = gate.detach().float()
        scales = gate_32.abs().amax(1).clamp(min=1e-30) / STEPS
        weights = (gate_32 / scales.unsqueeze(1)).round_().to(torch.int8)
        return cls(weights, scales, key_of(gate))

    def structure(self) -> GateCopy:
        """Return it as the kernels take it."""
        return GateCopy(pointer(self.weights), pointer(self.scales))

    def most(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the gates of x [tokens, H] are at most, [tokens, M]."""
        x = x.float()
        return (x @ self.weights.float().T + x.abs().sum(1, keepdim=True) / 2) * self.scales


def predict_gates(model: Any, recall: float | None = None) -> int:
    """Give each FFN of a patched model a small copy of its gate for decoding.

    A copy is not part of the state dict, and is ignored once its gate's weights change.

    Args:
        model: A patched model.
        recall: The share of active neurons to find at the threshold itself; of all active ones more are found.
            None finds all; only on a CPU, and not of quantized gates.

    Returns:
        The number of FFNs.

    Raises:
        StochaError: For a model without patched FFNs, a gate that cuts its input, a recall that is not between 0.5
            and 1, none for a quantized gate or on a GPU, or a quantized gate there.
    """
    mlps = [module for module in model.modules() if "decode_state" in module.__dict__]
    if not mlps:
        raise StochaError(f"the model is a {type(model).__name__}: expected a patched one, see stocha_hf.patch")
    if recall is not None and not 0.5 < recall < 1:
        raise StochaError(f"the recall is {recall}: expected a share between 0.5 and 1, or None for exact results")
    gates = [_copy_of(mlp.gate_proj, recall) for mlp in mlps]
    for mlp, gate in zip(mlps, gates, strict=True):
        mlp.decode_state = mlp.decode_state or DecodeState()
        mlp.decode_state.coarse = gate
    return len(mlps)


def _copy_of(module: Any, recall: float | None) -> CoarseGate | PackedGate | ThinGate:
    quantized = is_quantized(module)
    gate = module.codes if quantized else module.weight
    if is_cut(module) or (quantized and module.transposed):
        raise StochaError(
            "a gate_proj cuts its inputs or is stored by input: expected neither, since with prediction only the rows "
            "of some of its outputs are read"
        )
    if gate.is_cuda:
        if quantized:
            raise StochaError(
                f"the gate is in {module.bits} bits on a GPU: expected a CPU, or weights that are not quantized, as "
                "a GPU's steps take no others"
            )
        if recall is None or gate.shape[1] % 8:
            raise StochaError(
                f"the gate is {list(gate.shape)} on a GPU and the recall is {recall}: expected a recall, such as "
                "0.999, since 4 bits give no exact bound, and a hidden size that 8 divides"
            )
        return PackedGate.of(gate, recall)
    if quantized and recall is None:
        raise StochaError(
            f"the gate is in {module.bits} bits and the recall is None: expected a recall, such as 0.9, since the "
            "copy's 2 bits give no exact bound"
        )
    return CoarseGate.of(gate) if recall is None else ThinGate.of(module, recall)


def candidates(copy: CoarseGate | ThinGate, x: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which gates of x [tokens, H] the kernel computes exactly, in PyTorch: bool [tokens, M]."""
    return copy.most(x) > threshold - abs(threshold) / 128
