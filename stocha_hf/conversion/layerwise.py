"""A model run layer by layer from its checkpoint folder: one decoder layer in memory, all text through it, then the
next.

transformers' own modules compute everything, so whatever an architecture does with masks, rotary embeddings, norms or
biases is right by construction: the model's forward runs once with layers that only note what they are called with,
and the real layers are then called with that. A layer's attention half is the layer with an FFN that returns zeros.

    layers = Layers(Tensors(folder), config, "cpu")
    hidden = layers.embed(token_ids)
    with layers.load(0) as layer:
        stream, ffn_input = layers.attention(layer, 0, hidden)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from stocha_hf.checkpoints.tensors import ModelTensors, Tensors
from stocha_hf.cuts import TOKEN_FACTOR
from stocha_hf.errors import StochaError
from stocha_hf.quantization_stocha import computing_dtype

EMBEDDING = "embed_tokens.weight"


def autocast(device: str | torch.device) -> torch.autocast:
    """Products in bfloat16; in float32 on a processor without, where those take many times as long."""
    kind = torch.device(device).type
    dtype = computing_dtype(torch.empty(0, dtype=torch.bfloat16, device=device))
    return torch.autocast(kind, torch.bfloat16, enabled=dtype == torch.bfloat16)


class Layers:
    """The decoder layers of a checkpoint or model, in float32 on `device`, computing in `autocast`.

    `tensors` are its weights and `config` its config.json as a dict, with the activation that the FFNs shall run. All
    batches must have the shape of the first one given to `embed`.
    """

    def __init__(self, tensors: Tensors | ModelTensors, config: dict[str, Any], device: str) -> None:
        from transformers import AutoConfig, AutoModel

        whole = AutoConfig.for_model(
            **{key: value for key, value in config.items() if key not in ("auto_map", "stocha")}
        )
        empty = copy.deepcopy(whole)
        empty.num_hidden_layers = 0
        self.device, self.tensors = device, tensors
        # rotary embeddings and other computed buffers must be real, the layers' weights must not
        self.model: Any = AutoModel.from_config(empty, dtype=torch.float32, trust_remote_code=False)
        with torch.device("meta"):
            self.model.layers = AutoModel.from_config(whole, dtype=torch.float32, trust_remote_code=False).layers
        self.model.config = whole
        self.model.embed_tokens.weight.data = self._read(self.tensors.ending(EMBEDDING))
        for module in self.model.children():
            if module is not self.model.layers:
                module.to(device)
        self.arguments: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self.model.layers)

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the first layer is given for token ids [batch, length]: float32 [batch, length, hidden_size]."""
        given: list[torch.Tensor] = []
        arguments: list[dict[str, Any]] = []

        def note(hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            given.append(hidden)
            caches = {key: None for key in ("cache", "past_key_values") if key in kwargs}  # the former since 5.24
            arguments.append(kwargs | caches)
            return hidden

        for layer in self.model.layers:
            layer.forward = note
        try:
            self.model(tokens.to(self.device), use_cache=False)
        finally:
            for layer in self.model.layers:
                del layer.forward
        self.arguments = self.arguments or arguments
        return given[0].float()

    def _read(self, name: str) -> torch.Tensor:
        """A tensor in float32. Raises StochaError for one with NaN or infinite values."""
        value = self.tensors.read(name).to(self.device, torch.float32)
        if not value.isfinite().all():
            raise StochaError(f"{name} has values that are not finite: expected numbers; check the source's weights")
        return value

    def check_no_biases(self) -> None:
        """Raise StochaError for FFNs with biases, which a refit does not fit."""
        for name in self.tensors.layer(0):
            if name.startswith("mlp.") and name.endswith(".bias"):
                raise StochaError(f"the model has {name} in its FFNs: expected FFNs without biases")

    @contextmanager
    def load(self, index: int) -> Iterator[Any]:
        """Decoder layer `index` with its weights, which are gone afterwards."""
        layer = self.model.layers[index].to_empty(device=self.device)
        state = {
            name: self._read(full)
            for name, full in self.tensors.layer(index).items()
            if not name.endswith(TOKEN_FACTOR)  # of input cuts: layers run without
        }
        layer.load_state_dict(state, strict=True)
        try:
            yield layer.eval().requires_grad_(False)
        finally:
            layer.to("meta")

    @torch.no_grad()
    def attention(self, layer: Any, index: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream after the layer's attention, and the FFN's input: float32, both of hidden's shape."""
        given: list[torch.Tensor] = []

        def note(x: torch.Tensor) -> torch.Tensor:
            given.append(x)
            return torch.zeros_like(x)

        layer.mlp.forward = note
        try:
            with autocast(self.device):
                stream = layer(hidden, **self.arguments[index])
        finally:
            del layer.mlp.forward
        return stream.float(), given[0].float()

    @staticmethod
    def after_ffn(layer: Any, ffn_output: torch.Tensor) -> torch.Tensor:
        """What the layer adds to the stream for an FFN's output: itself, or normalised as in Gemma."""
        norm: nn.Module | None = getattr(layer, "post_feedforward_layernorm", None)
        return ffn_output if norm is None else norm(ffn_output)
