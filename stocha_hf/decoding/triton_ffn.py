"""The sparse FFN of a decode step on a GPU, in two Triton kernels, for 1 to 8 tokens.

All gate rows are multiplied; where a neuron is active its rows of up and of the transposed down projection are read
too. What is active never leaves the GPU and no shape depends on it, so that CUDA graphs can record the kernels. With
one token a program masks the loads of inactive rows, which then cost no memory traffic (triton_one_token.py); with
more, tensor cores take whole tiles, so the active neurons are listed first (triton_tokens.py). Sums are split over
programs and added in a fixed order: the same input gives the same bits.

Rounding follows PyTorch's dense path, as in cpp/ffn.h: gate, up, activation and hidden are rounded to the weights'
type, sums are in float32. Where a token holds infinities or NaN, all neurons are active, since 0 * inf is NaN.

    ffn(x, gate, up, down_t, "relu", 0.0)  # = W_down(act(W_gate x) * (W_up x)) on the GPU of x

`TRITON_INTERPRET=1 pytest tests/test_triton.py` runs the kernels on CPU tensors (Triton 3.6 needs NumPy < 2.4 for it).
"""

from __future__ import annotations

import warnings

import torch

try:
    import triton
except ImportError:
    triton = None
else:
    from stocha_hf.decoding import triton_one_token, triton_tokens

_failures: list[Exception] = []


def available() -> bool:
    """Whether Triton is installed and has not failed yet."""
    return triton is not None and not _failures


def fail(error: Exception) -> None:
    """Use Triton no more, and say why."""
    _failures.append(error)
    warnings.warn(
        f"stocha_hf's Triton kernels cannot be built, so decoding on the GPU is dense: {error!r}",
        RuntimeWarning,
        stacklevel=3,
    )


def ffn(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down_t: torch.Tensor, activation: str, threshold: float
) -> torch.Tensor | None:
    """A gated FFN on x [..., H] of 1 to 8 tokens; gate, up and the transposed down are contiguous, [M, H].

    All on one GPU and of one dtype: bfloat16, float16 or float32. Equals PyTorch's dense path within the rounding of
    sums, but for infinite or NaN weights of skipped neurons. None, after one warning that names the cause, where
    Triton cannot build the kernels.
    """
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    launch = triton_one_token.launch if x.numel() == x.shape[-1] else triton_tokens.launch
    try:
        with torch.cuda.device(x.get_device()):  # Triton launches on the current one
            launch(x, gate, up, down_t, out, activation, float(threshold))
    except Exception as error:  # of the compiler, the linker, the driver: Triton has no common class
        fail(error)
        return None
    return out
