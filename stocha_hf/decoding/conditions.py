"""When a step may leave the native path: what its tensors and modules must be like.

A fast path computes what the native modules would compute. Anything that must be called, such as a hook, an adapter or
a quantized or offloaded layer, is called: then these functions say no.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

FEW = 8  # tokens of a decode step, at most: as many as the kernels take
_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
OLD_CACHE = "past_key_values"  # the argument, to which transformers 5.24 gave a new name
CACHE = "cache" if "cache" in _FIELDS else OLD_CACHE
DEVICES = ("cpu", "cuda")  # that have kernels


def is_plain_inference(x: torch.Tensor) -> bool:
    """Return whether x is a plain tensor of a type that the kernels know, with nothing recorded for a backward."""
    return (
        type(x) is torch.Tensor  # neither fake nor distributed
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.jit.is_tracing()
    )


def has_few_tokens(x: torch.Tensor) -> bool:
    """Return whether x [..., size] has as few tokens as the kernels take."""
    return x.device.type in DEVICES and 0 < x.numel() <= FEW * x.shape[-1]


def is_step(x: torch.Tensor) -> bool:
    """Return whether x [..., size] is a decode step's: a few tokens of plain inference."""
    return has_few_tokens(x) and is_plain_inference(x)


def is_called(module: nn.Module) -> bool:
    """Return whether something hangs on a module's call, so that it must be made: a hook, or another forward."""
    return bool(
        (module._forward_hooks and not all(map(_is_idle, module._forward_hooks.values())))
        or module._forward_pre_hooks
        or "forward" in module.__dict__
        or nn.modules.module._has_any_global_hook()
    )


def _is_idle(hook: object) -> bool:
    """Whether a hook is what a call with output_hidden_states left behind: it acts in such calls alone."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def is_plain(linear: nn.Module, x: torch.Tensor, kind: type[nn.Module] = nn.Linear) -> bool:
    """Return whether a module is a `kind` of x's dtype and device and nothing else: no adapter, quantization,
    parametrization, offloading or hook.
    """
    weight = linear._parameters.get("weight")
    return (
        type(linear) is kind
        and type(weight) is nn.Parameter
        and weight.device == x.device
        and weight.dtype == x.dtype
        and not is_called(linear)
    )
