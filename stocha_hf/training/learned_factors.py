"""Tokens' own factors of input thresholds, learned with the thresholds: a token that is easy reads less.

A factor is exp(tanh(w x + b)) of a projection's input x (cuts.py). Where most tokens are easy, as in code, the same
bytes go further when the others get more of them; docs/experiments/input_training.md has what that gives.

- The loss pulls w and b by what all thresholds of a token do to it; reading pulls the other way, at the price of
  learned_inputs.py. Both come from one backward: w and b are there twice, one for each gradient.
- What is learned are `units`: w in units of 1 / (inputs x threshold). An x is about as large as its threshold, so one
  rate moves the factors of all projections by the same in a step.
- Thresholds of single inputs become scales in a folder, which an x is divided by; w is multiplied by them there.

    factors = LearnedFactors(model, blocks)      # gives the model weights of factors, if it has none
    factors.install(begun, parts)                # LearnedCut projections then follow them
    factors.begin(None)                          # from the model's own; with each step, follow() and renew()
    factors.write(groups)                        # into the model, as its folder has them
"""

from __future__ import annotations

from typing import Any

import torch

from stocha_hf.cuts import SHARED, InputCuts
from stocha_hf.cuts_stocha import add_token_factors, factor_name, factor_owner
from stocha_hf.measurement.blocks import Block
from stocha_hf.measurement.selection.threshold_gradients import Group
from stocha_hf.training.entry import change_entry, stocha_model

LEAST = 1e-3  # a threshold that units are measured by


class LearnedFactors:
    """The weights of tokens' factors of a patched model, as leaves of its projections.

    Args:
        model: the model, whose entry says from then on that it has factors.
        blocks: its blocks.
    """

    def __init__(self, model: Any, blocks: list[Block]) -> None:
        self.model, self.blocks = stocha_model(model), blocks
        inputs = self.model.config.stocha["inputs"]
        if not inputs.get("token_factors"):
            add_token_factors(self.model, InputCuts.from_dict(inputs | {"token_factors": True}))
            change_entry(model, inputs=inputs | {"token_factors": True})
        self.leaders = InputCuts.from_dict(inputs).leaders()
        self.names = [*dict.fromkeys(self.leaders.values())]
        self.lengths = [blocks[0].linears[name].in_features + 1 for name in self.names]
        like = blocks[0].linears[self.names[0]].weight
        self.units = torch.zeros(len(blocks), sum(self.lengths), device=like.device, requires_grad=True)
        self.values, self.scale = torch.zeros_like(self.units.data), torch.ones_like(self.units.data)
        self.found = torch.zeros(len(blocks), 2, sum(self.lengths), device=like.device)  # gradients of now

    def install(self, begun: dict[str, list[float]], parts: dict[str, float]) -> None:
        """Give projections their leaves, and units the size that the thresholds of the beginning ask for.

        Args:
            begun: these thresholds, by projection, one a layer.
            parts: of all weights that cut, what one input of a projection reads.
        """
        thresholds = torch.tensor([begun[name] for name in self.names]).T.clamp(min=LEAST)
        for layer, block in enumerate(self.blocks):
            leaves, scales = {}, self.scale[layer].split(self.lengths)
            rows = (part.split(self.lengths, -1) for part in (self.values[layer], self.found[layer]))
            for name, scale, threshold, value, found in zip(self.names, scales, thresholds[layer], *rows, strict=True):
                scale[:-1] = 1 / ((len(scale) - 1) * threshold)
                leaves[name] = {"by_loss": value.detach(), "by_reading": value.detach()}
                for leaf, place in zip(leaves[name].values(), found, strict=True):
                    leaf.requires_grad_().grad = place  # backward adds to it
            for name, leader in self.leaders.items():
                block.linears[name].__dict__.update(leaves[leader], part=parts[name])

    def begin(self, units: torch.Tensor | None) -> None:
        """Go on from these units, or with None from the model's own weights, whose inputs nothing has scaled yet."""
        if units is None:
            layers = range(len(self.blocks))
            found = [torch.cat([self._own(layer, name).float() for name in self.names]) for layer in layers]
            units = torch.stack(found).to(self.scale) / self.scale
        self.units.data.copy_(units)

    def renew(self) -> None:
        """Give the leaves the values of now, and forget what passes found."""
        self.values.copy_(self.units.data * self.scale)
        self.found.zero_()

    def follow(self, found: torch.Tensor, cost: torch.Tensor) -> None:
        """Set the gradient of units for what passes found, [layers, 2, weights]: the loss's, and cost x reading's."""
        self.units.grad = (found[:, 0] + cost * found[:, 1]) * self.scale

    def write(self, groups: list[Group]) -> None:
        """Write the values into the model, for thresholds of these groups that become scales of their inputs."""
        for place, group in enumerate(groups):
            layer, leader = place // len(SHARED), next((name for name in group.names if name in self.names), None)
            if leader is not None:
                logs = group.limits().detach()
                value = self.values[layer].split(self.lengths)[self.names.index(leader)].clone()
                value[:-1] *= (logs - logs.mean()).exp()
                self._own(layer, leader).data.copy_(value)

    def _own(self, layer: int, name: str) -> torch.Tensor:
        return factor_owner(self.model, layer, name).get_parameter(factor_name(name))
