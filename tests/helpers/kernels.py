"""References and error bounds for the decode kernels, on a CPU and on a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from stocha_hf.modeling_stocha import hidden_vector


def dense(x: Any, gate: Any, up: Any, down_t: Any, activation: str, threshold: float) -> torch.Tensor:
    ffn: Any = SimpleNamespace(threshold=threshold, running=activation)
    return hidden_vector(F.linear(x, gate), F.linear(x, up), ffn) @ down_t


def matrices(size: int, width: int, tokens: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(size + width + tokens)
    weights = [torch.randn(width, size) * size**-0.5 for _ in range(3)]
    return [tensor.to(dtype) for tensor in (torch.randn(tokens, size), *weights)]


def bound(found: torch.Tensor, exact: torch.Tensor) -> float:
    """What PyTorch's own result leaves as an error, and a quarter of the type's precision, as sums differ in order."""
    return 1.5 * error(found, exact) + torch.finfo(found.dtype).eps / 4 + 1e-6


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm().clamp(min=1e-9)).item()
