"""A model's modules as the tensors that a GPU's whole decode step reads, made once and checked before each use.

For Llama, Mistral, Qwen 2 and 3, as they are or with an activation that makes zeros. `weights_of` takes any such
model, also a native one: so a dense model can be timed in the same step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton
from torch import nn

from stocha_hf.cuts import PROJECTIONS
from stocha_hf.decoding import triton_ffn
from stocha_hf.decoding.families import FAMILIES
from stocha_hf.decoding.gpu_cuts import listed
from stocha_hf.decoding.gpu_draft import GpuDraft
from stocha_hf.decoding.gpu_step import GpuStep
from stocha_hf.decoding.gpu_weights import CutWeights, LayerWeights, Weights
from stocha_hf.decoding.packed_gate import PackedGate
from stocha_hf.decoding.plan import CHANGING_ROTARY
from stocha_hf.decoding.structs import is_cut
from stocha_hf.decoding.watch import ATTENTION, Refused, Watch
from stocha_hf.spec import ACTIVATIONS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Step = TypeVar("Step", bound=GpuStep)
TOGETHER = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})  # one kernel multiplies: all cut, or none


class GpuPlan(Watch):
    """The tensors of one model, and its steps."""

    def __init__(self, model: Any) -> None:
        """Raises Refused where a step must call the modules."""
        super().__init__(model, model.device)
        config = self.config
        family = FAMILIES.get(config.model_type)
        if "lm_head" not in model._modules or family is None or family.is_gemma or self.dtype not in DTYPES:
            raise Refused
        if config._attn_implementation not in ATTENTION or getattr(config, "use_bidirectional_attention", False):
            raise Refused
        self.family = family
        self.module(model, type(model))
        base = model._modules["model"]
        self.module(base, type(base))
        parts = base._modules
        self.module(parts["layers"], nn.ModuleList)
        layers = [self._layer(layer) for layer in parts["layers"][: config.num_hidden_layers]]
        head, head_bias = self._linear(model._modules["lm_head"])
        attention = parts["layers"][0].self_attn
        dim = self.dim = attention.head_dim
        heads, key_heads = len(layers[0].qkv[0]) // dim, len(layers[0].qkv[1]) // dim
        if dim % 2 or heads % key_heads or len({layer.gate.shape for layer in layers}) > 1:
            raise Refused
        self.module(parts["embed_tokens"], nn.Embedding)
        self.weights = Weights(
            self.parameter(parts["embed_tokens"], "weight"), layers, self._norm(parts["norm"]), head, head_bias,
            *self._rotary(parts["rotary_emb"]), config.rms_norm_eps, heads, key_heads, dim,
        )  # fmt: skip
        self.steps: dict[tuple[int, bool], GpuStep] = {}  # by the number of their tokens, and whether they may cut
        self.drafting: GpuDraft | None = None
        self.in_use = threading.Lock()  # by a loop or a call: a step's state is that of one sequence

    def step(self, tokens: int, cuts: bool = True) -> GpuStep | None:
        """Return a step of at least so many tokens, its graph recorded; None, after one warning that names the cause,
        where its kernels cannot be built. It cuts inputs where the model says so, unless `cuts` is false.
        """
        key = count, cuts = triton.next_power_of_2(tokens), cuts and tokens == 1
        if key not in self.steps:
            may = count == 1 or not self.cuts(count)
            step = _recorded(lambda: GpuStep(self.weights, count, cuts=cuts)) if may else None
            if step is None:
                return None
            self.steps[key] = step
        return self.steps[key]

    def draft(self, first: int) -> GpuDraft | None:
        """Return a step of one token that looks at the first tokens of the vocabulary; None as `step`."""
        if self.drafting is None or self.drafting.first != first:
            self.drafting = _recorded(lambda: GpuDraft(self.weights, first))
        return self.drafting

    def _norm(self, module: Any) -> torch.Tensor:
        self.module(module, self.family.kind("RMSNorm"))
        return self.parameter(module, "weight")

    def _linear(self, module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        cuts = is_cut(module)
        self.module(module, type(module) if cuts and module.native_class is nn.Linear else nn.Linear)
        if cuts:
            if module.input_centre or getattr(module, "factors", ()):
                raise Refused  # what is cut counts; tokens have factors of their own
            self.cut(module)
        bias = None if module._parameters.get("bias") is None else self.parameter(module, "bias")
        return self.parameter(module, "weight"), bias

    def _rotary(self, module: Any) -> tuple[torch.Tensor, float]:
        """Frequencies, float32, and the scale of cosines and sines."""
        self.module(module, self.family.kind("RotaryEmbedding"))
        if isinstance(module.rope_type, dict) or module.rope_type in CHANGING_ROTARY:
            raise Refused
        frequencies = module._buffers["inv_freq"].float().contiguous()
        if frequencies.device != self.device or 2 * len(frequencies) != self.dim:
            raise Refused  # a part of a head's entries only
        return frequencies, float(module.attention_scaling)

    def _layer(self, layer: Any) -> LayerWeights:
        self.module(layer, self.family.kind("DecoderLayer"))
        parts = layer._modules
        attention = parts["self_attn"]
        self.module(attention, self.family.kind("Attention"))
        inner = attention._modules
        qkv, biases = zip(*(self._linear(inner[name]) for name in ("q_proj", "k_proj", "v_proj")), strict=True)
        if len({bias is None for bias in biases}) > 1:
            raise Refused
        norms = (self._norm(inner["q_norm"]), self._norm(inner["k_norm"])) if "q_norm" in inner else None
        window = getattr(self.config if self.family.has_one_window else attention, "sliding_window", None)
        o, o_bias = self._linear(inner["o_proj"])
        return LayerWeights(
            input_norm=self._norm(parts["input_layernorm"]),
            qkv=qkv,
            qkv_bias=None if biases[0] is None else biases,
            head_norms=norms,
            o=o,
            o_bias=o_bias,
            ffn_norm=self._norm(parts["post_attention_layernorm"]),
            scaling=attention.scaling,
            window=window or 0,
            **self._ffn(parts["mlp"]),
            cuts=self._cuts(inner | parts["mlp"]._modules),
        )

    def _cuts(self, modules: dict[str, Any]) -> dict[str, CutWeights]:
        """Which projections cut in a step of one token."""
        names = [name for name in PROJECTIONS if is_cut(modules[name])]
        if any(0 < len(group & set(names)) < len(group) for group in TOGETHER):
            raise Refused
        if not self.cuts(1):
            return {}
        limits = {name: torch.tensor(modules[name].input_threshold, dtype=self.dtype).item() for name in names}
        turned = listed(self.config.hidden_size)
        return {
            name: CutWeights(self.input_major(modules[name]) if name in turned else None, limit)
            for name, limit in limits.items()
        }

    def _ffn(self, mlp: Any) -> dict[str, Any]:
        """Its fields of LayerWeights."""
        is_patched = "decode_state" in mlp.__dict__
        activation = mlp.running if is_patched else self.config.hidden_act
        skips = activation in ACTIVATIONS and ACTIVATIONS[activation].cut is not None
        if not skips and activation != "silu":
            raise Refused
        self.module(mlp, type(mlp) if is_patched else self.family.kind("MLP"))
        self.module(mlp.act_fn, type(mlp.act_fn))
        found = [self._linear(mlp._modules[name]) for name in ("gate_proj", "up_proj", "down_proj")]
        if any(bias is not None for _, bias in found):
            raise Refused
        skips = skips and is_patched
        gate, down = mlp._modules["gate_proj"], mlp._modules["down_proj"]
        coarse = self.coarse(mlp) if skips and not is_cut(gate) else None
        down_t = None
        if skips:
            down_t = self.input_major(down) if is_cut(down) and self.cuts(1) else self.neuron_major(mlp)
        return {
            **dict(zip(("gate", "up", "down"), (weight for weight, _ in found), strict=True)),
            "down_t": down_t,
            "activation": activation,
            "cut": self.rule(mlp) if is_patched else 0.0,
            "coarse": coarse if isinstance(coarse, PackedGate) else None,
        }


def _recorded(make: Callable[[], Step]) -> Step | None:
    """Make a step and record its graph; None, after one warning, where that fails."""
    if not triton_ffn.available():
        return None
    try:
        with torch.inference_mode(False), torch.no_grad():  # its buffers serve both
            step = make()
            step.record()
    except Exception as error:  # of the compiler, the linker, the driver: Triton has no common class
        triton_ffn.fail(error)
        return None
    return step


def weights_of(model: Any) -> Weights:
    """Return a model's weights. Raises Refused where a step must call its modules."""
    return GpuPlan(model).weights


def of(model: Any) -> GpuPlan | None:
    """Return the current plan of a causal language model in eval mode, None where modules must be called.

    A plan that a loop has for itself stays the model's, with its graphs, also where a call within that loop would need
    another one.
    """
    plan = model.__dict__.get("gpu_plan")
    if plan is None or not plan.is_current():
        if plan is not None and plan.in_use.locked():
            return None
        try:
            plan = GpuPlan(model)
        except Refused:
            plan = None
        model.__dict__["gpu_plan"] = plan
    return plan
