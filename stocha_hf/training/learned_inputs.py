"""Thresholds of inputs that are learned together with the weights, one for each input of each projection.

Held thresholds follow what training does to the inputs (held_inputs.py); learned ones take part. They go where the
loss falls at a given number of weights read: that of the first step, which the folder's own thresholds read.

- A threshold's gradient is that of threshold_gradients.py, of the loss, at the tokens that are cut.
- Reading has a price, which rises while more is read than at the beginning. A pass finds the loss's gradient and that
  of the weights read, each by itself; a step puts them together. So the price needs no place in a compiled layer, lies
  on no weight (weights that shrank their inputs would be paid for what a scale undoes), and is the same for all passes
  and ranks of a step. Nothing waits for the GPU.
- Thresholds follow Adam, with a rate of their own that rises and falls as the weights' does.
- What a step in doubt reads before it is computed again is paid for too, though nothing is cut there.
- Tokens' own factors of thresholds are learned with them: learned_factors.py.
- A folder has one threshold a projection. What differs between inputs becomes scales, which move into the weights
  around (input_scales.py). A checkpoint is such a folder: weights are folded before it is written and unfolded after
  it, in the run that goes on as in one that resumes, which is why both have the same bits.

    learned = LearnedInputs(model, 0.01, accelerator)
    learned.count(cut_at)                       # with each pass
    learned.step(1.0)                           # with each step of the weights' optimizer
    with learned.folded():
        model.save_pretrained(folder)
    learned.close()                             # the model is folded, and an ordinary one
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import mean
from typing import Any

import torch
from torch import nn

from stocha_hf.cuts import SHARED
from stocha_hf.cuts_stocha import cut_projections
from stocha_hf.errors import StochaError
from stocha_hf.measurement.blocks import blocks
from stocha_hf.measurement.selection.input_scales import inputs_of, spread_over_heads
from stocha_hf.measurement.selection.learned import STIFF
from stocha_hf.measurement.selection.threshold_gradients import Group, fold
from stocha_hf.modeling_stocha import become
from stocha_hf.training.entry import change_entry, stocha_model
from stocha_hf.training.heads import causal_lm
from stocha_hf.training.learned_cut import LEAVES, LearnedCut
from stocha_hf.training.learned_factors import LearnedFactors

SLACK = 1e-3  # of a share, for rounding
SMALLEST = 1e-6  # a threshold of none: it has a logarithm, and no input near it to move it
FARTHEST = 40.0  # that a logarithm may go from where it began: a scale is between two of them, and float32


class LearnedInputs:
    """Learns the thresholds of a patched model that trains with cuts, whose projections are LearnedCut until `close`.

    Args:
        model: the model, on its device, for which check_learned found nothing.
        rate: Adam's, on the logarithms of thresholds, where the weights' rate is at its highest.
        accelerator: accelerate's, which averages what ranks found.
        factor_rate: the same on tokens' own factors; 0 leaves these as they are, and gives a model none.
    """

    def __init__(self, model: Any, rate: float, accelerator: Any, factor_rate: float = 0.0) -> None:
        self.model, self.rate, self.accelerator, self.factor_rate = model, rate, accelerator, factor_rate
        self.blocks = blocks(causal_lm(model))
        self.kind: Any = type(cut_projections(model)[0])  # remote code has a class of its own
        self.sizes = [inputs_of(self.blocks[0], names) for names in SHARED]
        device = self.blocks[0].linears["o_proj"].weight.device
        self.logs = torch.zeros(len(self.blocks), sum(self.sizes), device=device, requires_grad=True)
        has = stocha_model(model).config.stocha["inputs"].get("token_factors")
        self.factors = LearnedFactors(model, self.blocks) if factor_rate or has else None
        self.tokens = torch.zeros(1, device=device)  # paid for since the last step
        self.price = self.target = torch.zeros((), device=device)  # of all weights; the share of them to read
        self._cut, self._steps = torch.zeros(2, device=device)  # since the last log, of steps that cut a token
        self.load_state_dict(None)

    def _install(self) -> None:
        """Give projections limits; where thresholds of one input are equal the same ones: a compiler cuts once."""
        first, layers, device = self.blocks[0].linears, len(self.blocks), self.logs.device
        alike: dict[Any, list[str]] = {}
        for group in SHARED:
            for name in (name for name in group if name in self.begun):
                alike.setdefault((group, *self.begun[name]), []).append(name)
        self.cuts = [*alike.values()]
        self.widths = [first[names[0]].in_features for names in self.cuts]
        widths = torch.tensor(self.widths)
        begun = torch.tensor([self.begun[names[0]] for names in self.cuts]).T.clamp(min=SMALLEST).log()
        self.begin = begun.repeat_interleave(widths, -1).to(device)
        self.limits = torch.zeros_like(self.begin)
        self.found = torch.zeros(layers, 3 * sum(self.widths), device=device)  # since the last step
        outputs = torch.tensor([mean(first[name].out_features for name in names) for names in self.cuts])
        total = sum(first[name].weight.numel() for name in self.begun)
        parts = outputs / (layers * total)
        self.parts = parts.repeat_interleave(widths).to(device)  # of all weights, an input's
        for layer, block in enumerate(self.blocks):
            rows = self.limits[layer].split(self.widths), self._by_cut(self.found[layer])
            for names, limits, found in zip(self.cuts, *rows, strict=True):
                leaves = {
                    "limits": limits.detach(),
                    "more": torch.zeros_like(limits),
                    "seen": torch.zeros_like(limits),
                }
                for leaf, place in zip(leaves.values(), found, strict=True):
                    leaf.requires_grad_().grad = place  # backward adds to it
                for name in names:
                    block.linears[name].__dict__.update(leaves, by_loss=None, by_reading=None)
                    become(block.linears[name], LearnedCut)
        if self.factors is not None:
            shares = zip(self.cuts, parts.tolist(), strict=True)
            self.factors.install(self.begun, {name: part for names, part in shares for name in names})

    def _by_cut(self, found: torch.Tensor) -> list[torch.Tensor]:
        """[..., 3, inputs] for each: the gradients of its limits, and of what was seen."""
        return [part.unflatten(-1, (3, -1)) for part in found.split([3 * width for width in self.widths], -1)]

    def count(self, paid_at: torch.Tensor | None) -> None:
        """Say at which tokens of a pass reading counts, bool [batch, length]: they are cut, or in doubt."""
        if paid_at is not None:
            self.tokens += paid_at.sum()

    def step(self, factor: float) -> None:
        """Move thresholds by what the passes since the last step found, at this share of the highest rate."""
        by_token = self.found.new_zeros(0) if self.factors is None else self.factors.found
        everything = torch.cat([self.found.flatten(), by_token.flatten(), self.tokens])
        everything = self.accelerator.reduce(everything, reduction="mean")
        tokens, found = everything[-1], self._by_cut(everything[: self.found.numel()].view_as(self.found))
        of_loss, slopes, kept = torch.cat(found, -1).unbind(-2)
        share = self.parts / tokens.clamp(min=1)  # of the reading of all tokens, that an input of one of them is
        some = tokens > 0  # none where uncut_rows or short texts leave no token that is cut
        read = torch.where(some, (kept * share).sum(), self.target)
        self.target = torch.where(self.target.isnan(), read, self.target)
        over = (read - self.target).nan_to_num()
        cost = (self.price + STIFF * over).clamp(min=0)
        self.price = (self.price + over).clamp(min=0)
        (self.logs.grad,) = torch.autograd.grad(self._spread(), self.logs, of_loss - cost * share * slopes)
        if self.factors is not None:
            by_token = everything[self.found.numel() : -1].view_as(by_token)
            self.factors.follow(by_token, cost / tokens.clamp(min=1))
        for settings, rate in zip(self.adam.param_groups, (self.rate, self.factor_rate), strict=False):
            settings["lr"] = rate * factor  # of thresholds, of factors
        self.adam.step()
        self._renew()
        self._cut, self._steps = self._cut + torch.where(some, 1 - read, 0.0), self._steps + some

    def _spread(self) -> torch.Tensor:
        """The logarithms of factors for the inputs of all projections that cut: some of these read one input."""
        rows: dict[str, torch.Tensor] = {}
        for names, logs in zip(SHARED, self.logs.split(self.sizes, -1), strict=True):
            rows |= dict.fromkeys(names, spread_over_heads(self.blocks[0], logs) if names == ("o_proj",) else logs)
        return torch.cat([rows[names[0]] for names in self.cuts], -1)

    @torch.no_grad()
    def _renew(self) -> None:
        """Give the projections the limits of now, and forget what passes found."""
        self.limits.copy_(self.begin + self._spread())
        self.found.zero_()
        self.tokens.zero_()
        if self.factors is not None:
            self.factors.renew()

    def read(self) -> dict[str, float]:
        """The share of the weights that was not read since the last call, and the price now: for a log.

        Nothing where no step since then cut a token.
        """
        if (cut := self._mean_cut()) is None:
            return {}
        self._cut, self._steps = torch.zeros_like(self._cut), torch.zeros_like(self._steps)
        return {"inputs_cut": cut, "input_price": self.price.item()}

    def _mean_cut(self) -> float | None:
        if not (steps := self._steps.item()):
            return None
        cut = self._cut.item() / steps
        if not -SLACK <= cut <= 1 + SLACK:
            raise StochaError(
                f"the share of weights that inputs leave unread came out as {cut:.3f}: expected one from 0 to 1; "
                "something miscounts, so try torch_compile: false, and please report it"
            )
        return cut

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Inside, the model's weights and entry are its folder's, with one threshold a projection."""
        self.check()
        self._fold()
        try:
            yield
        finally:
            fold(self._groups(-1.0))

    def check(self) -> None:
        """Raise StochaError where what was learned is no folder's, or followed a count that is no share."""
        self._mean_cut()
        if not self._within():
            raise StochaError(
                f"input_threshold_rate is {self.rate} and thresholds went beyond what float32 holds: expected a rate "
                "at which they stay finite, or a lower learning_rate"
            )

    def _within(self) -> bool:
        units = self.logs.new_zeros(1) if self.factors is None else self.factors.units
        return bool((self.logs.abs() <= FARTHEST).all() and units.isfinite().all())  # also false for NaN

    def _fold(self) -> None:
        if self.factors is not None:
            self.factors.write(self._groups(1.0))
        factors = fold(self._groups(1.0))
        found = {n: [t * factor for t, factor in zip(row, factors[n], strict=True)] for n, row in self.begun.items()}
        change_entry(self.model, inputs=stocha_model(self.model).config.stocha["inputs"] | {"thresholds": found})

    def _groups(self, sign: float) -> list[Group]:
        rows = (sign * self.logs.detach()).split(self.sizes, -1)
        return [
            Group(block, names, nn.Parameter(row[layer]), 0.0)
            for layer, block in enumerate(self.blocks)
            for names, row in zip(SHARED, rows, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the folded weights, for torch.save."""
        kept = {"logs": self.logs.detach(), "price": self.price, "target": self.target, "begun": self.begun}
        return kept | {"adam": self.adam.state_dict(), "units": self.factors and self.factors.units.detach()}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from a state, with weights as its checkpoint has them; None: from the model's own thresholds.

        Raises StochaError for the state of a run that learned tokens' factors where this does not, or the other way.
        """
        if state is not None and (state.get("units") is None) != (self.factors is None):
            raise StochaError(
                f"input_factor_rate is {self.factor_rate}, and the run's checkpoint has "
                f"{'no' if self.factors else 'learned'} factors of tokens: expected the same recipe; name another "
                "output_dir"
            )
        found = state or {
            "logs": torch.zeros_like(self.logs),
            "price": torch.ones(()),
            "target": torch.tensor(math.nan),
            "begun": stocha_model(self.model).config.stocha["inputs"]["thresholds"],
            "units": None,
        }
        device = self.logs.device
        self.logs.data.copy_(found["logs"])
        self.price, self.target = found["price"].to(device), found["target"].to(device)
        self.begun: dict[str, list[float]] = found["begun"]
        learned = [self.logs] if self.factors is None else [self.logs, self.factors.units]
        self.adam = torch.optim.Adam([{"params": [one]} for one in learned], lr=self.rate, betas=(0.9, 0.95))
        if state is not None:
            self.adam.load_state_dict(state["adam"])
            fold(self._groups(-1.0))
        self._install()
        if self.factors is not None:
            self.factors.begin(found["units"])
        self._renew()

    def close(self) -> None:
        """Fold what was learned, and take everything off the model; a second call does nothing.

        What `check` refuses is not folded, and not told of: a run that ends so has its own error.
        """
        if isinstance(self.blocks[0].linears[self.cuts[0][0]], LearnedCut) and self._within():
            self._fold()
        for block in self.blocks:
            for name in self.begun:
                become(block.linears[name], self.kind)
                for key in LEAVES:
                    block.linears[name].__dict__.pop(key, None)
