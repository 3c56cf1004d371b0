"""Calibration text on its way through a model that is being quantized, one decoder layer in memory at a time.

Each layer is first asked for the second moments of what its projections are given, and then, quantized, for what it
computes: so a layer is fitted to what it will be given. The feed-forward layers run the converted activation.

    text = Calibration(source, config, tokens)
    with text.layers.load(0) as layer:
        moments = text.moments(layer, 0)   # {"q_proj": [hidden, hidden], ...}
        text.advance(layer, 0)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from stocha_hf.checkpoints.tensors import Tensors
from stocha_hf.conversion.layerwise import Layers
from stocha_hf.conversion.source import Source
from stocha_hf.modeling_stocha import patch_mlps
from stocha_hf.quantization import PROJECTIONS
from stocha_hf.spec import StochaConfig

WINDOWS = 4  # in a batch
SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


class Calibration:
    """The hidden states of token ids [windows, length], a multiple of WINDOWS, at one depth: float32, on the CPU."""

    def __init__(self, source: Source, config: dict[str, Any], tokens: torch.Tensor) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.layers = Layers(Tensors(source.folder), config, device)
        patch_mlps([layer.mlp for layer in self.layers.model.layers], StochaConfig.from_dict(config["stocha"]))  # type: ignore[arg-type]
        self.hidden = [self.layers.embed(batch).cpu() for batch in tokens.split(WINDOWS)]

    def moments(self, layer: Any, index: int) -> dict[str, torch.Tensor]:
        """The sums of x x^T over the text, by projection: float32 [inputs, inputs]."""
        found: dict[str, torch.Tensor] = {}

        def adder(name: str) -> Callable[..., None]:
            def add(module: Any, args: tuple[torch.Tensor, ...]) -> None:
                rows = args[0].flatten(0, -2).float()
                found[name] = found.get(name, 0) + rows.T @ rows

            return add

        linears = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
        hooks = [
            linears[name].register_forward_pre_hook(adder(name)) for name in PROJECTIONS if name not in SAME_INPUT
        ]
        for _ in self._outputs(layer, index):
            pass
        for hook in hooks:
            hook.remove()
        return found | {name: found[same] for name, same in SAME_INPUT.items()}

    def advance(self, layer: Any, index: int) -> None:
        """Run the text through a layer."""
        self.hidden = list(self._outputs(layer, index))

    @torch.no_grad()
    def _outputs(self, layer: Any, index: int) -> Iterator[torch.Tensor]:
        for hidden in self.hidden:
            yield layer(hidden.to(self.layers.device), **self.layers.arguments[index]).cpu()
