"""Training under input cuts, with thresholds that are held to the share of inputs that each projection cuts.

Training moves the inputs: under fixed thresholds fewer and fewer of them are small, and the model that comes out reads
more than the one that went in. So thresholds are measured anew now and then, on the same rows and under the cuts
themselves, each for the share that its projection cut at the beginning. Quantiles come from a random sample, always of
the same entries of the same rows, so that what they tell of is training and not the draw.

    held = HeldInputs()
    held.begin(model, batches)
    thresholds, before = held.thresholds(model, batches)   # later, again and again
    change_entry(model, inputs=model.config.stocha["inputs"] | {"thresholds": thresholds})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from torch import nn

from stocha_hf.cuts_stocha import cut_inputs, projections
from stocha_hf.errors import StochaError
from stocha_hf.measurement.selection.distributions import watching
from stocha_hf.training.entry import stocha_model

MOST_ENTRIES = 2**18  # entries of a projection's input, at most, from each batch
Rows = dict[str, list[Any]]  # by projection, one per layer
Batches = Sequence[Mapping[str, Any]]


class HeldInputs:
    """Thresholds that go on cutting the shares that `begin` found, or that a resumed run was given.

    `batches` are the model's inputs, whose every position counts; ranks that are to agree must be given the same ones.
    """

    def __init__(self) -> None:
        self.shares: dict[str, list[float]] | None = None

    def begin(self, model: nn.Module, batches: Batches) -> None:
        """Measure the share of inputs that each projection cuts now."""
        self.shares = _shares(model, _sizes(model, batches))

    def thresholds(self, model: nn.Module, batches: Batches) -> tuple[dict[str, list[float]], float]:
        """Return thresholds that cut each projection's share, and the mean share that those in force cut.

        One pass: a threshold changes what the layers after it see, which the next call sees.
        """
        assert self.shares is not None, "begun before"
        sizes = _sizes(model, batches)
        now = mean(share for row in _shares(model, sizes).values() for share in row)
        found = {
            name: _values([_at(sample, share) for sample, share in zip(row, self.shares[name], strict=True)])
            for name, row in sizes.items()
        }
        return found, now


def check_held(model: nn.Module) -> None:
    """Raise StochaError where thresholds cannot be held to shares: tokens have factors of theirs, which move them."""
    if trains_with_cuts(model) and stocha_model(model).config.stocha["inputs"].get("token_factors"):
        raise StochaError(
            "input_thresholds is held and the model's cuts have tokens' own factors, which shares do not know: "
            "expected input_thresholds: learned"
        )


def trains_with_cuts(model: nn.Module) -> bool:
    """Return whether a patched model cuts inputs in train() mode."""
    inputs = stocha_model(model).config.stocha.get("inputs")
    return bool(inputs and inputs["train"])


@torch.no_grad()
def _sizes(model: nn.Module, batches: Batches) -> Rows:
    """Of each projection that cuts, a sample of its inputs' distances from the centre, sorted, under the cuts."""
    layers = projections(stocha_model(model))
    samples: Rows = {name: [[] for _ in layers] for name in stocha_model(model).config.stocha["inputs"]["thresholds"]}
    watched = [
        (layers[i][name], lambda x, module=layers[i][name], sample=sample: sample.append(_sample(x, module)))
        for name, row in samples.items()
        for i, sample in enumerate(row)
    ]
    with cut_inputs(model, "always"), watching(watched):
        for batch in batches:
            model(**batch, use_cache=False, logits_to_keep=1)
    return {name: [torch.cat(sample).sort().values for sample in row] for name, row in samples.items()}


def _sample(x: torch.Tensor, module: Any) -> torch.Tensor:
    entries = x.detach().flatten()
    if len(entries) > MOST_ENTRIES:
        generator = torch.Generator(x.device).manual_seed(0)  # of its own: training's noise is as it was
        entries = entries[torch.randint(len(entries), (MOST_ENTRIES,), generator=generator, device=x.device)]
    return (entries - module.input_centre).abs()


def _shares(model: nn.Module, sizes: Rows) -> dict[str, list[float]]:
    """The share of each sample that the thresholds in force cut."""
    layers = projections(stocha_model(model))

    def cut(name: str, i: int) -> torch.Tensor:
        return (sizes[name][i] <= layers[i][name].input_threshold).double().mean()

    return {name: _values([cut(name, i) for i in range(len(layers))]) for name in sizes}


def _at(sample: torch.Tensor, share: float) -> torch.Tensor:
    """The value that this share of a sorted sample is at most; 0 for none of it."""
    count = round(share * len(sample))
    return sample[count - 1] if count else sample.new_zeros(())


def _values(row: list[torch.Tensor]) -> list[float]:
    """As Python's floats, for which a GPU is waited for once."""
    return torch.stack(row).double().tolist()
