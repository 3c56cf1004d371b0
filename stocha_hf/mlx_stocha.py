"""MLX-LM's class of a folder: the native one, with the activation that the folder infers with.

MLX-LM reads a config's `model_type` and no activation: it would run SiLU, or Gemma's GELU, without a word. config.json
names this file as its `model_file`, which MLX-LM runs with --trust-remote-code and stops at without it. Cut inputs are
not cut: the model runs as it would be without them.

    mlx_lm.generate --model FOLDER --trust-remote-code --prompt "The feed-forward layer"

Alone in its folder, like modeling_stocha.py: it needs nothing of stocha_hf, and no torch.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import MODEL_REMAPPING

CONFIG = json.loads(Path(__file__).with_name("config.json").read_text(encoding="utf-8"))
FAMILY = MODEL_REMAPPING.get(CONFIG["model_type"], CONFIG["model_type"])
native: Any = importlib.import_module(f"mlx_lm.models.{FAMILY}")


def relu(x: mx.array) -> mx.array:
    return mx.maximum(x, 0)


# Given gate and up projections, (..., neurons), and the layer's threshold; modeling_stocha.py defines the same.
HIDDEN: dict[str, Callable[[mx.array, mx.array, float], mx.array]] = {
    "relu": lambda gate, up, t: relu(gate) * up,
    "relu2": lambda gate, up, t: relu(gate) ** 2 * up,
    "drelu": lambda gate, up, t: relu(gate) * relu(up),
    "fatrelu": lambda gate, up, t: mx.where(gate > t, gate, 0) * up,
    "shifted_relu": lambda gate, up, t: relu(gate - t) * up,
}


class StochaMLP(native.MLP):
    """The native feed-forward layer with another activation; its weights and their names are the same."""

    threshold: float

    def __call__(self, x: mx.array) -> mx.array:
        hidden = HIDDEN[CONFIG["stocha"]["inference"]]
        return self.down_proj(hidden(self.gate_proj(x), self.up_proj(x), self.threshold))


class Model(native.Model):
    """The native model with StochaMLP layers. Raises ValueError for an activation that is not in HIDDEN."""

    def __init__(self, args: Any) -> None:
        name, thresholds = CONFIG["stocha"]["inference"], CONFIG["stocha"]["threshold"]
        if name not in HIDDEN:
            raise ValueError(f"the model infers with {name}: expected one of {', '.join(HIDDEN)}; use transformers")
        super().__init__(args)
        for index, layer in enumerate(self.layers):
            layer.mlp.__class__ = StochaMLP
            layer.mlp.threshold = thresholds[index] if isinstance(thresholds, list) else thresholds

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        own = {name: value for name, value in weights.items() if not name.endswith("_token_factor")}  # of input cuts
        return super().sanitize(own) if hasattr(native.Model, "sanitize") else own


class ModelArgs(native.ModelArgs):
    """The native arguments, with the rotary embedding that transformers 5 writes where MLX-LM's Llama looks not."""

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> Any:
        found, rope = {}, params.get("rope_parameters") or {}
        if "full_attention" in rope:
            found["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
            rope = rope["full_attention"]
        if "rope_theta" in rope:
            found["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            found["rope_scaling"] = rope
        return super().from_dict(params | found)
