"""Input thresholds: how the sizes of projections' input entries are distributed, and which threshold cuts a share.

TEAL (arXiv 2408.14690) cuts in each projection the entries below a quantile of their sizes on ordinary text. The sizes
are counted in one pass, exactly to bfloat16's precision, in memory that does not depend on the amount of text: the 15
bits beside a bfloat16's sign are in the order of the sizes, so 2^15 counters hold a whole distribution.

    windows = calibration_windows("text.parquet", Path(folder), tokens=16384, length=1024, seed=0)
    cuts = calibrate_inputs(model, windows, 0.4)
    patch(model, StochaConfig(activation="silu", inputs=cuts))
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from stocha_hf.errors import StochaError
from stocha_hf.measurement.evaluation import batches, check_vocabulary
from stocha_hf.modeling_stocha import cut_projections, projections
from stocha_hf.spec import PROJECTIONS, InputCuts

SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
SIZES = 2**15  # that a bfloat16 can have, infinite and NaN among them
INFINITE = 0x7F80  # the bits of the first that is no number


@torch.no_grad()
def calibrate_inputs(
    model: Any, windows: torch.Tensor, share: float, of: Collection[str] = PROJECTIONS, **fields: Any
) -> InputCuts:
    """Find thresholds that cut a share of each projection's input entries (TEAL's uniform ones, arXiv 2408.14690).

    Args:
        model: A CausalLM of a known architecture, native or patched, that does not cut its inputs yet.
        windows: Token ids, int64 [windows, length], of text as the model will meet it: for a chat model with its
            template.
        share: Of the entries to cut, between 0 and 1.
        of: The projections that shall cut, names in PROJECTIONS.
        **fields: More of InputCuts.

    Returns:
        The cuts. To run them, patch the model with them in its StochaConfig.

    Raises:
        StochaError: the model cuts already, a token id is beyond its vocabulary, or inputs are not finite.
    """
    if cut_projections(model):
        raise StochaError("the model cuts its inputs already: expected one that does not; call stocha_hf.unpatch")
    if unknown := sorted(set(of) - {*PROJECTIONS}):
        raise StochaError(f"the projections to cut hold {unknown}: expected names among {', '.join(PROJECTIONS)}")
    counts = input_sizes(model, windows, of)
    thresholds = {
        name: [threshold(layer[SAME_INPUT.get(name, name)], share) for layer in counts]
        for name in PROJECTIONS
        if name in of
    }
    try:
        return InputCuts(thresholds, share=share, **fields)
    except ValueError as error:
        raise StochaError(str(error)) from None


@torch.no_grad()
def input_sizes(model: Any, windows: torch.Tensor, of: Collection[str] = PROJECTIONS) -> list[dict[str, torch.Tensor]]:
    """Count the sizes of projections' input entries, layer by layer.

    Args:
        model: A CausalLM of a known architecture.
        windows: Token ids, int64 [windows, length].
        of: Names of projections.

    Returns:
        For each layer, by the name of the first projection that reads it (SAME_INPUT), int64 [SIZES]: how many entries
        had the size whose bfloat16 bits are the index.

    Raises:
        StochaError: a token id is beyond the vocabulary, or an entry is not finite.
    """
    check_vocabulary(model.config, windows)
    names = {SAME_INPUT.get(name, name) for name in of}
    counts: list[dict[str, torch.Tensor]] = []
    hooks = []
    for layer in projections(model):
        counts.append({name: torch.zeros(SIZES, dtype=torch.int64, device=_device(layer[name])) for name in names})
        hooks += [
            layer[name].register_forward_pre_hook(lambda module, args, into=into: _count(args[0], into))
            for name, into in counts[-1].items()
        ]
    try:
        for batch in batches(model, windows, "Calibrating"):
            model(batch, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    if any(bool(sizes[INFINITE:].any()) for layer in counts for sizes in layer.values()):
        raise StochaError(
            "the model computes values that are not finite on the calibration text: expected finite ones; check its "
            "weights"
        )
    return counts


def threshold(counts: torch.Tensor, share: float) -> float:
    """Return the least size that at least a share of the entries does not exceed. `counts` as of `input_sizes`."""
    reached = counts.cumsum(0)
    index = torch.searchsorted(reached, int(share * int(reached[-1])))
    return index.to(torch.int16).view(torch.bfloat16).item()


def _count(x: torch.Tensor, into: torch.Tensor) -> None:
    bits = x.detach().to(torch.bfloat16).view(torch.int16) & 0x7FFF  # without the sign
    into += torch.bincount(bits.flatten(), minlength=SIZES)


def _device(module: Any) -> torch.device:
    return next(module.parameters()).device
