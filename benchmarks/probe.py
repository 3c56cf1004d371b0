"""What a checkpoint in the middle of training says of its gates: used by schedules.py for runs with `probe: true`.

Under the activation that it is trained with at that point: the loss; and of the loss's gradient with respect to the
gate pre-activations, |dL/dg| summed over tokens, neurons and layers, the share at gates below 0, where ReLU's is none.
Under ReLU: the loss, zeros, and dead neurons. A neuron is dead if ReLU leaves it at zero for every token looked at;
ReLU gives it no gradient, so that only a change of its input could bring it back. `gradient_to_dead_neurons` is the
share that these get under the activation that is trained.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from stocha_hf.measurement.evaluation import evaluate
from stocha_hf.modeling_stocha import stocha_mlps

WINDOWS = 16  # of each text, evenly spaced, for the losses and the dead neurons
GRADIENT_WINDOWS = 4  # of each text: batches of one window


def probe(model: Any, texts: dict[str, torch.Tensor]) -> dict[str, Any]:
    """`texts` are windows of token ids by name; all are looked at as one."""
    windows = torch.cat([windows[:: max(len(windows) // WINDOWS, 1)][:WINDOWS] for windows in texts.values()])
    activation, p = model.config.stocha["activation"], model.config.stocha["p"]
    with model.stocha_mode(activation, p):
        own = evaluate(model, windows)
    with model.stocha_mode("relu"):
        relu = evaluate(model, windows)
        dead = dead_neurons(model, windows)
    with model.stocha_mode(activation, p):
        negative, to_dead = gradient_shares(model, windows[:: WINDOWS // GRADIENT_WINDOWS], dead)
    return {
        "activation": activation,
        "loss": math.log(own.perplexity),
        "relu_loss": math.log(relu.perplexity),
        "relu_zeros": relu.sparsity.mean,
        "dead": relu.never_active.mean,
        "negative_gates": negative["gates"],
        "gradient_at_negative_gates": negative["gradient"],
        "gradient_to_dead_neurons": to_dead,
    }


@torch.no_grad()
def dead_neurons(model: Any, windows: torch.Tensor) -> list[torch.Tensor]:
    """A mask [M] per layer."""
    fired: list[Any] = [False for _ in stocha_mlps(model)]

    def watch(layer: int) -> Any:
        def hook(module: Any, args: Any) -> None:
            fired[layer] = fired[layer] | (args[0] != 0).flatten(0, -2).any(0)

        return hook

    hooks = [mlp.down_proj.register_forward_pre_hook(watch(i)) for i, mlp in enumerate(stocha_mlps(model))]
    device = next(model.parameters()).device
    for batch in windows.to(device).split(8):
        model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [~layer for layer in fired]


def gradient_shares(
    model: Any, windows: torch.Tensor, dead: list[torch.Tensor]
) -> tuple[dict[str, float], float | None]:
    """Shares below 0 of the gates and of their gradient, and the share of the gradient that dead neurons get."""
    kept: list[torch.Tensor] = []

    def keep(module: Any, args: Any, gate: torch.Tensor) -> torch.Tensor:
        gate.retain_grad()
        kept.append(gate)
        return gate

    hooks = [mlp.gate_proj.register_forward_hook(keep) for mlp in stocha_mlps(model)]
    sums = torch.zeros(4, dtype=torch.float64)  # all gates, those below 0; all of the gradient, that below 0
    to_dead = 0.0
    device = next(model.parameters()).device
    for batch in windows.to(device).split(1):
        kept.clear()
        model(batch, labels=batch, use_cache=False).loss.backward()
        for gate, mask in zip(kept, dead, strict=True):
            size, below = gate.grad.abs().float(), gate < 0  # type: ignore[union-attr]
            parts = torch.stack(
                [torch.tensor(float(gate.numel()), device=device), below.sum(), size.sum(), size[below].sum()]
            )
            sums += parts.double().cpu()
            to_dead += size[..., mask].sum().item()
        model.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()
    gates, below, gradient, gradient_below = sums.tolist()
    return {"gates": below / gates, "gradient": gradient_below / gradient}, to_dead / gradient
