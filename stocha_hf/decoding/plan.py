"""A model's modules as the structures that a whole decode step reads, made once and checked before each use.

A plan exists where each module is the native one, or a quantized one, and nothing hangs on its call. Architectures are
rows of a table. What a plan was made from is listed in it: modules with their classes, tensors with their addresses.
`of` compares these lists, which takes tenths of a millisecond, and makes a new plan when anything differs.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stocha_hf.decoding import structs
from stocha_hf.decoding.conditions import is_called
from stocha_hf.decoding.ffn import zero_up_to
from stocha_hf.decoding.layers import IN_A_STEP
from stocha_hf.decoding.state import key_of, neuron_major
from stocha_hf.decoding.structs import matrix, matrix_of, pointer
from stocha_hf.spec import ACTIVATIONS

ATTENTION = ("sdpa", "eager")  # what transformers may be asked to compute attention with
CHANGING_ROTARY = ("dynamic", "longrope")  # whose frequencies depend on the length


@dataclass(frozen=True)
class Family:
    """Where a model_type's classes are, and their prefix. Gemma's have norms around both halves of a layer, whose
    weights count from 1. Mistral has one sliding window for all layers, which its attention reads in the config.
    """

    module: str
    prefix: str
    is_gemma: bool = False
    has_one_window: bool = False

    def kind(self, name: str) -> Any:
        """Return a class of the native file, such as DecoderLayer, or None."""
        native = importlib.import_module(f"transformers.models.{self.module}.modeling_{self.module}")
        return getattr(native, self.prefix + name, None)


FAMILIES = {
    "llama": Family("llama", "Llama"),
    "mistral": Family("mistral", "Mistral", has_one_window=True),
    "qwen2": Family("qwen2", "Qwen2"),
    "qwen3": Family("qwen3", "Qwen3"),
    "gemma2": Family("gemma2", "Gemma2", is_gemma=True),
    "gemma3_text": Family("gemma3", "Gemma3", is_gemma=True),
}


class _Refused(Exception):
    """Something of the model must be called."""


class Plan:
    """The structures of one model. `layers` is to be copied by who adds a cache to it."""

    def __init__(self, model: Any) -> None:
        """Raises _Refused where a step must call the modules."""
        self.modules: list[tuple[nn.Module, type]] = []
        self.children: list[tuple[Any, str, Any]] = []  # a module's table, a name in it, the child
        self.tensors: list[tuple[Any, str, Any, int]] = []  # the same of a tensor, and its address
        self.rules: list[tuple[Any, str, float]] = []  # an MLP, its activation and threshold
        self.gates: list[tuple[Any, Any]] = []  # an MLP that skips neurons, and its transposed down
        self.kept: list[Any] = []  # what structures point to and nobody else may hold
        config = self.config = model.config
        family = FAMILIES.get(config.model_type)
        if "lm_head" not in model._modules or family is None or config._attn_implementation not in ATTENTION:
            raise _Refused
        if getattr(config, "use_bidirectional_attention", False):
            raise _Refused
        self.family, self.dtype = family, model.dtype
        if self.dtype not in structs.DTYPES:
            raise _Refused
        self._watch(model, type(model))
        base = model._modules["model"]
        self._watch(base, type(base))
        parts = base._modules
        self.frequencies = self._rotary(parts["rotary_emb"])
        embedding, factor = self._embedding(parts["embed_tokens"])
        head = self._linear(model._modules["lm_head"])
        self._watch(parts["layers"], nn.ModuleList)
        layers = [self._layer(layer) for layer in parts["layers"][: config.num_hidden_layers]]
        self.layers = (structs.Layer * len(layers))(*layers)
        attention = parts["layers"][0].self_attn
        heads = layers[0].q.rows // attention.head_dim
        self.head_dim, self.key_heads = attention.head_dim, layers[0].k.rows // attention.head_dim
        self.vocabulary, self.windows = head.rows, [layer.window for layer in layers]
        self.model = structs.Model(
            None, len(layers), embedding, head, self._norm(parts["norm"]), structs.DTYPES[self.dtype],
            config.hidden_size, heads, self.key_heads, self.head_dim, family.is_gemma, config.rms_norm_eps, factor,
            getattr(config, "final_logit_softcapping", None) or 0.0,
        )  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # copies and pickles of a model do not take it along

    def is_current(self) -> bool:
        """Return whether the model is what the plan was made from."""
        return (
            all(_is(module, kind) and not is_called(module) for module, kind in self.modules)
            and all(table.get(name) is child for table, name, child in self.children)
            and all(table.get(name) is tensor and tensor.data_ptr() == at for table, name, tensor, at in self.tensors)
            and all(mlp.running == name and zero_up_to(mlp) == cut for mlp, name, cut in self.rules)
            and all(neuron_major(mlp) is down_t for mlp, down_t in self.gates)
            and self.config._attn_implementation in ATTENTION
        )

    def _watch(self, module: nn.Module, kind: type | None) -> None:
        """Note a module that must stay of this class, with its children, without anything that hangs on its call."""
        if kind is None or not _is(module, kind) or is_called(module):
            raise _Refused
        self.modules.append((module, kind))
        self.children += [(module._modules, name, child) for name, child in module._modules.items()]

    def _tensor(self, module: nn.Module, name: str) -> torch.Tensor:
        tensor = module._parameters.get(name)
        if type(tensor) is not nn.Parameter or not _is_plain(tensor, self.dtype):
            raise _Refused
        self.tensors.append((module._parameters, name, tensor, tensor.data_ptr()))
        return tensor

    def _norm(self, module: nn.Module | None) -> int | None:
        if module is None:
            return None
        self._watch(module, self.family.kind("RMSNorm"))
        return pointer(self._tensor(module, "weight"))

    def _linear(self, module: Any) -> structs.Matrix:
        self._weights(module, nn.Linear)
        if module._parameters.get("bias") is not None:
            self._tensor(module, "bias")
        return matrix_of(module)

    def _weights(self, module: Any, native: type) -> None:
        if hasattr(module, "input_threshold"):
            raise _Refused  # it cuts its input, which is to be done by its own forward
        quantized = structs.is_quantized(module)
        self._watch(module, type(module) if quantized else native)
        if not quantized:
            self._tensor(module, "weight")
            return
        holder = module.__dict__.get("tied_to", (module,))[0]
        for name in ("codes", "scale"):
            tensor = getattr(module, name)
            if not _is_plain(tensor, None):
                raise _Refused
            self.tensors.append((holder._buffers, name, tensor, tensor.data_ptr()))

    def _embedding(self, module: Any) -> tuple[structs.Matrix, float]:
        scaled = self.family.kind("TextScaledWordEmbedding")
        self._weights(module, scaled or nn.Embedding)
        own = "factor" if structs.is_quantized(module) else "scalar_embed_scale"
        factor = getattr(module, own, 1.0)
        return matrix_of(module), torch.tensor(factor, dtype=self.dtype).item()

    def _rotary(self, module: Any) -> dict[str | None, tuple[int, float]]:
        """Frequencies and scale by layer type, None for all."""
        self._watch(module, self.family.kind("RotaryEmbedding"))
        named = isinstance(module.rope_type, dict)  # Gemma 3's, by layer type
        types = module.rope_type if named else {None: module.rope_type}
        if any(kind in CHANGING_ROTARY for kind in types.values()):
            raise _Refused
        found = {}
        for layer_type in types:
            prefix = f"{layer_type}_" if named else ""
            frequencies = module._buffers[f"{prefix}inv_freq"].float().contiguous()
            self.kept.append(frequencies)
            found[layer_type] = frequencies.data_ptr(), float(getattr(module, f"{prefix}attention_scaling"))
        return found

    def _layer(self, layer: Any) -> structs.Layer:
        self._watch(layer, self.family.kind("DecoderLayer"))
        parts = layer._modules
        attention = parts["self_attn"]
        self._watch(attention, self.family.kind("Attention"))
        projections = [self._linear(attention._modules[name]) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        if self.family.is_gemma:
            names = [f"{part}_layernorm" for part in ("post_attention", "pre_feedforward", "post_feedforward")]
            around = [self._norm(parts[name]) for name in names]
        else:
            around = [None, self._norm(parts["post_attention_layernorm"]), None]
        layer_type = getattr(attention, "layer_type", None)
        window = getattr(self.config if self.family.has_one_window else attention, "sliding_window", None)
        soft_cap = getattr(attention, "attn_logit_softcapping", None) if self.config.model_type == "gemma2" else None
        return structs.Layer(
            *projections, self._ffn(parts["mlp"]), self._norm(parts["input_layernorm"]), *around,
            *(self._norm(attention._modules.get(name)) for name in ("q_norm", "k_norm")),
            *self.frequencies[layer_type if layer_type in self.frequencies else None],
            attention.scaling, soft_cap or 0.0, window or 0,
        )  # fmt: skip

    def _ffn(self, mlp: Any) -> structs.Ffn:
        if "decode_state" not in mlp.__dict__ or mlp.running not in structs.ACTIVATIONS:
            raise _Refused
        self._watch(mlp, type(mlp))
        self._watch(mlp.act_fn, type(mlp.act_fn))
        gate, up, down = (mlp._modules[name] for name in ("gate_proj", "up_proj", "down_proj"))
        matrices = [self._linear(part) for part in (gate, up, down)]
        skips = ACTIVATIONS[mlp.running].cut is not None
        threshold = zero_up_to(mlp)
        self.rules.append((mlp, mlp.running, threshold))
        is_transposed = getattr(down, "transposed", False)
        if any(m.bias for m in matrices) or (structs.is_quantized(down) and not is_transposed):
            raise _Refused
        if skips and not structs.is_quantized(down):
            down_t = neuron_major(mlp)
            if down_t is None:
                raise _Refused
            self.gates.append((mlp, down_t))
            matrices[2], is_transposed = matrix(down_t), True
        coarse = None if mlp.decode_state is None else mlp.decode_state.coarse
        pointers: list[int | None] = [None, None]
        margin = 0.0
        if coarse is not None and not structs.is_quantized(gate) and coarse.key == key_of(gate.weight):
            pointers, margin = [pointer(coarse.weights), pointer(coarse.scales)], coarse.margin
            self.kept.append(coarse)
        return structs.Ffn(*matrices, *pointers, structs.ACTIVATIONS[mlp.running], is_transposed, threshold, margin)


def _is(module: nn.Module, kind: type) -> bool:
    """Whether a module is of this class, or of the one that it has while another thread is in a step of the model."""
    return type(module) is kind or type(module) is IN_A_STEP.get(kind)


def _is_plain(tensor: torch.Tensor, dtype: torch.dtype | None) -> bool:
    return tensor.is_cpu and tensor.is_contiguous() and dtype in (None, tensor.dtype)


def of(model: Any) -> Plan | None:
    """Return the current plan of a patched causal language model in eval mode, None where modules must be called."""
    plan = model.__dict__.get("decode_plan")
    if plan is None or not plan.is_current():
        try:
            plan = Plan(model)
        except _Refused:
            plan = None
        model.__dict__["decode_plan"] = plan
    return plan
