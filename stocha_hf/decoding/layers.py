"""Linear layers as a CPU decode step runs them: one kernel, since PyTorch's takes three times as long with few tokens.

For steps that must call the model's modules. A model's modules have this class only inside a step (runtime.step), so
that whatever looks at them between steps, such as a quantizer or a sharding policy, sees the native ones.
"""

from __future__ import annotations

import torch
from torch import nn

from stocha_hf.decoding import ops
from stocha_hf.decoding.conditions import is_step
from stocha_hf.decoding.ops import available


class Linear(nn.Linear):
    """A Linear layer that decodes with the kernel. Not for an FFN's, which has a kernel of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._parameters.get("weight")
        here = x.is_cpu and not torch.compiler.is_compiling() and is_step(x)
        if here and type(weight) is nn.Parameter and _is_taken(weight, x.dtype):
            return ops.linear(x, weight, self._parameters.get("bias"))
        return super().forward(x)


def _is_taken(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel takes this weight with an x of this dtype."""
    return weight.is_cpu and weight.dtype == dtype and weight.is_contiguous() and available()


IN_A_STEP: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: Linear}  # the native class: the class during a step
