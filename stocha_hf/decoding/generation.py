"""generate() for a model whose steps are one call of the kernels, or one graph of them on a GPU.

transformers' loop takes two milliseconds a token around the model's call, of which a small model's step needs one or
two. The loops here, loop.py and gpu_loop.py, do what it does. This file says when.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from stocha_hf.decoding import plan as plans
from stocha_hf.decoding.cache import takes
from stocha_hf.decoding.conditions import CACHE, FEW
from stocha_hf.decoding.loop import Loop
from stocha_hf.decoding.ops import available

# generate() has made stopping criteria of a tokenizer before; `transformers serve` always gives it one
KNOWN = {"attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep", "tokenizer"}


def sample(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Return what GenerationMixin._sample returns for these arguments; None where its own loop is to run."""
    if synced_gpus or not is_plain_call(model, input_ids, generation_config, model_kwargs):
        return None
    make = LOOPS.get(input_ids.device.type)
    loop = None if make is None else make(model, input_ids, generation_config, model_kwargs)
    return None if loop is None else loop.run(logits_processor, stopping_criteria, streamer)


def mode_kwargs(native: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return what GenerationMixin._extract_generation_mode_kwargs, `native`, returns, with the streamer.

    That method drops it where `custom_generate` is a function, also one with an argument for it, as `lossless` is.
    """
    given = inspect.signature(native).bind(*args, **kwargs).arguments
    found = native(*args, **kwargs)
    custom, streamer = given.get("custom_generate"), given.get("streamer")
    if callable(custom) and streamer is not None and "streamer" in inspect.signature(custom).parameters:
        found["streamer"] = streamer
    return found


def is_plain_call(model: Any, input_ids: torch.Tensor, config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether nothing is asked of generate() that the loops do not do."""
    mask = kwargs.get("attention_mask")
    return (
        0 < len(input_ids) <= FEW
        and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        and not torch.is_autocast_enabled(input_ids.device.type)
        and not (config.output_attentions or config.output_hidden_states or config.prefill_chunk_size)
        and not (model.config.output_attentions or model.config.output_hidden_states)
        and bool(kwargs.get("use_cache"))
        and kwargs.get(CACHE) is not None
        and (mask is None or (type(mask) is torch.Tensor and mask.dim() == 2))
        and all(name in KNOWN or value is None for name, value in kwargs.items())
    )


def loop_on_cpu(
    model: Any, input_ids: torch.Tensor, config: Any, kwargs: dict[str, Any], kind: type[Loop] = Loop
) -> Loop | None:
    """Return a loop of this kind for these arguments of generate(), None where transformers' own is to run."""
    is_here = input_ids.is_cpu and available() and is_plain_call(model, input_ids, config, kwargs)
    plan = plans.of(model) if is_here else None
    return kind(model, plan, input_ids, config, kwargs) if plan is not None and takes(kwargs[CACHE]) else None


def _on_gpu(model: Any, input_ids: torch.Tensor, config: Any, kwargs: dict[str, Any]) -> Loop | None:
    if not available("cuda"):
        return None
    from stocha_hf.decoding import gpu_loop  # which needs Triton

    return gpu_loop.loop(model, input_ids, config, kwargs)


LOOPS: dict[str, Callable[..., Loop | None]] = {"cpu": loop_on_cpu, "cuda": _on_gpu}  # what makes one, or None
