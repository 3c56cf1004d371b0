"""What a model is worth and how sparse it is, in one pass over fixed windows of tokens; and beside a second model.

    windows = text_windows("val.parquet", Path(folder), length=1024)
    evaluate(load_model(folder).eval(), windows)  # {"perplexity": 12.4, "tokens": 437248, "sparsity": {...}, ...}
    compare(model, baseline, windows)             # {"kl": 0.03, "top1_agreement": 0.94}

Zeros are counted where down_proj is given the hidden vectors, so they are those of the path that the model runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm

from stocha_hf.modeling_stocha import stocha_mlps
from stocha_hf.sparsity import patched_layers

BATCH = 4  # windows at a time
CHUNK = 512  # tokens whose logits are float32 at a time


@torch.no_grad()
def evaluate(model: Any, windows: torch.Tensor) -> dict[str, Any]:
    """Figures of a patched model, in the mode and dtype that it is in, on token ids [windows, length].

    `perplexity` is exp of the mean loss of all tokens but each window's first, which has nothing before it; `tokens`
    counts the windows' tokens; the rest is Activity.read(). Raises StochaError for a model without patched layers.
    """
    activity = Activity(model)
    total = 0.0
    try:
        for batch in _batches(model, windows, "Evaluating"):
            logits = model(batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            for part, after in zip(logits.split(CHUNK), batch[:, 1:].flatten().split(CHUNK), strict=True):
                total += F.cross_entropy(part.float(), after, reduction="sum").item()
    finally:
        activity.close()
    predicted = windows.numel() - len(windows)
    return {
        "perplexity": math.exp(total / predicted),
        "tokens": windows.numel(),
        "activation": stocha_mlps(model)[0].running,
        **activity.read(),
    }


@torch.no_grad()
def compare(model: Any, baseline: Any, windows: torch.Tensor) -> dict[str, float]:
    """How far a model's predictions are from a baseline's, over all tokens of token ids [windows, length].

    `kl` is the mean Kullback-Leibler divergence from the baseline to the model, in nats a token; `top1_agreement` the
    share of tokens whose most likely successor is the same.
    """
    divergence, agreed = 0.0, 0
    for batch in _batches(model, windows, "Comparing"):
        both = (some(batch, use_cache=False).logits.flatten(0, 1).split(CHUNK) for some in (model, baseline))
        for found, expected in zip(*both, strict=True):
            agreed += (found.argmax(-1) == expected.argmax(-1)).sum().item()
            logs, aims = (logits.float().log_softmax(-1) for logits in (found, expected))
            divergence += F.kl_div(logs, aims, reduction="sum", log_target=True).item()
    return {"kl": divergence / windows.numel(), "top1_agreement": agreed / windows.numel()}


def _batches(model: Any, windows: torch.Tensor, doing: str) -> Iterator[torch.Tensor]:
    device = next(model.parameters()).device
    for batch in tqdm(windows.split(BATCH), desc=doing, unit="batch", disable=None, leave=False):
        yield batch.to(device)


class Activity:
    """Counts which neurons of a patched model fire, that is, have a hidden entry other than zero, until close()."""

    def __init__(self, model: Any) -> None:
        layers = patched_layers(model)
        self._fired: list[torch.Tensor | None] = [None] * len(layers)  # [M]: how often each neuron fired
        self._tokens = [0] * len(layers)
        self._again = [0] * len(layers)  # how often one fired at a token and at the one before
        self._later = [0] * len(layers)  # how often one fired at a token that has one before it
        self._hooks = [layer.down_proj.register_forward_pre_hook(self._hook(i)) for i, layer in enumerate(layers)]

    def _hook(self, layer: int) -> Any:
        def count(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            active = args[0].detach().bool()
            fired = active.float().sum((0, 1))  # of bools, PyTorch's sum over rows takes twenty times as long
            before = self._fired[layer]
            self._fired[layer] = fired.double() if before is None else before + fired
            self._tokens[layer] += active.shape[0] * active.shape[1]
            self._again[layer] += int(torch.count_nonzero(active[:, 1:] & active[:, :-1]))
            self._later[layer] += int(torch.count_nonzero(active[:, 1:]))

        return count

    def read(self) -> dict[str, Any]:
        """Shares, each {"mean": over layers, "per_layer": [...]}: `sparsity` of entries that are zero, `never_active`
        of neurons that never fired, `reuse` of firing neurons that fired at the token before as well.
        """
        shares: dict[str, list[float]] = {"sparsity": [], "never_active": [], "reuse": []}
        for fired, tokens, again, later in zip(self._fired, self._tokens, self._again, self._later, strict=True):
            assert fired is not None, "read after a forward"
            shares["sparsity"].append(1 - fired.mean().item() / tokens)
            shares["never_active"].append((fired == 0).double().mean().item())
            shares["reuse"].append(again / later if later else 0.0)
        return {name: {"mean": sum(values) / len(values), "per_layer": values} for name, values in shares.items()}

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
