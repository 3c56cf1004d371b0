"""What a model is worth and how sparse it is, in one pass over fixed windows of tokens; and beside a second model.

    windows = text_windows("val.parquet", Path(folder), length=1024)
    evaluate(load_model(folder).eval(), windows)  # {"perplexity": 12.4, "tokens": 437248, "sparsity": {...}, ...}
    compare(model, baseline, windows)             # {"kl": 0.03, "top1_agreement": 0.94}

Zeros are counted where down_proj is given the hidden vectors, so they are those of the path that the model runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm

from stocha_hf.modeling_stocha import stocha_mlps
from stocha_hf.models import patched_layers

BATCH, GPU_BATCH = 4, 16  # windows at a time: on a GPU launching is the limit, on a CPU memory
CHUNK = 512  # tokens whose logits are float32 at a time


@torch.no_grad()
def evaluate(model: Any, windows: torch.Tensor) -> dict[str, Any]:
    """Figures of a patched model, in the mode and dtype that it is in, on token ids [windows, length].

    `perplexity` is exp of the mean loss of all tokens but each window's first, which has nothing before it; `tokens`
    counts the windows' tokens; the rest is Activity.read(). Raises StochaError for a model without patched layers.
    """
    activity = Activity(model)
    losses = []  # on the device: no chunk waits for it
    try:
        for batch in batches(model, windows, "Evaluating"):
            logits = model(batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            for part, after in zip(logits.split(CHUNK), batch[:, 1:].flatten().split(CHUNK), strict=True):
                losses.append(F.cross_entropy(part.float(), after, reduction="sum"))
    finally:
        activity.close()
    predicted = windows.numel() - len(windows)
    return {
        "perplexity": math.exp(math.fsum(torch.stack(losses).tolist()) / predicted),
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
    divergences, agreements = [], []
    for batch in batches(model, windows, "Comparing"):
        both = (some(batch, use_cache=False).logits.flatten(0, 1).split(CHUNK) for some in (model, baseline))
        for found, expected in zip(*both, strict=True):
            agreements.append((found.argmax(-1) == expected.argmax(-1)).sum())
            logs, aims = (logits.float().log_softmax(-1) for logits in (found, expected))
            divergences.append(F.kl_div(logs, aims, reduction="sum", log_target=True))
    sums = (math.fsum(torch.stack(parts).tolist()) for parts in (divergences, agreements))
    return dict(zip(("kl", "top1_agreement"), (total / windows.numel() for total in sums), strict=True))


def batches(model: Any, windows: torch.Tensor, doing: str) -> Iterator[torch.Tensor]:
    """A few windows at a time, on the model's device, with a progress bar."""
    device = next(model.parameters()).device
    size = GPU_BATCH if device.type == "cuda" else BATCH
    for batch in tqdm(windows.split(size), desc=doing, unit="batch", disable=None, leave=False):
        yield batch.to(device)


class Activity:
    """Counts which neurons of a patched model fire, that is, have a hidden entry other than zero, until close().

    Each forward is given whole windows, all of one length.
    """

    def __init__(self, model: Any) -> None:
        layers = patched_layers(model)
        self._counts = [_LayerCounts() for _ in layers]
        self._hooks = [
            layer.down_proj.register_forward_pre_hook(lambda module, args, counts=counts: counts.add(args[0].detach()))
            for layer, counts in zip(layers, self._counts, strict=True)
        ]

    def read(self) -> dict[str, Any]:
        """Shares, each {"mean": over layers, "per_layer": [...]}: `sparsity` of entries that are zero, `never_active`
        of neurons that never fired, `reuse` of firing neurons that fired at the token before as well.

        `aggregated_sparsity` (ReLU Strikes Back, arXiv 2310.04564) is the share of neurons that none of a window's
        first t tokens fired, for each t of its `tokens`; `independent`, the mean over layers of sparsity^t, is what it
        would be if every token chose its neurons anew.
        """
        rows = [counts.shares() for counts in self._counts]
        told: dict[str, Any] = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            told[name] = {"mean": _mean(values), "per_layer": values}
        unused, ends = [counts.aggregated() for counts in self._counts], self._counts[0].ends
        return told | {
            "aggregated_sparsity": {
                "tokens": ends,
                "mean": [_mean(values) for values in zip(*unused, strict=True)],
                "independent": [_mean([share**end for share in told["sparsity"]["per_layer"]]) for end in ends],
                "per_layer": unused,
            }
        }

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


class _LayerCounts:
    """Of one layer, over all batches: how often each neuron fired, and what reuse and aggregated sparsity need."""

    def __init__(self) -> None:
        self.ends: list[int] = []  # 1, 2, 4, ..., length: the t of aggregated sparsity
        self._fired: torch.Tensor | float = 0.0  # [M]: tokens at which each neuron fired
        self._unused: torch.Tensor | float = 0.0  # [ends]: sum over windows of the share of neurons unused until then
        self._windows = self._tokens = 0
        self._again = 0  # how often one fired at a token and at the one before
        self._later = 0  # how often one fired at a token that has one before it

    def add(self, hidden: torch.Tensor) -> None:
        """Count a batch [windows, length, M]."""
        active = hidden.bool()
        self.ends = _doubling(active.shape[1])
        sizes = [end - begin for begin, end in zip([0, *self.ends], self.ends, strict=False)]
        # float: of bools, PyTorch's sum over rows takes twenty times as long
        fired = torch.stack([span.sum(1) for span in active.float().split(sizes, 1)])  # [ends, windows, M]
        self._fired = self._fired + fired.sum((0, 1)).double()
        self._unused = self._unused + (fired.cumsum(0) == 0).double().mean(-1).sum(-1)
        self._windows += len(active)
        self._tokens += active.shape[0] * active.shape[1]
        self._again += int(torch.count_nonzero(active[:, 1:] & active[:, :-1]))
        self._later += int(fired[1:].double().sum())  # the first end is the first token

    def shares(self) -> dict[str, float]:
        fired = self._fired
        assert isinstance(fired, torch.Tensor), "read after a forward"
        return {
            "sparsity": 1 - fired.mean().item() / self._tokens,
            "never_active": (fired == 0).double().mean().item(),
            "reuse": self._again / self._later if self._later else 0.0,
        }

    def aggregated(self) -> list[float]:
        """The share of neurons that no token of a window has fired, by `ends`."""
        assert isinstance(self._unused, torch.Tensor), "read after a forward"
        return (self._unused / self._windows).tolist()


def _doubling(length: int) -> list[int]:
    """1, 2, 4, ... and length."""
    ends = [2**i for i in range(length.bit_length())]
    return ends if ends[-1] == length else [*ends, length]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
