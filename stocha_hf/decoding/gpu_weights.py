"""The tensors that a GPU's whole decode step reads, of a layer and of a model; gpu_plan.py finds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from stocha_hf.decoding.packed_gate import PackedGate


@dataclass(frozen=True)
class CutWeights:
    """Of a projection that cuts its input: its matrix an input a row, [inputs, outputs], or None where the one of an
    output a row is read whole; and the threshold.
    """

    weight: torch.Tensor | None
    threshold: float


@dataclass(frozen=True)
class LayerWeights:
    """Of one layer; a bias is None where the projection has none. `down` is [H, M], `down_t` [M, H] or None: then
    all neurons are computed. `coarse` predicts gates, or is None. `cuts` are the projections that cut their inputs in
    a step of one token, by their names.
    """

    input_norm: torch.Tensor
    qkv: Sequence[torch.Tensor]
    qkv_bias: Sequence[torch.Tensor] | None
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    o: torch.Tensor
    o_bias: torch.Tensor | None
    ffn_norm: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    down_t: torch.Tensor | None
    activation: str
    cut: float
    coarse: PackedGate | None
    scaling: float
    window: int
    cuts: Mapping[str, CutWeights] = field(default_factory=dict)


@dataclass(frozen=True)
class Weights:
    """Of a model, with what its kernels have to know. `frequencies` float32 [head_dim / 2]."""

    embedding: torch.Tensor
    layers: Sequence[LayerWeights]
    norm: torch.Tensor
    head: torch.Tensor
    head_bias: torch.Tensor | None
    frequencies: torch.Tensor
    rotary_scaling: float
    eps: float
    heads: int
    key_heads: int
    head_dim: int
