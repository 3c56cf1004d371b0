"""Predictors of active neurons, as PowerInfer computes them, fitted from the gate by low rank.

PowerInfer asks two small matrices per layer which neurons a token needs: scores = fc2 relu(fc1 x), and neuron i is
computed where scores[i] reaches a threshold that all layers share. A gate of rank r that errs least on the FFN's own
inputs is known in closed form, W B^+ B with B the leading eigenvectors of C^(1/2) W^T W C^(1/2), C the inputs' second
moments. PowerInfer's ReLU between the two does no harm if fc1 has each row with both signs: x = relu(x) - relu(-x).

Each layer's scores are scaled so that the threshold, THRESHOLD, keeps the wanted share of the active neurons of the
text. Recall is then measured on other windows of it.

    predictors = fit_predictors(source, config, Text("text.parquet"), rank=72)
    predictors.layers[0], predictors.told["recall"]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from stocha_hf.conversion.calibration import WINDOWS, Calibration
from stocha_hf.conversion.source import Source
from stocha_hf.data import calibration_windows
from stocha_hf.errors import StochaError
from stocha_hf.progress import Progress

FITTED_TOKENS, LENGTH = 16_384, 512
RECALL = 0.98  # of the active neurons of the text that predictors are fitted on
THRESHOLD = -1.0  # scores at or above it are predicted to be active
JUDGED = 4  # one window in so many is not fitted on


@dataclass(frozen=True)
class Predictors:
    """fc1 [2 rank, hidden_size] and fc2 [intermediate_size, 2 rank] of each layer, float32; what was measured."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    told: dict[str, Any]


def fit_predictors(source: Source, config: dict[str, Any], data: str, rank: int | None = None) -> Predictors:
    """Fit a predictor to each layer's gate.

    Args:
        source: A checkpoint.
        config: Its config.json with the activation that the FFNs run, "relu".
        data: A file, folder or Hub data set of text.
        rank: Of the gate that the predictors compute (default: an eighth of hidden_size).

    Returns:
        The matrices; in `told` the rank, the tokens, and on windows that were not fitted on the mean over layers of
        recall, sum(predicted & active) / sum(active), of predicted sparsity and of sparsity.

    Raises:
        StochaError: too little text, or a rank that no gate has.
    """
    hidden = config["hidden_size"]
    rank = max(hidden // 8, 1) if rank is None else rank
    if not 1 <= rank <= hidden:
        raise StochaError(f"rank is {rank}: expected 1 to {hidden}, the model's hidden_size")
    length = min(LENGTH, config.get("max_position_embeddings") or LENGTH)
    windows = calibration_windows(data, source.folder, FITTED_TOKENS, length, seed=0)
    windows = windows[: len(windows) // WINDOWS * WINDOWS]
    if len(windows) < 2 * WINDOWS:
        raise StochaError(f"{data} has too little text: expected at least {2 * WINDOWS} windows of {length} tokens")
    text = Calibration(source, config, windows)
    fitted: list[tuple[torch.Tensor, torch.Tensor]] = []
    rows: list[torch.Tensor] = []
    for index in Progress(range(len(text.layers)), desc="Predicting", unit="layer"):
        with text.layers.load(index) as layer:
            inputs = torch.stack(_inputs(text, layer, index))  # [windows, length, hidden]
            gate = layer.mlp.gate_proj.weight.detach().float()
        judged = torch.arange(len(inputs)) % JUDGED == 0
        matrices = fit(gate, inputs[~judged].flatten(0, 1), rank)
        rows.append(judge(gate, matrices, inputs[judged].flatten(0, 1)))
        fitted.append((matrices[0].cpu(), matrices[1].cpu()))
    recall, predicted, sparsity = torch.stack(rows).mean(0).tolist()
    told = {"rank": rank, "tokens": windows.numel(), "recall": recall}
    return Predictors(fitted, told | {"predicted_sparsity": predicted, "sparsity": sparsity})


def _inputs(text: Calibration, layer: Any, index: int) -> list[torch.Tensor]:
    """The FFN's inputs of each window, while the text runs through a layer."""
    found: list[torch.Tensor] = []
    hook = layer.mlp.gate_proj.register_forward_pre_hook(lambda module, args: found.extend(args[0].float().unbind()))
    text.advance(layer, index)
    hook.remove()
    return found


@torch.no_grad()
def fit(gate: torch.Tensor, inputs: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fc1 and fc2 for a gate [neurons, hidden], fitted on inputs [tokens, hidden]."""
    moments = (inputs.T @ inputs / len(inputs)).double()
    moments.diagonal().add_(1e-6 * moments.diagonal().mean().clamp_min(1e-12))
    root = torch.linalg.cholesky(moments)
    whitened = gate.double() @ root
    leading = torch.linalg.eigh(whitened.T @ whitened).eigenvectors[:, -rank:]
    down = torch.linalg.solve_triangular(root, leading.T, upper=False, left=False)  # leading^T root^-1
    size = down.norm(dim=1, keepdim=True)
    down, up = down / size, whitened @ leading * size.T  # both within float16's range
    scores = (inputs @ down.T.float()) @ up.T.float()
    active = scores[inputs @ gate.T > 0]
    least = torch.quantile(_sample(active), 1 - RECALL).item() if len(active) else 0.0
    nearest = -0.01 * scores.square().mean().sqrt().item()  # a threshold nearer to 0 would scale rounding up
    up = up * (THRESHOLD / min(least, nearest, -1e-12))  # the layer's threshold becomes THRESHOLD
    return torch.cat([down, -down]).float(), torch.cat([up, -up], dim=1).float()


def _sample(values: torch.Tensor, most: int = 1_000_000) -> torch.Tensor:
    """Of many values so many, evenly drawn: torch.quantile takes no more than 16 million."""
    return values[:: max(len(values) // most, 1)]


@torch.no_grad()
def judge(gate: torch.Tensor, matrices: tuple[torch.Tensor, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """Recall, predicted sparsity and sparsity on these inputs, [3]."""
    first, last = matrices
    predicted = torch.relu(inputs @ first.T) @ last.T >= THRESHOLD
    active = inputs @ gate.T > 0
    recall = (predicted & active).sum() / active.sum().clamp_min(1)
    return torch.stack([recall, 1 - predicted.float().mean(), 1 - active.float().mean()])
