"""TEAL's thresholds as a model's config holds them, so that its class cuts by itself: see InputCuts in cuts.py.

cuts = calibrate_inputs(model, windows, 0.4)
patch(model, StochaConfig(activation="silu", inputs=cuts))
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from stocha_hf.cuts import ALLOTMENTS, PROJECTIONS, InputCuts
from stocha_hf.cuts_stocha import cut_projections
from stocha_hf.errors import StochaError
from stocha_hf.measurement.evaluation import check_vocabulary
from stocha_hf.measurement.selection.distributions import EDGES, Distribution, input_distributions
from stocha_hf.measurement.selection.output_shares import output_shares
from stocha_hf.measurement.selection.thresholds import greedy_shares, thresholds, uniform_shares


def calibrate_inputs(
    model: Any,
    windows: torch.Tensor,
    share: float,
    of: Collection[str] = PROJECTIONS,
    allotment: str = "uniform",
    **fields: Any,
) -> InputCuts:
    """Find thresholds that cut a share of projections' input entries, by size (TEAL, arXiv 2408.14690).

    Args:
        model: A CausalLM of a known architecture, native or patched, that does not cut its inputs yet.
        windows: Token ids, int64 [windows, length], of text as the model will meet it: for a chat model with its
            template.
        share: Of the entries to cut, between 0 and 1.
        of: The projections that shall cut, names in PROJECTIONS.
        allotment: "uniform" cuts the share in each projection, "greedy" on average of a layer's weights, more where
            that changes the layer's output less, "output" on average of all layers, more where that changes the
            predictions less.
        **fields: More of InputCuts.

    Returns:
        The cuts. To run them, patch the model with them in its StochaConfig.

    Raises:
        StochaError: the model cuts already, an argument is none of these, a token id is beyond the vocabulary, or
            inputs are not finite.
    """
    if cut_projections(model):
        raise StochaError("the model cuts its inputs already: expected one that does not; call stocha_hf.unpatch")
    names = [name for name in PROJECTIONS if name in of]
    if not names or len(names) != len(set(of)):
        raise StochaError(f"the projections to cut are {of!r}: expected one or more of {', '.join(PROJECTIONS)}")
    if allotment not in ALLOTMENTS:
        raise StochaError(f"the allotment is {allotment!r}: expected one of {', '.join(ALLOTMENTS)}")
    check_vocabulary(model.config, windows)
    seen = input_distributions(model, windows)
    if not all(_is_finite(row[name]) for row in seen for name in names):
        raise StochaError(
            "the model computes values that are not finite on the calibration text: expected finite ones; check its "
            "weights"
        )
    shares = uniform_shares(model, share)
    if allotment == "greedy":
        shares = greedy_shares(model, windows, seen, share, names)
    elif allotment == "output":
        shares = output_shares(model, windows, seen, share, names)
    limits = thresholds(seen, shares)
    try:
        return InputCuts({name: [row[name] for row in limits] for name in names}, share=share, **fields)
    except ValueError as error:
        raise StochaError(str(error)) from None


def _is_finite(seen: Distribution) -> bool:
    return bool(EDGES[0] < seen.quantile(0.0) and seen.quantile(1.0) < EDGES[-1])
