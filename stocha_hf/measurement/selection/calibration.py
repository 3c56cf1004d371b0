"""A model and the text that methods are calibrated on, with what several of them ask for, measured once.

calibration = Calibration(model, windows)
METHODS["teal"].select(calibration, 0.25), METHODS["teal"].select(calibration, 0.4)
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from stocha_hf.cuts import PROJECTIONS
from stocha_hf.measurement.blocks import Block, blocks, weight_of
from stocha_hf.measurement.cett import CettCurve
from stocha_hf.measurement.selection.cuts import InputCut
from stocha_hf.measurement.selection.distributions import Distribution, input_distributions, observe
from stocha_hf.measurement.selection.output_shares import OutputCurve, output_curves


class Calibration:
    """What is known of `model` on token ids `windows` [windows, length]."""

    def __init__(self, model: Any, windows: torch.Tensor) -> None:
        self.model, self.windows = model, windows

    @property
    def blocks(self) -> list[Block]:
        """The model's decoder blocks."""
        return blocks(self.model)

    @cached_property
    def inputs(self) -> list[dict[str, Distribution]]:
        """Of each projection's inputs, a mapping a block; down_proj's are the hidden vector."""
        return input_distributions(self.model, self.windows)

    @cached_property
    def output_curves(self) -> list[OutputCurve]:
        """What cutting each input alone does to the predictions; minutes for a model of 0.5B on a GPU."""
        return output_curves(self.model, self.windows, self.inputs)

    @cached_property
    def gates(self) -> list[Distribution]:
        """Of act(gate), one a block."""
        found = [Distribution() for _ in self.blocks]
        watched = [(block.act, seen.add) for block, seen in zip(self.blocks, found, strict=True)]
        observe(self.model, self.windows, watched, outputs=True)
        return found

    @cached_property
    def norms(self) -> list[dict[str, torch.Tensor]]:
        """The norm of each projection's columns, float32 [in], a mapping a block."""
        return [
            {name: weight_of(block.linears[name]).float().norm(dim=0) for name in PROJECTIONS} for block in self.blocks
        ]

    @cached_property
    def weighted_inputs(self) -> list[dict[str, Distribution]]:
        """Of |x_i| times the norm of the column that it is multiplied by, for each projection."""
        found = [{name: Distribution() for name in PROJECTIONS} for _ in self.blocks]
        watched = [
            (block.linears[name], lambda x, seen=row[name], norm=norms[name]: seen.add(x * norm))
            for block, row, norms in zip(self.blocks, found, self.norms, strict=True)
            for name in PROJECTIONS
        ]
        observe(self.model, self.windows, watched)
        return found

    @cached_property
    def cett(self) -> CettCurve:
        """CETT against thresholds of a neuron's output."""
        return CettCurve(self.model, self.windows)

    @cached_property
    def outputs(self) -> list[Distribution]:
        """Of the norms of what single neurons add to the FFN's output, one a block."""
        return [row["down_proj"] for row in self.weighted_inputs]

    def left_out(self, cuts: list[dict[str, InputCut]]) -> list[dict[str, torch.Tensor]]:
        """What projections lose on average by the inputs that `cuts` leave out, [out]: W (mean of x - kept)."""
        sums = [dict.fromkeys(row, torch.zeros(())) for row in cuts]

        def add(x: torch.Tensor, index: int, name: str) -> None:
            cut = cuts[index][name]
            rest = x - cut.kept(x, cut.keep(x))
            sums[index][name] = sums[index][name].to(x.device) + rest.flatten(0, -2).sum(0, dtype=torch.float32)

        watched = [
            (block.linears[name], lambda x, index=index, name=name: add(x, index, name))
            for index, block in enumerate(self.blocks)
            for name in cuts[index]
        ]
        observe(self.model, self.windows, watched)
        tokens = self.windows.numel()
        return [
            {name: weight_of(block.linears[name]).float() @ (sums[index][name] / tokens) for name in cuts[index]}
            for index, block in enumerate(self.blocks)
        ]

    def factors(self, index: int, name: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, in] and B [out, rank] whose product is nearly the best of that rank for a projection's weight."""
        weight = weight_of(self.blocks[index].linears[name])
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            torch.manual_seed(0)  # the method is a randomized one
            left, values, right = torch.svd_lowrank(weight.float(), q=min(rank + OVERSAMPLED, *weight.shape), niter=4)
        second = left[:, :rank] * values[:rank]
        return right[:, :rank].T.contiguous().to(weight.dtype), second.contiguous().to(weight.dtype)


OVERSAMPLED = 8  # dimensions beside the rank that the randomized decomposition looks at
