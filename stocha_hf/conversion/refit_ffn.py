"""Refitting one gated FFN so that, with ReLU or FATReLU, it computes what was asked of it on calibration text.

Given the FFN's inputs n and targets t (a row a token), minimise the weighted squared error of
W_down(act(W_gate n) * (W_up n)) - t, where act(x) = x if x > threshold else 0:

1. W_down alone, in closed form: ridge regression towards the old W_down (normal equations in float64).
2. All three matrices and the threshold, by a few hundred steps of Adam on this one FFN, no other layer involved. The
   closed form alone cannot move which neurons fire. The threshold follows the wanted share of zeros.
3. W_down in closed form again, with the ridge that is best on held-out tokens.

Before that, `balance` rescales neurons so that one threshold a layer cuts each neuron where its contribution to the
output is equally small: for any positive c, (c W_gate, W_up / c) is the same FFN under ReLU.

    fitted = refit_ffn(ffn, Rows(inputs, targets, weights), share=0.9, steps=200, seed=0)
    fitted.ffn, fitted.error, fitted.zeros
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from stocha_hf.conversion.layerwise import autocast
from stocha_hf.errors import StochaError

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)  # relative to the mean diagonal of the normal equations
HELD_OUT = 16  # the last of so many parts of the rows chooses the ridge
BATCH = 2048  # rows of a step, and of a block of the normal equations
RATE = 0.03  # Adam's learning rate, relative to a matrix's root mean square
THRESHOLD_ROWS = 512  # rows that the threshold is chosen on while fitting
EVERY = 10  # steps from one choice of the threshold to the next
PARTS = ("gate_proj", "up_proj", "down_proj")  # of an FFN, in its order


@dataclass(frozen=True)
class FFN:
    """The weights of a gated FFN without biases, float32: gate and up [M, H], down [H, M]; and FATReLU's threshold."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    threshold: float = 0.0

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """The matrices by the names of their projections."""
        return dict(zip(PARTS, (self.gate, self.up, self.down), strict=True))

    def hidden(self, inputs: torch.Tensor) -> torch.Tensor:
        """act(W_gate n) * (W_up n), [..., M]."""
        return F.threshold(F.linear(inputs, self.gate), self.threshold, 0.0) * F.linear(inputs, self.up)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(self.hidden(inputs), self.down)


@dataclass(frozen=True)
class Fitted:
    """A refitted FFN and its figures on held-out rows.

    `error` is its squared error relative to that of an FFN that returns 0, `zeros` the share of zeros in its hidden
    vectors.
    """

    ffn: FFN
    error: float
    zeros: float


@dataclass(frozen=True)
class Rows:
    """Calibration rows: inputs and targets [T, H], and the weight [T] of each row's squared error."""

    inputs: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: slice | torch.Tensor) -> Rows:
        return Rows(self.inputs[index], self.targets[index], self.weights[index])

    def blocks(self) -> Iterator[Rows]:
        return (self[start : start + BATCH] for start in range(0, len(self), BATCH))


def refit_ffn(
    ffn: FFN,
    rows: Rows,
    *,
    share: float | None = None,
    steps: int = 200,
    seed: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> Fitted:
    """The refitted FFN and its figures.

    `share` is the wanted share of zeros in the hidden vector; None, or less than plain ReLU makes, is plain ReLU.
    `progress` is called after each step. Raises StochaError when no ridge makes the normal equations solvable.
    """
    kept = len(rows) - len(rows) // HELD_OUT  # slices, since an index would copy all rows
    train, held_out = rows[:kept], rows[kept:]
    generator = torch.Generator().manual_seed(seed)
    ffn = balance(ffn, held_out.inputs)
    ffn = replace(ffn, threshold=threshold_for(ffn, held_out, share))
    ffn = solve_down(ffn, train[: len(train) // 4], held_out).ffn
    ffn = fit_locally(ffn, train, share, steps, generator, progress)
    ffn = replace(ffn, threshold=threshold_for(ffn, held_out, share))
    return solve_down(ffn, train, held_out)


def contribution_scale(ffn: FFN, inputs: torch.Tensor) -> torch.Tensor:
    """What each neuron's gate is multiplied with on its way to the output, [M]: rms of up, norm of W_down's column."""
    squares = [F.linear(block, ffn.up).square().sum(0) for block in inputs.split(BATCH)]
    return (torch.stack(squares).sum(0) / len(inputs)).sqrt() * ffn.down.norm(dim=0)


def balance(ffn: FFN, inputs: torch.Tensor) -> FFN:
    """The same function under ReLU, its neurons scaled so that gate pre-activations compare as contributions do."""
    scale = contribution_scale(ffn, inputs)
    scale = (scale / scale.median()).clamp(0.05, 20).unsqueeze(1)
    return replace(ffn, gate=ffn.gate * scale, up=ffn.up / scale)


@torch.no_grad()
def threshold_for(ffn: FFN, rows: Rows, share: float | None) -> float:
    """The threshold that zeroes `share` of the hidden vector on a sample of the rows; 0 where plain ReLU does."""
    if share is None:
        return 0.0
    sample = rows.inputs[:: max(len(rows) // THRESHOLD_ROWS, 1)]
    gates = F.linear(sample, ffn.gate).flatten()
    return max(gates.kthvalue(max(round(share * gates.numel()), 1)).values.item(), 0.0)


def fit_locally(
    ffn: FFN,
    rows: Rows,
    share: float | None,
    steps: int,
    generator: torch.Generator,
    progress: Callable[[], object],
) -> FFN:
    """Adam on the three matrices, cosine learning rate; the threshold is re-chosen on the way."""
    weights = [matrix.clone().requires_grad_() for matrix in (ffn.gate, ffn.up, ffn.down)]
    rates = [RATE * weight.detach().square().mean().sqrt().item() for weight in weights]
    groups = [{"params": [weight], "lr": rate} for weight, rate in zip(weights, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if len(order) < min(BATCH, len(rows)):
            order = torch.randperm(len(rows), generator=generator)
        chosen, order = order[:BATCH], order[BATCH:]
        batch = rows[chosen.to(rows.inputs.device)]
        if share is not None and step % EVERY == 0:
            ffn = replace(ffn, threshold=threshold_for(_as_ffn(weights, 0.0), batch, share))
        factor = min((step + 1) / (0.05 * steps), 1.0) * (1 + math.cos(math.pi * step / steps)) / 2
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        with torch.enable_grad(), autocast(batch.inputs.device):
            output = _as_ffn(weights, ffn.threshold)(batch.inputs)
            error = ((output.float() - batch.targets).square().sum(1) * batch.weights).mean()
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress()
    return _as_ffn([weight.detach() for weight in weights], ffn.threshold)


def _as_ffn(weights: list[torch.Tensor], threshold: float) -> FFN:
    gate, up, down = weights
    return FFN(gate, up, down, threshold)


def solve_down(ffn: FFN, rows: Rows, held_out: Rows) -> Fitted:
    """The FFN with the W_down of least error on `rows`, ridge towards the old one.

    The ridge is the one of RIDGES with the least error on `held_out`. Raises StochaError if none can be solved.
    """
    products, right = _normal_equations(ffn, rows)
    diagonal = products.diagonal().mean()
    judged = [(_hidden(ffn, block), block) for block in held_out.blocks()]
    best: tuple[float, torch.Tensor] | None = None
    for ridge in RIDGES:
        amount = ridge * diagonal
        left = products.clone()
        left.diagonal().add_(amount)
        factor, failed = torch.linalg.cholesky_ex(left)
        del left  # as large as the rest of a wide layer
        if failed:
            continue
        down = torch.cholesky_solve(right + amount * ffn.down.T.double(), factor).float()
        error = _error(down, judged)
        if math.isfinite(error) and (best is None or error < best[0]):
            best = error, down
    if best is None:
        raise StochaError(
            f"the normal equations of {len(rows)} calibration tokens are singular for every ridge up to {RIDGES[-1]}: "
            "expected text with more variety, or more of it"
        )
    zeros = sum(int((hidden == 0).sum()) for hidden, _ in judged) / sum(hidden.numel() for hidden, _ in judged)
    return Fitted(replace(ffn, down=best[1].T.contiguous()), best[0], zeros)


def _hidden(ffn: FFN, block: Rows) -> torch.Tensor:
    """float32 [rows, M], computed in autocast's precision, as the streams are."""
    with autocast(block.inputs.device):
        return ffn.hidden(block.inputs).float()


def _normal_equations(ffn: FFN, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """sum of w a a^T [M, M] and of w a t^T [M, H]: float64, summed over float32 blocks."""
    width, size = ffn.gate.shape
    device = ffn.gate.device
    products = torch.zeros(width, width, dtype=torch.float64, device=device)
    right = torch.zeros(width, size, dtype=torch.float64, device=device)
    for block in rows.blocks():
        hidden = _hidden(ffn, block)
        weighted = hidden * block.weights.unsqueeze(1)
        products += weighted.T @ hidden
        right += weighted.T @ block.targets
    return products, right


def _error(down: torch.Tensor, judged: list[tuple[torch.Tensor, Rows]]) -> float:
    """Weighted squared error of W_down^T = down [M, H] on hidden vectors and their rows, relative to that of 0."""
    error = total = 0.0
    for hidden, block in judged:
        error += ((hidden @ down - block.targets).square().sum(1) * block.weights).sum().item()
        total += (block.targets.square().sum(1) * block.weights).sum().item()
    return error / total
