"""Rounding a matrix to 4 bits with error feedback: what one input's weights lose, others make up for.

GPTQ (Frantar et al., arXiv 2210.17323): inputs are rounded one after the other, and the error that rounding makes in
the layer's outputs, on the calibration text, is spread over the inputs that are still floats, by the inverse of the
inputs' second moments. A matrix whose rows are outputs has its scales fitted a group of inputs at a time. One whose
rows are inputs, as down_proj, has the scales of ROWS inputs fitted at a time. There, inputs take turns by their second
moments: few neurons make most of a layer's output, and these come while there is most left to make up for them.

    codes, scale = round_with_feedback(weight, moments, transposed=False)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stocha_hf.quantization import GROUP
from stocha_hf.quantization_stocha import decode, encode, fit, pack

DAMPING = 0.01  # of the mean second moment, added to each
ROWS = 16  # inputs of a transposed matrix that are fitted together


def round_with_feedback(
    weight: torch.Tensor, moments: torch.Tensor, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix to 4 bits for its inputs' second moments (Frantar et al., arXiv 2210.17323).

    Args:
        weight: [outputs, inputs], or [inputs, outputs] where `transposed`.
        moments: float32 [inputs, inputs], the sum or mean of x x^T over the calibration text.
        transposed: Whether the rows are inputs.

    Returns:
        As quantization_stocha.quantize.
    """
    columns = weight.shape[1]
    weight = F.pad(weight.float(), (0, -columns % GROUP))  # a copy, which is updated below
    if transposed:
        order = moments.diagonal().argsort(descending=True)
        codes, scale = _by_inputs(weight[order], _inverse_factor(moments[order][:, order]))
        back = order.argsort()
        codes, scale = codes[back], scale[back]
    else:
        codes, scale = _by_groups(weight, _inverse_factor(F.pad(moments, (0, weight.shape[1] - columns) * 2)))
    return pack(codes, 4), scale


def _inverse_factor(moments: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the damped moments."""
    mean = moments.diagonal().mean().clamp(min=1e-20)
    damped = moments / mean + DAMPING * torch.eye(len(moments), device=moments.device)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def _by_groups(weight: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = torch.empty_like(weight), []
    counts = factor.diagonal() ** -2  # what an error costs once the inputs that follow have made up for it
    for first in range(0, weight.shape[1], GROUP):
        last = first + GROUP
        scale = fit(weight[:, first:last], 4, counts[first:last])
        errors = weight.new_empty(len(weight), GROUP)
        for column in range(first, last):
            code = encode(weight[:, column, None], scale, 4)
            error = (weight[:, column] - decode(code, scale, 4)[:, 0]) / factor[column, column]
            weight[:, column + 1 : last] -= error[:, None] * factor[column, column + 1 : last]
            codes[:, column], errors[:, column - first] = code[:, 0], error
        weight[:, last:] -= errors @ factor[first:last, last:]
        scales.append(scale)
    return codes, torch.stack(scales, 1)


def _by_inputs(weight: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = torch.empty_like(weight), []
    even = weight.new_ones(GROUP)
    for first in range(0, len(weight), ROWS):
        last = min(first + ROWS, len(weight))
        scale = fit(weight[first:last].view(last - first, -1, GROUP), 4, even)
        errors = torch.empty_like(weight[first:last])
        for row in range(first, last):
            code = encode(weight[row].view(-1, GROUP), scale[row - first], 4)
            error = (weight[row] - decode(code, scale[row - first], 4).view(-1)) / factor[row, row]
            weight[row + 1 : last] -= factor[row, row + 1 : last, None] * error
            codes[row], errors[row - first] = code.view(-1), error
        weight[last:] -= factor[first:last, last:].T @ errors
        scales.append(scale)
    return codes, torch.cat(scales)
