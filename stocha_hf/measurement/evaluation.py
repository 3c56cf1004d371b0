"""What a model is worth and how sparse it is, in one pass over fixed windows of tokens; and beside a second model.

    windows = text_windows("val.parquet", Path(folder), length=1024)
    evaluate(load_model(folder).eval(), windows)  # Evaluation(perplexity=12.4, tokens=437248, sparsity=..., ...)
    compare(model, baseline, windows)             # Comparison(kl=0.03, top1_agreement=0.94)

Zeros are counted where down_proj is given the hidden vectors, so they are those of the path that the model runs. A
model that cuts its projections' inputs does so at every token here, as it does in decode steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from stocha_hf.cuts_stocha import cut_projections
from stocha_hf.errors import StochaError
from stocha_hf.measurement.bytes_read import ReadMeter
from stocha_hf.measurement.fallback import doubts, fallback_of, predictions, renewed, uncut, with_repeated
from stocha_hf.measurement.records import AggregatedSparsity, Comparison, Evaluation, Shares
from stocha_hf.modeling_stocha import stocha_mlps
from stocha_hf.models import cutting_everywhere, patched_layers
from stocha_hf.progress import Progress

BATCH, GPU_BATCH = 4, 16  # windows at a time: on a GPU launching is the limit, on a CPU memory
LOGITS = 2**28  # of one model at a time on a CPU, 1 GiB in float32: with a large vocabulary of fewer windows
LOGIT_ROWS = 512  # tokens whose logits are float32 at a time


@torch.no_grad()
def evaluate(model: Any, windows: torch.Tensor, prompt: int = 0) -> Evaluation:
    """Measure a model's perplexity and activity, in the mode and dtype that it is in.

    Args:
        model: A CausalLM of `load_model`, or one that `patch` was called on.
        windows: Token ids, int64 [windows, length]; each window is read on its own. `text_windows` makes them.
        prompt: How many tokens at the start of each window are read only, and not predicted from.

    Returns:
        Its figures. The perplexity is of all tokens but each window's first, which has nothing before it.

    Raises:
        StochaError: the model has no patched layers, a token id is beyond its vocabulary, or its loss is not finite.
    """
    check_vocabulary(model.config, windows)
    activity, meter = Activity(model), ReadMeter(model)
    try:
        losses, doubted = _losses(model, windows, prompt)
    finally:
        activity.close()
        meter.close()
    read, fallback = meter.read(), None
    if doubted:
        repeated = sum(int(some.sum()) for some in doubted)
        read, fallback = with_repeated(model, read, windows.numel(), repeated)
        again, _ = _losses(model, windows, prompt, [renewed(model, some) for some in doubted])
        losses = torch.where(_early(model, doubted)[:, prompt:-1], losses, again)
    return Evaluation(
        perplexity=_perplexity(math.fsum(losses.sum(1).tolist()) / losses.numel()),
        tokens=windows.numel(),
        activation=stocha_mlps(model)[0].running,
        bytes_read=read,
        **activity.read(),
        inputs_cut="at every token" if cut_projections(model) else None,
        fallback=fallback,
    )


def _losses(
    model: Any, windows: torch.Tensor, prompt: int, without: Sequence[torch.Tensor] | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Each token's loss, [windows, length - 1 - prompt], and where each batch is in doubt if the model has a fallback.

    `without` are the tokens of each batch that are not cut, and then nothing is asked for doubts.
    """
    losses, found = [], []  # on the device: no part waits for it
    with cutting_everywhere(model):
        for i, batch in enumerate(batches(model, windows, "Evaluating")):
            with uncut(model, without[i] if without else None):
                logits = model(batch, use_cache=False).logits
            if fallback_of(model) and not without:
                found.append(doubts(model, logits))
            rows, following = logits[:, prompt:-1].flatten(0, 1), batch[:, prompt + 1 :].flatten()
            for part, after in zip(rows.split(LOGIT_ROWS), following.split(LOGIT_ROWS), strict=True):
                losses.append(F.cross_entropy(part.float(), after, reduction="none"))
    return torch.cat(losses).view(len(windows), -1), found


def _early(model: Any, doubted: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tokens that are computed again for those after them, and were predicted from before."""
    return torch.cat([renewed(model, some) & ~some for some in doubted])


@torch.no_grad()
def compare(model: Any, baseline: Any, windows: torch.Tensor) -> Comparison:
    """Measure how far a model's predictions are from a baseline's.

    Args:
        model: A CausalLM.
        baseline: Another one of the same vocabulary, on the same device.
        windows: Token ids, int64 [windows, length], over all of which the means are taken.

    Returns:
        The divergence and the agreement of their predictions.

    Raises:
        StochaError: the vocabularies differ, a token id is beyond them, or a prediction is NaN.
    """
    sizes = [some.config.vocab_size for some in (model, baseline)]
    if sizes[0] != sizes[1]:
        raise StochaError(f"the models have {sizes[0]} and {sizes[1]} tokens: expected the same vocabulary")
    check_vocabulary(model.config, windows)
    divergences, agreements = [], []
    with cutting_everywhere(model), cutting_everywhere(baseline):
        for batch in batches(model, windows, "Comparing"):
            both = (predictions(some, batch).flatten(0, 1).split(LOGIT_ROWS) for some in (model, baseline))
            for found, expected in zip(*both, strict=True):
                agreements.append((found.argmax(-1) == expected.argmax(-1)).sum())
                logs, aims = (logits.float().log_softmax(-1) for logits in (found, expected))
                divergences.append(F.kl_div(logs, aims, reduction="sum", log_target=True))
    kl = _sum(divergences) / windows.numel()
    if not math.isfinite(kl):
        raise StochaError(
            f"the divergence of the predictions is {kl}: expected finite ones; check both models' weights"
        )
    return Comparison(kl, _sum(agreements) / windows.numel())


def _sum(parts: list[torch.Tensor]) -> float:
    return math.fsum(torch.stack(parts).tolist())


def _perplexity(loss: float) -> float:
    try:
        perplexity = math.exp(loss)
    except OverflowError:
        perplexity = math.inf
    if not math.isfinite(perplexity):
        raise StochaError(
            f"the model's mean loss is {loss:g} nats a token, which has no finite perplexity: expected whole weights, "
            "in a dtype that their numbers fit; try --dtype float32, or convert or train it again"
        )
    return perplexity


def check_vocabulary(config: Any, windows: torch.Tensor) -> None:
    """Raise StochaError where windows hold a token that a model of this config does not have."""
    if (largest := int(windows.max())) >= config.vocab_size:
        raise StochaError(
            f"the text has the token {largest}, but the model only {config.vocab_size} tokens: expected the "
            "tokenizer that the model was trained with"
        )


def batches(model: Any, windows: torch.Tensor, doing: str) -> Iterator[torch.Tensor]:
    """A few windows at a time, on the model's device, with a progress bar."""
    device = next(model.parameters()).device
    fitting = LOGITS // (windows.shape[1] * model.config.vocab_size)
    size = GPU_BATCH if device.type == "cuda" else min(BATCH, max(fitting, 1))
    for batch in Progress(windows.split(size), desc=doing, unit="batch"):
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
        """Return the fields of an Evaluation that tell of neurons."""
        rows = [counts.shares() for counts in self._counts]
        shares = {name: Shares(_mean(values), values) for name in rows[0] if (values := [row[name] for row in rows])}
        unused, ends = [counts.aggregated() for counts in self._counts], self._counts[0].ends
        aggregated = AggregatedSparsity(
            tokens=ends,
            mean=[_mean(values) for values in zip(*unused, strict=True)],
            independent=[_mean([share**end for share in shares["sparsity"].per_layer]) for end in ends],
            per_layer=unused,
        )
        return {**shares, "aggregated_sparsity": aggregated}

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
