"""Rounding a matrix with error feedback: what one input's weights lose, the inputs that follow make up for.

GPTQ (Frantar et al., arXiv 2210.17323): inputs are rounded one after the other, and the error that rounding makes in
the layer's outputs, on the calibration text, is spread over the inputs that are still floats, by the inverse of the
inputs' second moments. A matrix whose rows are outputs has its scales fitted a group of inputs at a time; one whose
rows are inputs, as down_proj, has all of an input's groups fitted on the way.

    codes, scale, minimum = round_with_feedback(weight, moments, bits=4, minimum=True, transposed=False)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stocha_hf.quantization import GROUP
from stocha_hf.quantization_stocha import decode, encode, fit, pack

DAMPING = 0.01  # of the mean second moment, added to each
ROWS = 64  # inputs of a transposed matrix whose scales are fitted together


def round_with_feedback(
    weight: torch.Tensor, moments: torch.Tensor, bits: int, minimum: bool, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize a matrix for its inputs' second moments (Frantar et al., arXiv 2210.17323).

    Args:
        weight: [outputs, inputs], or [inputs, outputs] where `transposed`.
        moments: float32 [inputs, inputs], the sum or mean of x x^T over the calibration text.
        bits: 4 or 8.
        minimum: Whether groups have a minimum.
        transposed: Whether the rows are inputs.

    Returns:
        As quantization_stocha.quantize.
    """
    columns = weight.shape[1]
    weight = F.pad(weight.float(), (0, -columns % GROUP))  # a copy, which is updated below
    if not transposed:
        moments = F.pad(moments, (0, weight.shape[1] - columns) * 2)
    factor = _inverse_factor(moments)
    rounded = _by_inputs(weight, factor, bits, minimum) if transposed else _by_groups(weight, factor, bits, minimum)
    codes, scale, least = rounded
    return pack(codes, bits), scale, least


def _inverse_factor(moments: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the damped moments."""
    mean = moments.diagonal().mean().clamp(min=1e-20)
    damped = moments / mean + DAMPING * torch.eye(len(moments), device=moments.device)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


Rounded = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def _by_groups(weight: torch.Tensor, factor: torch.Tensor, bits: int, minimum: bool) -> Rounded:
    codes, parts = torch.empty_like(weight), []
    counts = factor.diagonal() ** -2  # what an error costs once the inputs that follow have made up for it
    for first in range(0, weight.shape[1], GROUP):
        last = first + GROUP
        scale, least = fit(weight[:, first:last], bits, minimum, counts[first:last])
        errors = weight.new_empty(len(weight), GROUP)
        for column in range(first, last):
            code = encode(weight[:, column, None], scale, least, bits)
            error = (weight[:, column] - decode(code, scale, least, bits)[:, 0]) / factor[column, column]
            weight[:, column + 1 : last] -= error[:, None] * factor[column, column + 1 : last]
            codes[:, column], errors[:, column - first] = code[:, 0], error
        weight[:, last:] -= errors @ factor[first:last, last:]
        parts.append((scale, least))
    scales, minima = zip(*parts, strict=True)
    return codes, torch.stack(scales, 1), torch.stack(minima, 1) if minimum else None


def _by_inputs(weight: torch.Tensor, factor: torch.Tensor, bits: int, minimum: bool) -> Rounded:
    codes, parts = torch.empty_like(weight), []
    even = weight.new_ones(GROUP)
    for first in range(0, len(weight), ROWS):
        last = min(first + ROWS, len(weight))
        scale, least = fit(weight[first:last].view(last - first, -1, GROUP), bits, minimum, even)
        errors = torch.empty_like(weight[first:last])
        for row in range(first, last):
            own = scale[row - first], None if least is None else least[row - first]
            code = encode(weight[row].view(-1, GROUP), *own, bits)
            error = (weight[row] - decode(code, *own, bits).view(-1)) / factor[row, row]
            weight[row + 1 : last] -= factor[row, row + 1 : last, None] * error
            codes[row], errors[row - first] = code.view(-1), error
        weight[last:] -= factor[first:last, last:].T @ errors
        parts.append((scale, least))
    scales, minima = zip(*parts, strict=True)
    return codes, torch.cat(scales), torch.cat(minima) if minimum else None
