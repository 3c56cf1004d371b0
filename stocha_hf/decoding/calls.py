"""Which code of this package computes a model's call, by the device of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from stocha_hf.decoding import step
from stocha_hf.decoding.ops import available


def _on_gpu(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not available("cuda"):
        return None
    from stocha_hf.decoding import gpu_call  # which needs Triton

    return gpu_call.call(model, args, kwargs)


CALLS: dict[str, Callable[..., Any]] = {"cpu": step.call, "cuda": _on_gpu}


def call(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a call of a causal language model in eval mode returns; None where its forward is to run."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    found = CALLS.get(ids.device.type) if isinstance(ids, torch.Tensor) else None
    return None if found is None else found(model, args, kwargs)
