"""A model's modules as the structures that a whole decode step reads, made once and checked before each use.

A plan exists where each module is the native one, or a quantized one, and nothing hangs on its call. Architectures are
rows of a table (families.py). `of` asks a plan whether the model is still what it was made from (watch.py), or makes a
new one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stocha_hf.decoding import structs
from stocha_hf.decoding.cuts import with_cut
from stocha_hf.decoding.families import FAMILIES
from stocha_hf.decoding.memory import use_large_pages, use_own_large_pages
from stocha_hf.decoding.structs import is_cut, matrix, matrix_of, pointer
from stocha_hf.decoding.watch import ATTENTION, Refused, Watch
from stocha_hf.spec import ACTIVATIONS

CHANGING_ROTARY = ("dynamic", "longrope")  # whose frequencies depend on the length


class Plan(Watch):
    """The structures of one model. `layers` is to be copied by who adds a cache to it; so is `cut_layers`, which steps
    with cuts read where the model has matrices in both layouts, and which is None elsewhere.
    """

    def __init__(self, model: Any) -> None:
        """Raises Refused where a step must call the modules."""
        super().__init__(model, torch.device("cpu"))
        self.kept: list[Any] = []  # what structures point to and nobody else may hold
        config = self.config
        family = FAMILIES.get(config.model_type)
        if "lm_head" not in model._modules or family is None or config._attn_implementation not in ATTENTION:
            raise Refused
        if getattr(config, "use_bidirectional_attention", False):
            raise Refused
        self.family = family
        if self.dtype not in structs.DTYPES:
            raise Refused
        self.module(model, type(model))
        base = model._modules["model"]
        self.module(base, type(base))
        parts = base._modules
        self.frequencies = self._rotary(parts["rotary_emb"])
        embedding, factor = self._embedding(parts["embed_tokens"])
        head = self._linear(model._modules["lm_head"])
        self.module(parts["layers"], nn.ModuleList)
        layers = [self._layer(layer) for layer in parts["layers"][: config.num_hidden_layers]]
        self.layers = (structs.Layer * len(layers))(*layers)
        self.cut_layers = self._cut_layers(parts["layers"])
        attention = parts["layers"][0].self_attn
        heads = layers[0].q.outputs // attention.head_dim
        self.head_dim, self.key_heads = attention.head_dim, layers[0].k.outputs // attention.head_dim
        self.vocabulary, self.windows = head.rows, [layer.window for layer in layers]
        self.model = structs.Model(
            None, len(layers), embedding, head, self._norm(parts["norm"]), structs.DTYPES[self.dtype],
            config.hidden_size, heads, self.key_heads, self.head_dim, family.is_gemma, config.rms_norm_eps, factor,
            getattr(config, "final_logit_softcapping", None) or 0.0,
        )  # fmt: skip

    def _norm(self, module: nn.Module | None) -> int | None:
        if module is None:
            return None
        self.module(module, self.family.kind("RMSNorm"))
        return pointer(self.parameter(module, "weight"))

    def _linear(self, module: Any) -> structs.Matrix:
        self._weights(module, nn.Linear)
        if module._parameters.get("bias") is not None:
            self.parameter(module, "bias")
        if not is_cut(module):
            return matrix_of(module)
        self.cut(module)
        copy = None if structs.is_quantized(module) or module.input_centre else self.input_major(module)
        found = matrix_of(module) if copy is None else matrix(copy, module._parameters["bias"], rows_are_inputs=True)
        return with_cut(found, module, self.dtype)

    def _weights(self, module: Any, native: type) -> None:
        quantized = structs.is_quantized(module)
        cuts_native = is_cut(module) and module.native_class is native
        self.module(module, type(module) if quantized or cuts_native else native)
        if not quantized:
            self.parameter(module, "weight")
            return
        holder = module.__dict__.get("tied_to", (module,))[0]
        for name in ("codes", "scale"):
            tensor = getattr(module, name)
            (use_own_large_pages if module.transposed else use_large_pages)(tensor)
            self.tensor(holder._buffers, name, tensor)

    def _embedding(self, module: Any) -> tuple[structs.Matrix, float]:
        scaled = self.family.kind("TextScaledWordEmbedding")
        self._weights(module, scaled or nn.Embedding)
        own = "factor" if structs.is_quantized(module) else "scalar_embed_scale"
        factor = getattr(module, own, 1.0)
        return matrix_of(module), torch.tensor(factor, dtype=self.dtype).item()

    def _rotary(self, module: Any) -> dict[str | None, tuple[int, float]]:
        """Frequencies and scale by layer type, None for all."""
        self.module(module, self.family.kind("RotaryEmbedding"))
        named = isinstance(module.rope_type, dict)  # Gemma 3's, by layer type
        types = module.rope_type if named else {None: module.rope_type}
        if any(kind in CHANGING_ROTARY for kind in types.values()):
            raise Refused
        found = {}
        for layer_type in types:
            prefix = f"{layer_type}_" if named else ""
            frequencies = module._buffers[f"{prefix}inv_freq"].float().contiguous()
            self.kept.append(frequencies)
            found[layer_type] = frequencies.data_ptr(), float(getattr(module, f"{prefix}attention_scaling"))
        return found

    def _layer(self, layer: Any) -> structs.Layer:
        self.module(layer, self.family.kind("DecoderLayer"))
        parts = layer._modules
        attention = parts["self_attn"]
        self.module(attention, self.family.kind("Attention"))
        projections = [self._linear(attention._modules[name]) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        if self.family.is_gemma:
            names = [f"{part}_layernorm" for part in ("post_attention", "pre_feedforward", "post_feedforward")]
            around = [self._norm(parts[name]) for name in names]
        else:
            around = [None, self._norm(parts["post_attention_layernorm"]), None]
        layer_type = getattr(attention, "layer_type", None)
        window = getattr(self.config if self.family.has_one_window else attention, "sliding_window", None)
        # of Gemma 2; PyTorch's own attention, which transformers takes for it, does not cap
        capped = self.config.model_type == "gemma2" and self.config._attn_implementation != "sdpa"
        soft_cap = getattr(attention, "attn_logit_softcapping", None) if capped else None
        return structs.Layer(
            *projections, self._ffn(parts["mlp"]), self._norm(parts["input_layernorm"]), *around,
            *(self._norm(attention._modules.get(name)) for name in ("q_norm", "k_norm")),
            *self.frequencies[layer_type if layer_type in self.frequencies else None],
            attention.scaling, soft_cap or 0.0, window or 0,
        )  # fmt: skip

    def _cut_layers(self, modules: Any) -> Any:
        """The layers with the copies of both_layouts.py in them."""
        found = type(self.layers).from_buffer_copy(self.layers)
        before = len(self.layouts)
        for layer, made in zip(modules, found, strict=False):
            for part, matrices in (("self_attn", made), ("mlp", made.ffn)):
                for name, module in layer._modules[part]._modules.items():
                    if is_cut(module) and (copy := self.layout(module)) is not None:
                        field = name.removesuffix("_proj")
                        setattr(matrices, field, copy.like(getattr(matrices, field)))
        return found if any(copy is not None for _, copy in self.layouts[before:]) else None

    def _ffn(self, mlp: Any) -> structs.Ffn:
        if "decode_state" not in mlp.__dict__ or mlp.running not in structs.KERNEL_ACTIVATIONS:
            raise Refused
        self.module(mlp, type(mlp))
        self.module(mlp.act_fn, type(mlp.act_fn))
        gate, up, down = (mlp._modules[name] for name in ("gate_proj", "up_proj", "down_proj"))
        skips = ACTIVATIONS[mlp.running].cut is not None
        matrices = [self._linear(part) for part in (gate, up, down)]
        if skips and not structs.is_quantized(down) and not matrices[2].rows_are_inputs:
            copy = matrix(self.neuron_major(mlp), rows_are_inputs=True)
            matrices[2] = with_cut(copy, down, self.dtype)
        threshold = self.rule(mlp)
        if any(m.bias for m in matrices):
            raise Refused
        coarse = None if is_cut(gate) else self.coarse(mlp)
        told = structs.GateCopy() if coarse is None else coarse.structure()
        return structs.Ffn(*matrices, told, structs.KERNEL_ACTIVATIONS[mlp.running], threshold)


def of(model: Any) -> Plan | None:
    """Return the current plan of a patched causal language model in eval mode, None where modules must be called."""
    plan = model.__dict__.get("decode_plan")
    if plan is None or not plan.is_current():
        try:
            plan = Plan(model)
        except Refused:
            plan = None
        model.__dict__["decode_plan"] = plan
    return plan
