# Copyright 2026 the stocha_hf authors. Licensed under the Apache License, Version 2.0.
"""Stochastic activations for gated feed-forward layers: the one file that ships with every stocha checkpoint.

Llama-class models compute y = W_down(act(W_gate x) * (W_up x)). This file replaces `act` by one row of the table
ACTIVATIONS: StochA (Lomeli et al., arXiv 2509.22358), its deterministic expectation, ReLU, and the sparse activations
of neighbouring papers. In train() mode a model uses `config.stocha["activation"]`, in eval() mode
`config.stocha["inference"]`.

Why this way: patching changes the *class* of existing modules and nothing else, so parameters, state-dict keys, hooks
and devices stay as they are, and any stocha checkpoint is a valid checkpoint of its native class. The file imports
torch and transformers only, because the Hub copies it into other people's Python with `trust_remote_code=True`.

    model = AutoModelForCausalLM.from_pretrained(REPO, trust_remote_code=True)
    with model.stocha_mode("stocha", p=0.5):        # force an activation; restored on exit
        model.generate(**inputs)
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    Gemma2ForCausalLM,
    Gemma2Model,
    Gemma3ForCausalLM,
    Gemma3TextModel,
    LlamaForCausalLM,
    LlamaModel,
    MistralForCausalLM,
    MistralModel,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

__version__ = "0.1.0"


# Architectures: one row per model_type.


@dataclass(frozen=True)
class Architecture:
    """How one native model family is patched: its class names and where its config names the activation."""

    causal_lm: str
    model: str
    mlp: str
    act_key: str
    act: str

    @property
    def auto_map(self) -> dict[str, str]:
        """The `auto_map` of config.json, which makes the Auto classes find this file."""
        names = {"AutoModelForCausalLM": self.causal_lm, "AutoModel": self.model}
        return {auto: f"modeling_stocha.Stocha{name}" for auto, name in names.items()}


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", "LlamaModel", "LlamaMLP", "hidden_act", "silu"),
    "mistral": Architecture("MistralForCausalLM", "MistralModel", "MistralMLP", "hidden_act", "silu"),
    "qwen2": Architecture("Qwen2ForCausalLM", "Qwen2Model", "Qwen2MLP", "hidden_act", "silu"),
    "qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Model", "Qwen3MLP", "hidden_act", "silu"),
    "gemma2": Architecture("Gemma2ForCausalLM", "Gemma2Model", "Gemma2MLP", "hidden_activation", "gelu_pytorch_tanh"),
    "gemma3_text": Architecture(
        "Gemma3ForCausalLM", "Gemma3TextModel", "Gemma3MLP", "hidden_activation", "gelu_pytorch_tanh"
    ),
}


# Activations: functions (gate, up, ffn) -> hidden, all of shape [..., intermediate_size] and of gate's dtype. `ffn` is
# the StochaMLP they run in: it holds act_fn (the base activation), p, positive, threshold and k.


def stocha(gate: torch.Tensor, up: torch.Tensor, ffn: StochaMLP) -> torch.Tensor:
    """StochA (Lomeli et al., arXiv 2509.22358, sec. 3): base activation with probability p, else ReLU, per element.

    The coin of token i and neuron j is a hash of r_i ^ c_j, where the keys r (one per token) and c (one per neuron)
    are 32 random bits each, drawn anew in every call from the default generator of gate's device: it is the one that
    activation checkpointing restores. Any three coins of a call are then exactly independent (simple tabulation:
    Patrascu and Thorup, arXiv 1011.5200, sec. 1), the multiplications break the pattern that four can have, and a
    coin costs a few integer operations instead of a generator's draw, which would be the larger part of the FFN's
    element-wise work.

    A compiler gets the definition below, which it fuses, and hashes again in backward; in eager mode a fused autograd
    Function takes its place. Gradients are those of the chosen function, ReLU's being 0 at 0.
    """
    width = gate.shape[-1]
    keys = torch.randint(-(2**31), 2**31, (gate.numel() // width + width,), dtype=torch.int32, device=gate.device)
    if not torch.compiler.is_compiling() and ffn.base in BASES:
        # p = 1 with S+ is SiLU to the bit, which PyTorch's own kernel is sure to give
        function = TritonStocha if gate.is_cuda and triton is not None and ffn.p < 1 else EagerStocha
        return function.apply(gate, up, keys, ffn.p, ffn.base, ffn.positive)
    bits = _hash(keys[:-width].view(*gate.shape[:-1], 1), keys[-width:])
    uniform = ((bits >> 8) + 2**23) * 2.0**-24  # in [0, 1), from the upper 24 bits: exact in float32
    drawn = uniform - ffn.p < 0  # not uniform < p: a compiler keeps what shrinks its inputs fourfold, here the mask
    base = ffn.act_fn(gate)
    return _with_positive_side(gate, base, torch.where(drawn, base, F.relu(gate)), ffn.positive) * up


def _hash(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Of the keys rows[..., 1] and columns, int32: the hash of every element, uniform over the even int32 numbers.

    The arithmetic shift clears the sign bit; the second multiplier is doubled and moves the 31 bits that are left up.
    """
    bits = (rows ^ columns).mul_(0x2C1B3C6D)
    bits ^= bits >> 15
    return bits.mul_(2 * 0x297A2D39)


def mean(gate: torch.Tensor, up: torch.Tensor, ffn: StochaMLP) -> torch.Tensor:
    """The exact expectation of StochA over its draws, as dropout's inference rule is of dropout."""
    base = ffn.act_fn(gate)
    return _with_positive_side(gate, base, ffn.p * base + (1 - ffn.p) * F.relu(gate), ffn.positive) * up


def _with_positive_side(gate: torch.Tensor, base: torch.Tensor, mixed: torch.Tensor, positive: str) -> torch.Tensor:
    """`mixed` where gate < 0; elsewhere the base activation ("silu", S+), ReLU ("relu", R+) or `mixed` ("drawn")."""
    return torch.where(gate < 0, mixed, {"silu": base, "relu": F.relu(gate), "drawn": mixed}[positive])


def silu(gate: torch.Tensor, up: torch.Tensor, ffn: StochaMLP) -> torch.Tensor:
    """SwiGLU (Shazeer, arXiv 2002.05202): what Llama and Mistral were trained with."""
    return F.silu(gate) * up


def gelu_pytorch_tanh(gate: torch.Tensor, up: torch.Tensor, ffn: StochaMLP) -> torch.Tensor:
    """GeGLU (Shazeer, arXiv 2002.05202) with the tanh approximation: what Gemma was trained with."""
    return F.gelu(gate, approximate="tanh") * up


def relu(gate: torch.Tensor, up: torch.Tensor, ffn: StochaMLP) -> torch.Tensor:
    """ReGLU (Shazeer, arXiv 2002.05202)."""
    return F.relu(gate) * up


def relu2(gate: torch.Tensor, up: torch.Tensor, ffn: StochaMLP) -> torch.Tensor:
    """Squared ReLU (ReLU^2 Wins, arXiv 2402.03804)."""
    return F.relu(gate).square() * up


def drelu(gate: torch.Tensor, up: torch.Tensor, ffn: StochaMLP) -> torch.Tensor:
    """ReLU on the gate and on the up projection (TurboSparse, arXiv 2406.05955)."""
    return F.relu(gate) * F.relu(up)


def fatrelu(gate: torch.Tensor, up: torch.Tensor, ffn: StochaMLP) -> torch.Tensor:
    """gate where gate > threshold, else 0 (ProSparse, arXiv 2402.13516)."""
    return F.threshold(gate, ffn.threshold, 0.0) * up


def shifted_relu(gate: torch.Tensor, up: torch.Tensor, ffn: StochaMLP) -> torch.Tensor:
    """relu(gate - threshold) (ReLU Strikes Back, arXiv 2310.04564)."""
    return F.relu(gate - ffn.threshold) * up


def topk(gate: torch.Tensor, up: torch.Tensor, ffn: StochaMLP) -> torch.Tensor:
    """The k largest of relu(gate) of each token, the rest 0 (Lazy Neuron, arXiv 2210.06313)."""
    largest = F.relu(gate).topk(ffn.k, dim=-1)
    return torch.zeros_like(gate).scatter(-1, largest.indices, largest.values) * up


@dataclass(frozen=True)
class Activation:
    """A row of the table: the function, and the name in transformers' ACT2FN of what the native class runs in its
    place (None: the base activation). `cut` gives the gate value up to which a hidden entry is surely 0 (None: no such
    value), so that decoding can skip the neuron.
    """

    function: Callable[[torch.Tensor, torch.Tensor, StochaMLP], torch.Tensor]
    native: str | None
    deterministic: bool = True
    cut: Callable[[StochaMLP], float] | None = None


def _zero(ffn: StochaMLP) -> float:
    return 0.0


def _threshold_of(ffn: StochaMLP) -> float:
    return ffn.threshold


ACTIVATIONS = {
    "stocha": Activation(stocha, native=None, deterministic=False),
    "mean": Activation(mean, native=None),
    "silu": Activation(silu, native="silu"),
    "gelu_pytorch_tanh": Activation(gelu_pytorch_tanh, native="gelu_pytorch_tanh"),
    "relu": Activation(relu, native="relu", cut=_zero),
    "relu2": Activation(relu2, native="relu2", cut=_zero),
    "drelu": Activation(drelu, native="relu", cut=_zero),
    "fatrelu": Activation(fatrelu, native="relu", cut=_threshold_of),
    "shifted_relu": Activation(shifted_relu, native="relu", cut=_threshold_of),
    "topk": Activation(topk, native="relu"),
}
POSITIVE_SIDES = ("silu", "relu", "drawn")


def _require(ok: bool, key: str, given: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"{key} is {given!r}: expected {expected}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class StochaConfig:
    """The `stocha` entry of config.json.

    `activation` runs in train() mode, `inference` in eval() mode; `base` is the source model's own activation; None
    for either means "take it from the model". `positive` is what runs where gate >= 0: "silu" (the base activation,
    S+), "relu" (R+) or "drawn". `threshold` (fatrelu, shifted_relu) is one number or one per layer; `k` (topk) counts
    neurons. `history` says what training did, stage by stage.

    Raises ValueError, naming the key, what was given and what was expected.
    """

    activation: str = "stocha"
    base: str | None = None
    p: float = 0.3
    positive: str = "silu"
    inference: str | None = None
    threshold: float | list[float] = 0.0
    k: int | None = None
    source: dict[str, str | None] | None = None
    history: list[dict[str, Any]] | None = None
    stocha_version: str = __version__

    def __post_init__(self) -> None:
        names = f"one of {', '.join(ACTIVATIONS)}"
        _require(self.activation in ACTIVATIONS, "activation", self.activation, names)
        _require(self.base is None or self.base in ACTIVATIONS, "base", self.base, names)
        _require(self.inference is None or self.inference in ACTIVATIONS, "inference", self.inference, names)
        _require(
            self.inference is None or ACTIVATIONS[self.inference].deterministic,
            "inference",
            self.inference,
            "a deterministic activation (stocha_mode forces a stochastic one at run time)",
        )
        _require(_is_number(self.p) and 0 <= self.p <= 1, "p", self.p, "a probability between 0 and 1")
        _require(self.positive in POSITIVE_SIDES, "positive", self.positive, f"one of {', '.join(POSITIVE_SIDES)}")
        thresholds = self.threshold if isinstance(self.threshold, list) else [self.threshold]
        _require(all(map(_is_number, thresholds)), "threshold", self.threshold, "a number, or a list of one per layer")
        uses_topk = "topk" in (self.activation, self.inference)
        is_count = isinstance(self.k, int) and not isinstance(self.k, bool) and self.k >= 1
        _require(
            is_count or (self.k is None and not uses_topk), "k", self.k, "a number of neurons, at least 1, for topk"
        )

    def resolve(self, base: str) -> StochaConfig:
        """This config with nothing left open, for a model whose own activation is `base`."""
        _require(self.base in (None, base), "base", self.base, f"{base!r}, the model's own activation")
        own = self.activation if ACTIVATIONS[self.activation].deterministic else base
        return dataclasses.replace(self, base=base, inference=self.inference or own)

    @property
    def native_act(self) -> str:
        """What the native class runs for `inference`: config.json's hidden_act. Needs a resolved config."""
        native = ACTIVATIONS[str(self.inference)].native or self.base
        return str(native)

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> StochaConfig:
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(entry) - known)
        _require(not unknown, "the config's stocha entry", unknown, f"no other keys than {', '.join(sorted(known))}")
        return cls(**entry)

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


# StochA in eager mode. For backward, native SiLU keeps gate, silu(gate) and up; these two keep gate, up and less.


def _threshold(p: float) -> int:
    """_hash < threshold with probability p, to 31 bits; never at p = 0 and always at p = 1."""
    return min(int(p * 2**32) - 2**31, 2**31 - 1)


class EagerStocha(torch.autograd.Function):
    """StochA in PyTorch's operations; keeps gate, up and one byte per element.

    Which elements take the base activation is an integer mask (all ones or zero) of gate's width, and selecting is
    bitwise: on a CPU, `where` and `masked_fill` take longer than SiLU and its backward together.
    """

    TILE = 2**18  # elements at a time on a CPU: the hash stays in the cache

    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, keys: torch.Tensor, p: float, base: str, positive: str
    ) -> torch.Tensor:
        width, integer = gate.shape[-1], getattr(torch, f"int{8 * gate.element_size()}")
        hidden = torch.empty(gate.shape, dtype=torch.result_type(gate, up), device=gate.device)
        chosen = torch.empty(gate.shape, dtype=torch.int8, device=gate.device)
        rows = EagerStocha.TILE // width + 1 if gate.device.type == "cpu" else len(keys)
        tensors = [tensor.reshape(-1, width) for tensor in (gate, up, hidden, chosen)]
        for x, u, out, kept, row_keys in zip(*(t.split(rows) for t in (*tensors, keys[:-width, None])), strict=True):
            mask = _hash(row_keys, keys[-width:]).lt_(_threshold(p)).neg_().to(integer)
            negative = x.sign().view(integer) >> 8 * x.element_size() - 1  # NaN counts as positive: it passes through
            if positive == "silu":
                mask |= negative.bitwise_not_()
            elif positive == "relu":
                mask &= negative
            kept.copy_(mask)
            torch.mul(_stocha(x, mask, base, positive), u, out=out)
        ctx.save_for_backward(gate, up, chosen)
        ctx.rule = base, positive
        return hidden

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, chosen = ctx.saved_tensors
        base, positive = ctx.rule
        mask = chosen.to(getattr(torch, f"int{8 * gate.element_size()}"))
        grad_up = _stocha(gate, mask, base, positive) * grad
        inner = (grad * up).to(gate.dtype)
        relu = None if positive == "silu" else torch.ops.aten.threshold_backward(inner, gate, 0)
        return _select(mask, BASES[base][1](inner, gate), relu), grad_up, None, None, None, None


BASES: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {  # (function, its backward)
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu_pytorch_tanh": (
        functools.partial(F.gelu, approximate="tanh"),
        functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
}


def _stocha(x: torch.Tensor, mask: torch.Tensor, base: str, positive: str) -> torch.Tensor:
    """The base activation where the mask is set, else ReLU: 0 with S+, whose mask is set for all positive x."""
    return _select(mask, BASES[base][0](x), None if positive == "silu" else F.relu(x))


def _select(mask: torch.Tensor, chosen: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
    """`chosen`, changed in place, where the mask's bits are set, `other` (None: 0) where they are not."""
    bits = chosen.view(mask.dtype)
    if other is None:
        bits &= mask
    else:
        bits ^= other.view(mask.dtype)
        bits &= mask
        bits ^= other.view(mask.dtype)
    return chosen


try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError:
    triton = None

if triton is not None:

    @triton.jit
    def _base(x, grad, BASE: tl.constexpr):  # type: ignore[no-untyped-def]
        """The base activation of x and its gradient, rounded as in PyTorch's kernels."""
        if BASE == "silu":
            divisor = 1 + libdevice.exp(-x)
            if x.dtype == tl.float64:
                value, sigmoid = x / divisor, 1 / divisor
            else:
                value, sigmoid = tl.div_rn(x, divisor), tl.div_rn(1.0, divisor)
            return value, grad * sigmoid * (1 + x * (1 - sigmoid))
        else:
            tanh = libdevice.tanh(0.7978845608028654 * (x + 0.044715 * (x * x * x)))  # sqrt(2 / pi)
            slope = 0.5 * x * (1 - tanh * tanh) * (0.7978845608028654 * (1 + 3 * 0.044715 * (x * x)))
            return 0.5 * x * (1 + tanh), grad * (0.5 * (1 + tanh) + slope)

    @triton.jit(do_not_specialize=["threshold"])
    def _stocha_kernel(  # type: ignore[no-untyped-def]
        gate_ptr, up_ptr, keys_ptr, out_ptr, grad_ptr, grad_up_ptr, width, threshold,
        BASE: tl.constexpr, POSITIVE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """A block of one token: hidden into out or, given hidden's gradient, those of gate and up."""
        row, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside, offset = column < width, row.to(tl.int64) * width + column
        gate, up = tl.load(gate_ptr + offset, inside), tl.load(up_ptr + offset, inside)
        x = gate if gate.dtype == tl.float64 else gate.to(tl.float32)
        bits = (tl.load(keys_ptr + row) ^ tl.load(keys_ptr + tl.num_programs(0) + column, inside)) * 0x2C1B3C6D
        chosen = (bits ^ (bits >> 15)) * (2 * 0x297A2D39) < threshold
        if POSITIVE == "silu":
            chosen = chosen | ~(x < 0)
        if POSITIVE == "relu":
            chosen = chosen & (x < 0)
        if grad_ptr is None:
            value, _ = _base(x, x, BASE)
        else:
            grad = tl.load(grad_ptr + offset, inside).to(x.dtype)
            inner = (grad * up.to(x.dtype)).to(gate.dtype).to(x.dtype)
            value, grad_base = _base(x, inner, BASE)
            tl.store(out_ptr + offset, tl.where(chosen, grad_base, tl.where(x > 0, inner, 0.0)), inside)
        value = tl.where(chosen, value, tl.where(x < 0, 0.0, x)).to(gate.dtype).to(x.dtype)
        if grad_ptr is None:
            tl.store(out_ptr + offset, value * up.to(x.dtype), inside)
        else:
            tl.store(grad_up_ptr + offset, grad * value, inside)


class TritonStocha(torch.autograd.Function):
    """StochA in one Triton kernel a pass; keeps gate, up and the keys, from which backward hashes the coins again."""

    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, keys: torch.Tensor, p: float, base: str, positive: str
    ) -> torch.Tensor:
        ctx.save_for_backward(gate, up, keys)
        ctx.rule = _threshold(p), base, positive
        hidden = torch.empty_like(gate, dtype=torch.result_type(gate, up), memory_format=torch.contiguous_format)
        TritonStocha.launch(gate, up, keys, hidden, None, None, *ctx.rule)
        return hidden

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, keys = ctx.saved_tensors
        grad_gate, grad_up = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))
        TritonStocha.launch(gate, up, keys, grad_gate, grad.contiguous(), grad_up, *ctx.rule)
        return grad_gate, grad_up, None, None, None, None

    @staticmethod
    def launch(gate: torch.Tensor, up: torch.Tensor, keys: torch.Tensor, *rest: Any) -> None:
        width, block = gate.shape[-1], 512
        grid = len(keys) - width, triton.cdiv(width, block)
        with torch.cuda.device(gate.get_device()):  # Triton launches on the current one
            _stocha_kernel[grid](gate.contiguous(), up.contiguous(), keys, *rest[:3], width, *rest[3:], block)


# Sparse decode: a step of few tokens computes the gate, then reads only the active neurons' weights.

FEW = 8  # tokens of a step that is sparse, at most: as many as the kernels take
DEVICES = ("cpu", "cuda")  # that have kernels
GATHERED = 2**25  # bytes: larger gathers get fresh pages from the system each time, which costs more than they save


def decodes(x: torch.Tensor) -> bool:
    """Whether x [..., size] is a decode step's: a few tokens of plain inference."""
    return is_few(x) and infers(x)


def is_few(x: torch.Tensor) -> bool:
    """Whether x [..., size] has as few tokens as are worth a sparse step."""
    return x.device.type in DEVICES and 0 < x.numel() <= FEW * x.shape[-1]


def infers(x: torch.Tensor) -> bool:
    """Whether x is a plain tensor of a type that the kernels know, with nothing recorded for a backward."""
    return (
        type(x) is torch.Tensor  # neither fake nor distributed
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.jit.is_tracing()
    )


def is_plain(linear: nn.Module, x: torch.Tensor, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a module is a `kind` of x's type and device and nothing else: no adapter, quantization, offloading or
    hook, for which it must be called.
    """
    weight = linear._parameters.get("weight")
    return (
        type(linear) is kind
        and type(weight) is nn.Parameter
        and weight.device == x.device
        and weight.dtype == x.dtype
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and "forward" not in linear.__dict__
    )


def by_neuron(down: nn.Linear) -> torch.Tensor | None:
    """The weight of down_proj as a contiguous [M, H]: a row a neuron.

    The first call lays the parameter out anew, in place: its shape, its state-dict key and the bytes it takes stay,
    its strides become (1, H), until StochaMLP.train() undoes it. None where that was not done before and cannot be:
    while compiling or recording a CUDA graph, and among processes, whose sharding may own the memory.
    """
    transposed = down.weight.t()
    if not transposed.is_contiguous():
        if (
            torch.compiler.is_compiling()
            or (transposed.is_cuda and torch.cuda.is_current_stream_capturing())
            or (torch.distributed.is_available() and torch.distributed.is_initialized())
        ):
            return None
        with torch.inference_mode(False):
            old, down.weight.data = down.weight.data, transposed.detach().contiguous().t()
        if runtime := _runtime():
            runtime.release(old)
        transposed = down.weight.t()
    return transposed


def _runtime() -> Any:
    """stocha_hf.sparse.runtime if that package is installed, else None."""
    try:
        from stocha_hf.sparse import runtime
    except ImportError:
        return None
    return runtime


# The patched feed-forward layer and the models.


class StochaMLP(nn.Module):
    """A native gated MLP whose class was changed: same gate_proj, up_proj, down_proj; `act_fn` is the base activation.

    Modes are attributes of each layer, so two models in one process never share them. `forced` overrules `activation`
    and `inference`; the other attributes are those of StochaConfig.
    """

    state = (
        *("activation", "inference", "forced", "base", "p_tensor", "positive", "threshold", "k"),
        *("native_class", "kernels", "coarse"),
    )

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module
    activation: str
    inference: str
    forced: str | None
    base: str
    p_tensor: torch.Tensor
    positive: str
    threshold: float
    k: int
    native_class: type[nn.Module]
    kernels: Any  # stocha_hf.sparse.runtime.KERNELS, or None
    coarse: Any  # stocha_hf.sparse.coarse.CoarseGate, or None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of shape [..., hidden_size], any float dtype; returns the same shape and dtype."""
        name = self.running
        if not self.training and infers(x) and self.skips(x):
            if is_few(x):
                return self.decode(x, name)
            if x.is_cuda and self.has_kernels(x):
                by_neuron(self.down_proj)  # type: ignore[arg-type] # here, since a compiled step cannot
        return self.down_proj(ACTIVATIONS[name].function(self.gate_proj(x), self.up_proj(x), self))

    def decode(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """forward for a decode step: all of the gate, then only the active neurons' rows of up and columns of down.

        By stocha_hf's kernels where they are; else in PyTorch's operations, which on a CPU gather faster than they
        read all rows for one token and if less than a third is active.
        """
        linears: list[Any] = [self._modules[key] for key in ("gate_proj", "up_proj", "down_proj")]
        gate, up, down = linears
        function, cut = ACTIVATIONS[name].function, ACTIVATIONS[name].cut(self)  # type: ignore[misc]
        if self.has_kernels(x):
            if (down_t := by_neuron(down)) is not None:
                return self.kernels.ffn(x, gate.weight, up.weight, down_t, name, cut, self.coarse)
        elif x.is_cpu and x.numel() == x.shape[-1] and not torch.compiler.is_compiling():
            gates = gate(x)
            active = (~(gates <= cut)).flatten().nonzero().squeeze(1)  # NaN is active
            few = len(active) <= min(gates.shape[-1] // 3, GATHERED // (x.numel() * x.element_size()))
            if few and (down_t := by_neuron(down)) is not None:
                up_rows = up.weight.index_select(0, active)
                hidden = function(gates.index_select(-1, active), F.linear(x, up_rows), self)
                return hidden @ down_t.index_select(0, active)
            return down(function(gates, up(x), self))
        return down(function(gate(x), up(x), self))

    @property
    def running(self) -> str:
        """The name of the activation that a forward now runs."""
        return self.forced or (self.activation if self.training else self.inference)

    def has_kernels(self, x: torch.Tensor) -> bool:
        """Whether stocha_hf's kernels are there for x's device; a compiler always finds them, as an operator."""
        return self.kernels is not None and (torch.compiler.is_compiling() or self.kernels.available(x.device.type))

    def skips(self, x: torch.Tensor) -> bool:
        """Whether inactive neurons can be skipped: the activation makes zeros, and the matrices are plain."""
        linears: list[Any] = [self._modules[key] for key in ("gate_proj", "up_proj", "down_proj")]
        return ACTIVATIONS[self.running].cut is not None and all(
            is_plain(linear, x) and linear._parameters["bias"] is None for linear in linears
        )

    @property
    def p(self) -> Any:
        """A float; for a compiler a 0-dim float64 CPU tensor, which is an input of its graph and no constant in it, so
        that another p does not recompile.
        """
        return self.p_tensor if torch.compiler.is_compiling() else self.p_tensor.item()

    @p.setter
    def p(self, value: Any) -> None:
        # A new tensor: a backward that is still to come may need the old one. The device is named because models are
        # built on the meta device; no buffer, so that state dicts, casts and broadcasts leave it alone.
        self.p_tensor = torch.tensor(value, dtype=torch.float64, device="cpu")

    def train(self, mode: bool = True) -> StochaMLP:
        # Liger rebinds `forward` of the instance, which would bypass the activation in silence; every trainer calls
        # train().
        _refuse_liger(self.__dict__.get("forward"))
        down: Any = self.down_proj
        if mode and type(down) is nn.Linear and not down.weight.is_contiguous():
            with torch.inference_mode(False):  # undoes by_neuron, since optimizers want their states' layout
                down.weight.data = down.weight.data.contiguous()
        return super().train(mode)


def _refuse_liger(thing: object) -> None:
    if str(getattr(thing, "__module__", "")).startswith("liger_kernel"):
        raise ValueError(
            "Liger's fused SwiGLU is applied to this model: expected the native FFN, since Liger's kernel computes "
            "SiLU only and would bypass the activation; load the model with use_liger_kernel=False"
        )


def _is_native(module: nn.Module, *names: str) -> bool:
    return type(module).__name__ in names and type(module).__module__.startswith("transformers.models.")


def _native_mlps(model: nn.Module, row: Architecture, config: Any) -> list[nn.Module]:
    """The model's gated MLPs in layer order, after checking that there is one per layer."""
    for module in model.modules():
        _refuse_liger(type(module))
        _refuse_liger(module.__dict__.get("forward"))
    mlps = [module for module in model.modules() if _is_native(module, row.mlp)]
    _require(
        len(mlps) == config.num_hidden_layers,
        "the number of native MLPs",
        len(mlps),
        f"{config.num_hidden_layers} {row.mlp}",
    )
    return mlps


def patch_mlps(mlps: list[nn.Module], config: StochaConfig) -> None:
    thresholds = config.threshold if isinstance(config.threshold, list) else [config.threshold] * len(mlps)
    _require(len(thresholds) == len(mlps), "threshold", config.threshold, f"one number, or {len(mlps)}: one per layer")
    kernels = runtime.KERNELS if (runtime := _runtime()) else None
    for mlp, threshold in zip(mlps, thresholds, strict=True):
        state = {key: getattr(config, key, None) for key in StochaMLP.state}
        mlp.__dict__.update(state | {"native_class": type(mlp), "threshold": threshold, "kernels": kernels})
        mlp.act_fn = ACT2FN[config.base]
        mlp.__class__ = StochaMLP
        mlp.p = config.p  # type: ignore[assignment]


def stocha_mlps(model: nn.Module) -> list[StochaMLP]:
    """The patched MLPs of a model in layer order. By name, since each trust_remote_code load has its own StochaMLP
    class.
    """
    name = StochaMLP.__name__  # of the class, or of the one that FSDP2 derived a class of its own from
    return [m for m in model.modules() if any(cls.__name__ == name for cls in type(m).__mro__)]  # type: ignore[misc]


def _checked_mlps(model: nn.Module, activation: str, p: float | None) -> list[StochaMLP]:
    """The patched MLPs, after checking that they can run this activation; None keeps p."""
    mlps = stocha_mlps(model)
    _require(bool(mlps), "the model", type(model).__name__, "a patched model: see stocha_hf.patch")
    StochaConfig(activation=activation, p=mlps[0].p if p is None else p, k=mlps[0].k)
    return mlps


def set_activation(model: nn.Module, activation: str, p: float | None = None) -> None:
    """What a model runs in train() mode from now on, for a schedule: the lasting counterpart of stocha_mode.

    Also for a model inside wrappers (DDP, FSDP, peft, torch.compile). May be called at every step: a p that changes
    does not recompile a compiled model, another activation does once. Everything is checked before anything changes;
    raises ValueError as stocha_mode does.
    """
    for mlp in _checked_mlps(model, activation, p):
        if mlp.activation != activation:
            mlp.activation = activation
        if p is not None and mlp.p != p:
            mlp.p = p


@contextmanager
def stocha_mode(model: nn.Module, name: str, p: float | None = None) -> Iterator[nn.Module]:
    """Force one activation of the table in train() and eval() alike, optionally with another p; restored on exit.

    Raises ValueError for an unknown name, a p outside [0, 1] or a model without patched MLPs.
    """
    mlps = _checked_mlps(model, name, p)
    before = [(mlp.forced, mlp.p) for mlp in mlps]
    try:
        for mlp in mlps:
            mlp.forced, mlp.p = name, mlp.p if p is None else p
        yield model
    finally:
        for mlp, (forced, old_p) in zip(mlps, before, strict=True):
            mlp.forced, mlp.p = forced, old_p


def patch(model: nn.Module, config: StochaConfig) -> int:
    """Turn a native model (or the one inside a wrapper such as peft's) into its stocha class, in place.

    Returns the number of patched MLPs. Everything is checked before anything changes; raises ValueError for a model of
    no known architecture, one that is patched already, one with Liger applied, or a base that is not the model's own.
    """
    _require(not stocha_mlps(model), "the model", "already patched", "a native model: call stocha_hf.unpatch first")
    by_name = {name: row for row in ARCHITECTURES.values() for name in (row.causal_lm, row.model)}
    native = next((module for module in model.modules() if _is_native(module, *by_name)), None)
    if native is None:
        raise ValueError(f"the model is a {type(model).__name__}: expected one of {', '.join(by_name)}")
    row = by_name[type(native).__name__]
    hf_config: Any = native.config
    converted = getattr(hf_config, "stocha", None)
    config = config.resolve(converted["base"] if converted else getattr(hf_config, row.act_key))
    patch_mlps(_native_mlps(native, row, hf_config), config)
    native.__class__ = globals()[f"Stocha{type(native).__name__}"]
    if runtime := _runtime():
        runtime.install(native)
    hf_config.stocha, hf_config.auto_map = config.to_dict(), row.auto_map
    setattr(hf_config, row.act_key, config.native_act)
    return len(stocha_mlps(native))


def unpatch(model: nn.Module) -> int:
    """Give a patched model its native classes and its base activation back, in place; returns the number of MLPs."""
    mlps = stocha_mlps(model)
    _require(bool(mlps), "the model", type(model).__name__, "a patched model")
    for module in model.modules():
        if native_class := getattr(module, "native_class", None):  # MLPs, and what stocha_hf's kernels replaced
            module.__class__ = native_class
    for mlp in mlps:
        for key in StochaMLP.state:
            del mlp.__dict__[key]
    patched = next(module for module in model.modules() if hasattr(type(module), "stocha_mode"))
    patched.__class__ = next(cls for cls in type(patched).__mro__ if f"Stocha{cls.__name__}" == type(patched).__name__)
    hf_config: Any = patched.config
    setattr(hf_config, ARCHITECTURES[hf_config.model_type].act_key, hf_config.stocha["base"])
    del hf_config.stocha, hf_config.auto_map
    return len(mlps)


class StochaModel:
    """Mixin before a native class: patches the MLPs after construction and saves a checkpoint that loads by itself."""

    config: Any

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to register: save_pretrained writes auto_map and this file, also for a class that FSDP renamed."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        entry = getattr(config, "stocha", None)
        _require(entry is not None, "the config's stocha entry", None, "one: run stocha-convert on the model first")
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        row = ARCHITECTURES[config.model_type]
        patch_mlps(_native_mlps(self, row, config), StochaConfig.from_dict(entry))  # type: ignore[arg-type]
        if runtime := _runtime():
            runtime.install(self)

    def stocha_mode(self, name: str, p: float | None = None) -> Any:
        """`with model.stocha_mode("relu"): ...`; see the function of the same name."""
        return stocha_mode(self, name, p)  # type: ignore[arg-type]

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As the native one; the folder gets this file, and its config names it and the native architecture."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        # The native method wrote our class name, which tools without remote code do not know.
        self.config.architectures = [name.removeprefix("Stocha") for name in self.config.architectures]
        self.config.auto_map = ARCHITECTURES[self.config.model_type].auto_map
        if kwargs.get("is_main_process", True):
            self.config.save_pretrained(save_directory)
            shutil.copyfile(__file__, os.path.join(save_directory, os.path.basename(__file__)))
        if push_to_hub:
            hub = {key: kwargs[key] for key in ("commit_message", "private", "token", "create_pr") if key in kwargs}
            self.push_to_hub(kwargs.get("repo_id") or os.path.basename(os.fspath(save_directory)), **hub)  # type: ignore


class StochaLlamaForCausalLM(StochaModel, LlamaForCausalLM):
    """LlamaForCausalLM with stocha MLPs."""


class StochaLlamaModel(StochaModel, LlamaModel):
    """LlamaModel with stocha MLPs."""


class StochaMistralForCausalLM(StochaModel, MistralForCausalLM):
    """MistralForCausalLM with stocha MLPs."""


class StochaMistralModel(StochaModel, MistralModel):
    """MistralModel with stocha MLPs."""


class StochaQwen2ForCausalLM(StochaModel, Qwen2ForCausalLM):
    """Qwen2ForCausalLM with stocha MLPs."""


class StochaQwen2Model(StochaModel, Qwen2Model):
    """Qwen2Model with stocha MLPs."""


class StochaQwen3ForCausalLM(StochaModel, Qwen3ForCausalLM):
    """Qwen3ForCausalLM with stocha MLPs."""


class StochaQwen3Model(StochaModel, Qwen3Model):
    """Qwen3Model with stocha MLPs."""


class StochaGemma2ForCausalLM(StochaModel, Gemma2ForCausalLM):
    """Gemma2ForCausalLM with stocha MLPs."""


class StochaGemma2Model(StochaModel, Gemma2Model):
    """Gemma2Model with stocha MLPs."""


class StochaGemma3ForCausalLM(StochaModel, Gemma3ForCausalLM):
    """Gemma3ForCausalLM with stocha MLPs."""


class StochaGemma3TextModel(StochaModel, Gemma3TextModel):
    """Gemma3TextModel with stocha MLPs."""


# transformers' own list of causal models by class name: without these, pipeline() prints a page of "not supported" and
# Trainer's label smoothing does not shift the labels.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.update(
    {f"stocha_{model_type}": f"Stocha{row.causal_lm}" for model_type, row in ARCHITECTURES.items()}
)
