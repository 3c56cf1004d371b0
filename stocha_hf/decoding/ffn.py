"""A patched FFN in eval mode: where its activation makes zeros, a step of few tokens reads active neurons only.

By the kernels of the device; on a CPU without a compiler by PyTorch's operations, which gather rows faster than they
read all of them for one token of which less than a third is active. Numbers equal the dense path within the rounding
of sums.

The MLP brings its rules: `running` names its activation, `threshold` is that of the layer, `hidden(gate, up)` computes
the activation in PyTorch. So this package knows no class of modeling_stocha.py, of which every published repo has its
own copy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from stocha_hf.decoding import ops, structs
from stocha_hf.decoding.conditions import has_few_tokens, is_called, is_plain, is_plain_inference
from stocha_hf.decoding.gate_prediction import CoarseGate
from stocha_hf.decoding.state import gate_copy, neuron_major, sole_copy
from stocha_hf.decoding.thin_gate import ThinGate
from stocha_hf.spec import ACTIVATIONS

MATRICES = ("gate_proj", "up_proj", "down_proj")
GATHERED = 2**25  # bytes: larger gathers get fresh pages from the system each time, which costs more than they save


def ffn(mlp: Any, x: torch.Tensor) -> torch.Tensor | None:
    """Compute a patched FFN on x [..., hidden_size]; None where the native path is to run."""
    if not is_plain_inference(x):
        return None
    if structs.is_quantized(mlp._modules["gate_proj"]):
        return _quantized(mlp, x)
    if not skipping(mlp, x):
        return None
    if has_few_tokens(x):
        return _decode(mlp, x)
    if x.is_cuda and ops.available("cuda"):
        neuron_major(mlp, thorough=True)  # now, since a compiled step or a recorded graph cannot make it
    elif (down_t := sole_copy(mlp)) is not None:
        return mlp.hidden(mlp.gate_proj(x), mlp.up_proj(x)) @ down_t
    return None


def _quantized(mlp: Any, x: torch.Tensor) -> torch.Tensor | None:
    """Compute an FFN of quantized matrices, with zeros or without, by the CPU's kernel."""
    parts = [mlp._modules[name] for name in MATRICES]
    takes = (
        x.is_cpu
        and has_few_tokens(x)
        and not torch.compiler.is_compiling()
        and mlp.running in structs.KERNEL_ACTIVATIONS
        and not is_called(mlp._modules["act_fn"])
        and all(
            structs.is_quantized(part)
            and not is_called(part)
            and not structs.is_cut(part)
            and part._parameters["bias"] is None
            for part in parts
        )
        and ops.available()
    )
    return ops.run_ffn(x, quantized_ffn(mlp)) if takes else None


def quantized_ffn(mlp: Any) -> structs.Ffn:
    """Return the kernel's structure of an FFN of quantized matrices."""
    matrices = [structs.matrix_of(mlp._modules[name]) for name in MATRICES]
    copy = gate_copy(mlp)
    told = structs.GateCopy() if copy is None else copy.structure()
    return structs.Ffn(*matrices, told, structs.KERNEL_ACTIVATIONS[mlp.running], zero_up_to(mlp))


def skipping(mlp: Any, x: torch.Tensor) -> bool:
    """Return whether inactive neurons can be skipped: the activation makes zeros, and the modules are plain."""
    linears = [mlp._modules[name] for name in MATRICES]
    rule = ACTIVATIONS.get(mlp.running)
    return (
        rule is not None
        and rule.cut is not None
        and not is_called(mlp._modules["act_fn"])
        and all(
            is_plain(linear, x)
            and linear._parameters["bias"] is None
            and (torch.compiler.is_compiling() or linear._parameters["weight"].is_contiguous())
            for linear in linears
        )
    )


def zero_up_to(mlp: Any) -> float:
    """Return the gate value up to which a hidden entry of this MLP is surely 0."""
    return mlp.threshold if ACTIVATIONS[mlp.running].cut == "threshold" else 0.0


def _decode(mlp: Any, x: torch.Tensor) -> torch.Tensor | None:
    gate, up = (mlp._modules[name]._parameters["weight"] for name in ("gate_proj", "up_proj"))
    if torch.compiler.is_compiling() or ops.available(x.device.type):
        down_t = neuron_major(mlp)
        if down_t is None:
            return None
        coarse = None if torch.compiler.is_compiling() else mlp.decode_state.coarse
        copy = coarse if isinstance(coarse, CoarseGate | ThinGate) else None
        return ops.ffn(x, gate, up, down_t, mlp.running, zero_up_to(mlp), copy)
    if x.is_cpu and x.numel() == x.shape[-1]:
        return gathered(mlp, x)
    return None


def gathered(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute a patched FFN on one token x [..., hidden_size] by PyTorch's operations on the active neurons' rows."""
    gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
    gates = F.linear(x, gate)
    active = (~(gates <= zero_up_to(mlp))).flatten().nonzero().squeeze(1)  # NaN is active
    few = len(active) <= min(gates.shape[-1] // 3, GATHERED // (x.numel() * x.element_size()))
    if not few or (down_t := neuron_major(mlp)) is None:
        down_t = sole_copy(mlp)
        hidden = mlp.hidden(gates, F.linear(x, up))
        return F.linear(hidden, mlp.down_proj.weight) if down_t is None else hidden @ down_t
    hidden = mlp.hidden(gates.index_select(-1, active), F.linear(x, up.index_select(0, active)))
    return hidden @ down_t.index_select(0, active)
