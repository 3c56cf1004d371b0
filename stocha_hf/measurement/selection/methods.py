"""METHODS, the table of training-free methods: what a model need not read, chosen by rules that text calibrates.

Each row makes a Selection (applied.py) for a share: of inputs or neurons that are left out, 0 leaving nothing out. The
rows differ in what they choose and when, and so in what a decode step still has to read, which is what they are to be
compared by. docs/experiments/selection.md describes them one by one.

    calibration = Calibration(model, windows)
    for name, method in METHODS.items():
        with method.select(calibration, 0.5).applied(model) as meter:
            evaluate(model, windows)
        print(name, meter.read().share)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from stocha_hf.cuts import PROJECTIONS, SHARED
from stocha_hf.errors import StochaError
from stocha_hf.measurement.selection.applied import Selection
from stocha_hf.measurement.selection.attribution import Attribution, Score, corrected, gradient_output, snip
from stocha_hf.measurement.selection.calibration import Calibration
from stocha_hf.measurement.selection.cuts import (
    CoreNeurons,
    GivenNeurons,
    InputCut,
    NeuronCut,
    ReusedNeurons,
    TopNeurons,
)
from stocha_hf.measurement.selection.learned import learn_groups
from stocha_hf.measurement.selection.output_shares import allotted
from stocha_hf.measurement.selection.thresholds import greedy_shares, thresholds, uniform_shares

NORMED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # whose inputs come from a norm
LOW_RANK = 0.1  # of the bytes that R-Sparse reads, spent on the low-rank part
GAMMA = 3  # tokens that reuse the choice of the one before them
BISECTIONS = 20


@dataclass(frozen=True)
class Method:
    """One row: how a selection is made, where it was published, and what a decode step reads with it.

    An `oracle` needs what is known only afterwards: it bounds what others could reach, and cannot generate.
    """

    make: Callable[[Calibration, float], Selection]
    paper: str
    reads: str
    oracle: bool = False

    def select(self, calibration: Calibration, share: float) -> Selection:
        """Make the selection that leaves out `share` of what this method chooses among.

        Args:
            calibration: The model, and the text that thresholds are taken from.
            share: From 0 to below 1.

        Raises:
            StochaError: for another share, and where the model has no decoder blocks.
        """
        if not 0 <= share < 1:
            raise StochaError(f"the share to leave out is {share}: expected a number from 0 to below 1")
        return self.make(calibration, share)


def _teal(calibration: Calibration, share: float) -> Selection:
    return _by_thresholds(calibration, uniform_shares(calibration.model, share))


def _teal_greedy(calibration: Calibration, share: float) -> Selection:
    shares = greedy_shares(calibration.model, calibration.windows, calibration.inputs, share)
    return _by_thresholds(calibration, shares)


def _teal_output(calibration: Calibration, share: float) -> Selection:
    shares = allotted(calibration.output_curves, share) if share else uniform_shares(calibration.model, share)
    return _by_thresholds(calibration, shares)


def _learned(calibration: Calibration, share: float) -> Selection:
    """Thresholds as they would be folded; the weights stay, so that the next method finds the model as it was."""
    if not share:
        return _teal(calibration, share)
    cuts: list[dict[str, InputCut]] = [{} for _ in calibration.blocks]
    groups = learn_groups(calibration.model, calibration.windows, share)
    for index, group in enumerate(groups):
        cut = InputCut(group.limits().detach().exp(), folded=True)
        cuts[index // len(SHARED)] |= dict.fromkeys(group.names, cut)
    return Selection(cuts)


def _by_thresholds(calibration: Calibration, shares: list[dict[str, float]]) -> Selection:
    found = thresholds(calibration.inputs, shares)
    return Selection([{name: InputCut(limit) for name, limit in row.items()} for row in found])


def _scap(calibration: Calibration, share: float, centre: str) -> Selection:
    cuts = []
    for row in calibration.inputs:
        centres = {name: getattr(seen, centre)() for name, seen in row.items()}
        cuts.append({name: InputCut(seen.radius(share, centres[name]), centres[name]) for name, seen in row.items()})
    return Selection(cuts)


def _wina(calibration: Calibration, share: float) -> Selection:
    cuts = []
    for row, norms in zip(calibration.weighted_inputs, calibration.norms, strict=True):
        smallest = torch.finfo(torch.float32).tiny
        limits = {name: seen.radius(share) / norms[name].clamp_min(smallest) for name, seen in row.items()}
        cuts.append({name: InputCut(limit) for name, limit in limits.items()})
    return Selection(cuts)


def _r_sparse(calibration: Calibration, share: float) -> Selection:
    kept = (1 - LOW_RANK) * (1 - share) if share else 1.0
    selection = _teal(calibration, 1 - kept)
    if not share:
        return selection
    cuts: list[dict[str, InputCut]] = []
    for index, block in enumerate(calibration.blocks):
        cuts.append({})
        for name in PROJECTIONS:
            out, size = (block.linears[name].out_features, block.linears[name].in_features)
            rank = max(round(LOW_RANK * (1 - share) * out * size / (out + size)), 1)
            cut = selection.inputs[index][name]
            cuts[index][name] = replace(cut, factors=calibration.factors(index, name, rank))
    return Selection(cuts)


def _spon(calibration: Calibration, share: float) -> Selection:
    cuts = _teal(calibration, share).inputs
    constants = calibration.left_out(cuts)
    return Selection(
        [
            {name: replace(cut, constant=constants[index][name]) for name, cut in row.items()}
            for index, row in enumerate(cuts)
        ]
    )


def _relu_after_norms(calibration: Calibration, share: float) -> Selection:
    return Selection(
        [
            {name: InputCut(row[name].quantile(share) if share else -torch.inf, signed=True) for name in NORMED}
            for row in calibration.inputs
        ]
    )


def _cats(calibration: Calibration, share: float) -> Selection:
    return _neurons(calibration, [NeuronCut("gate", seen.radius(share)) for seen in calibration.gates])


def _magnitude(calibration: Calibration, share: float) -> Selection:
    return _neurons(calibration, [NeuronCut("hidden", row["down_proj"].radius(share)) for row in calibration.inputs])


def _cett(calibration: Calibration, share: float) -> Selection:
    """The CETT, one for all layers, at which the layers leave out `share` on average."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS if share else 0):
        middle = (low + high) / 2
        limits = calibration.cett.thresholds(middle)
        shares = [
            seen.below(limit) - seen.below(-limit) for seen, limit in zip(calibration.outputs, limits, strict=True)
        ]
        low, high = (middle, high) if sum(shares) / len(shares) < share else (low, middle)
    limits = calibration.cett.thresholds(low)
    cuts = [
        NeuronCut("hidden", limit / norms["down_proj"]) for limit, norms in zip(limits, calibration.norms, strict=True)
    ]
    return _neurons(calibration, cuts)


def _top_k(calibration: Calibration, share: float, score: str) -> Selection:
    return _neurons(calibration, [TopNeurons(score, count=count) for count in _counts(calibration, share)])


def _core(calibration: Calibration, share: float) -> Selection:
    cuts = [CoreNeurons("hidden", count=count) for count in _counts(calibration, share)]
    return replace(_neurons(calibration, cuts), needs_prompt=True)


def _reuse(calibration: Calibration, share: float) -> Selection:
    limits = [row["down_proj"].radius(share) for row in calibration.inputs]
    return _neurons(calibration, [ReusedNeurons("hidden", limit, gamma=GAMMA if share else 0) for limit in limits])


def _attribution(calibration: Calibration, share: float, score: Score) -> Selection:
    cuts = [GivenNeurons() for _ in calibration.blocks]
    prepare = Attribution(calibration.model, score, cuts, _counts(calibration, share))
    return replace(_neurons(calibration, cuts), prepare=prepare)


def _neurons(calibration: Calibration, cuts: list) -> Selection:
    return Selection([{} for _ in calibration.blocks], cuts)


def _counts(calibration: Calibration, share: float) -> list[int]:
    """How many neurons of each FFN stay."""
    widths = [block.linears["down_proj"].in_features for block in calibration.blocks]
    return [max(round((1 - share) * width), 1) for width in widths]


COLUMNS = "of all seven projections, the columns of the inputs that stay"
FOLDED = "thresholds are in the weights"
BY_GATE = "attention and the gate whole, up's rows and down's columns of the neurons that stay"
BY_HIDDEN = "attention, gate and up whole, down's columns of the neurons that stay"
BEFOREHAND = "attention whole, the rows and columns of the neurons that stay in gate, up and down"

METHODS = {
    "teal": Method(_teal, "TEAL, arXiv 2408.14690", COLUMNS),
    "teal_greedy": Method(_teal_greedy, "TEAL's allocation within blocks, arXiv 2408.14690", COLUMNS),
    "teal_output": Method(_teal_output, "TEAL with shares allotted over all layers, by the predictions", COLUMNS),
    "learned": Method(_learned, "TEAL with a threshold for each input, learned by gradient", f"{COLUMNS}; {FOLDED}"),
    "scap": Method(partial(_scap, centre="mode"), "SCAP, arXiv 2412.07174", f"{COLUMNS}, and a constant for each"),
    "scap_median": Method(
        partial(_scap, centre="median"), "SCAP, arXiv 2412.07174", f"{COLUMNS}, and a constant for each"
    ),
    "wina": Method(_wina, "WINA, arXiv 2505.19427", f"{COLUMNS}, and a threshold for each input"),
    "r_sparse": Method(_r_sparse, "R-Sparse, arXiv 2504.19449", f"{COLUMNS}, and two low-rank factors for each"),
    "spon": Method(_spon, "SPON, arXiv 2512.12744", f"{COLUMNS}, and a constant for each"),
    "relu_after_norms": Method(
        _relu_after_norms,
        "ReLU Strikes Back, stage 2, arXiv 2310.04564",
        "of q, k, v, gate and up the columns of the inputs that stay, o and down whole",
    ),
    "cats": Method(_cats, "CATS, arXiv 2404.08763", BY_GATE),
    "magnitude": Method(_magnitude, "the hidden vector's magnitude, as in TEAL, arXiv 2408.14690", BY_HIDDEN),
    "cett": Method(_cett, "ReLU^2 Wins, arXiv 2402.03804", BY_HIDDEN),
    "top_k": Method(partial(_top_k, score="hidden"), "Lazy Neuron, arXiv 2210.06313", BY_HIDDEN),
    "top_k_gate": Method(partial(_top_k, score="gate"), "Lazy Neuron, arXiv 2210.06313", BY_GATE),
    "core_infer": Method(_core, "CoreInfer, arXiv 2410.18311", BEFOREHAND),
    "reuse": Method(
        _reuse,
        "ReLU Strikes Back, arXiv 2310.04564",
        f"at one token of {GAMMA + 1}: {BY_HIDDEN}; at others: {BEFOREHAND}",
    ),
    "attribution": Method(
        partial(_attribution, score=corrected), "sparsing by attribution, arXiv 2406.06562", BEFOREHAND, oracle=True
    ),
    "attribution_gxo": Method(
        partial(_attribution, score=gradient_output), "GxO, as in arXiv 2406.06562", BEFOREHAND, oracle=True
    ),
    "attribution_snip": Method(
        partial(_attribution, score=snip),
        "SNIP's score, arXiv 1810.02340, as in arXiv 2406.06562",
        BEFOREHAND,
        oracle=True,
    ),
}
