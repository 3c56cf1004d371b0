"""A projection whose thresholds are learned: what learned_inputs.py puts in a model's projections for a run, and when.

It cuts hard, as the projection that it stands for, and its backward tells what thresholds, and the weights of tokens'
own factors, are to do for the loss and for what is read (threshold_gradients.py). These are leaves beside the module's
parameters, which are not the model's: neither its optimizer nor its state dict knows them.

    check_learned(model, args, adapter=False)
    become(projection, LearnedCut)              # after its LEAVES are in its __dict__
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stocha_hf.cuts_stocha import cut_class, cut_projections, token_logs
from stocha_hf.errors import StochaError
from stocha_hf.measurement.blocks import blocks
from stocha_hf.measurement.selection.threshold_gradients import SeenCut
from stocha_hf.training.entry import stocha_model
from stocha_hf.training.held_inputs import trains_with_cuts

LEAVES = ("limits", "more", "seen", "by_loss", "by_reading", "part")
CutLinear: Any = cut_class(nn.Linear)


def check_learned(model: Any, args: Any, adapter: bool) -> None:
    """Raise StochaError where thresholds cannot be learned with a model's weights."""
    given = "input_thresholds is learned and "
    if not trains_with_cuts(model):
        raise StochaError(
            f"{given}the model computes all inputs in full in training: expected one that cuts them there; convert it "
            "with --inputs SHARE --inputs-train"
        )
    if adapter:
        raise StochaError(f"{given}use_peft true: an adapter has no place for thresholds; expected use_peft: false")
    if args.fp16:
        raise StochaError(f"{given}fp16 true, which scales gradients: expected bf16 or float32")
    if args.input_factor_rate and "factors" not in cut_projections(model)[0].state:
        raise StochaError(
            f"input_factor_rate is {args.input_factor_rate} and the model's own code is of before tokens' factors: "
            "expected that of now; run stocha-convert on its folder for a new copy, or load it by load_model"
        )
    if any(stocha_model(model).config.stocha["inputs"].get("centres") or ()):
        raise StochaError(f"{given}the model's cuts have centres: expected thresholds alone")
    kinds = {linear.weight.dtype for block in blocks(model) for linear in block.linears.values()}
    if kinds != {torch.float32}:
        raise StochaError(
            f"{given}the weights are {', '.join(sorted(map(str, kinds)))}: expected dtype: float32, since scales move "
            "into them at each checkpoint; bf16: true computes in bfloat16 all the same"
        )


class LearnedCut(CutLinear):
    """A projection that cuts at limits with a gradient, for the time of a run.

    limits: logarithms of thresholds, float32 [inputs].
    more, seen: zeros [inputs], of whose gradients threshold_gradients.SeenCut tells.
    by_loss, by_reading: weights of tokens' factors, [inputs + 1], twice: with the loss's gradient and with reading's.
        None: there are none.
    part: of all weights that cut, what an input reads.
    """

    limits: torch.Tensor
    more: torch.Tensor
    seen: torch.Tensor
    by_loss: Any
    by_reading: Any
    part: float

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        at, paid = self.cutting.cut_at, self.cutting.paid_at
        at = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if at is None else at
        logs = fewer = None
        if self.by_loss is not None:
            given = x.detach()  # the loss moves the weights of factors by what they are, not what they look at
            logs, fewer = token_logs(given, self.by_loss), self.part * token_logs(given, self.by_reading)
        return SeenCut.apply(x, self.limits, self.more, self.seen, logs, fewer, at, paid)
