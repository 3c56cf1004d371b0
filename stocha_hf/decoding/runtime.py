"""What an installed stocha_hf does for modeling_stocha.py: the other end of a contract with a version.

Every published repo carries the modeling_stocha.py of its day, so what passes between that file and this package must
not change without a number. The file asks `for_contract(its number)` and calls what comes back:

    call(model, args, kwargs)                 what a call of a causal language model in eval mode returns, or None
    sample(model, ...)                        what GenerationMixin._sample returns, or None
    mode_kwargs(native, ...)                  what generate() takes out of its arguments, by its own method `native`
    ffn(mlp, x)                               an FFN in eval mode, or None: the native path is to run
    quantized_linear(module, x)               a quantized Linear layer, or None
    dequantize(module, first, last, dtype)    rows of a quantized matrix, or None
    cut_linear(module, x)                     a Linear layer on an x that it has cut, or None
    stocha(gate, up, p, base, positive)       StochA's hidden vector in training, or None
    step(model, args, kwargs)                 a context around a model's call that `call` left to its forward
    held_bytes(model)                         bytes held beside the parameters

Of an MLP it relies on gate_proj, up_proj, down_proj, act_fn, running, threshold, hidden(gate, up) and a free attribute
decode_state; of a projection that cuts its input on what cuts.py reads, and a free attribute input_major; of a model
that cuts on `cutting`, None or a Cutting of cuts_stocha.py, whose fallback `call` and `sample` honour: of tokens
before a step's own, one of `tokens`, where input_ids have an attribute `stocha_text`, a Text of that file. Contract 0,
of stocha_hf 0.1, is served by stocha_hf/sparse.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from stocha_hf.decoding import noise, quantized
from stocha_hf.decoding.conditions import FEW
from stocha_hf.decoding.cuts import cut_linear
from stocha_hf.decoding.ffn import ffn
from stocha_hf.decoding.ops import available
from stocha_hf.decoding.prompts import prompt
from stocha_hf.decoding.state import held_bytes
from stocha_hf.errors import StochaError

CONTRACT = 1


class Runtime(NamedTuple):
    """The functions of contract 1."""

    call: Callable[..., Any]
    sample: Callable[..., Any]
    mode_kwargs: Callable[..., dict[str, Any]]
    ffn: Callable[..., torch.Tensor | None]
    quantized_linear: Callable[..., torch.Tensor | None]
    dequantize: Callable[..., torch.Tensor | None]
    cut_linear: Callable[..., torch.Tensor | None]
    stocha: Callable[..., torch.Tensor | None]
    step: Callable[..., AbstractContextManager[None]]
    held_bytes: Callable[[nn.Module], int]


def for_contract(number: int) -> Runtime:
    """Return the functions for a modeling_stocha.py of this contract. Raises StochaError for an unknown one."""
    if number != CONTRACT:
        raise StochaError(
            f"modeling_stocha.py asks for contract {number}: expected {CONTRACT}; install a newer stocha_hf"
        )
    from stocha_hf.decoding import calls, generation

    return Runtime(
        calls.call,
        generation.sample,
        generation.mode_kwargs,
        ffn,
        quantized.linear,
        quantized.dequantize,
        cut_linear,
        noise.stocha,
        step,
        held_bytes,
    )


class _Steps:
    """The steps that run in one model now: modules change class with the first to enter and the last to leave."""

    def __init__(self) -> None:
        self.lock, self.count = threading.Lock(), 0
        self.parts: list[int] = []
        self.changes: list[tuple[nn.Module, type, type]] = []  # a module, its native class, its class in a step

    def enter(self, model: nn.Module) -> None:
        with self.lock:
            self.count += 1
            if self.count == 1:
                self._find(model)
                for module, native, faster in self.changes:
                    if type(module) is native:
                        object.__setattr__(module, "__class__", faster)  # nn.Module's setter takes 3 microseconds

    def leave(self) -> None:
        with self.lock:
            self.count -= 1
            if self.count == 0:
                for module, native, faster in self.changes:
                    if type(module) is faster:
                        object.__setattr__(module, "__class__", native)

    def _find(self, model: Any) -> None:
        """Look for the modules with a class of layers.py, once and again when layers or FFNs' parts were exchanged.

        Not an FFN's Linear layers, whose kernel is the FFN's.
        """
        from stocha_hf.decoding.layers import IN_A_STEP

        layers = model.base_model.layers
        ffns = [layer._modules["mlp"] for layer in layers]
        parts = [id(part) for ffn in ffns for part in (ffn, *ffn._modules.values())]
        if parts != self.parts:
            self.parts, inside = parts, set(parts)
            self.changes = [
                (module, type(module), IN_A_STEP[type(module)])
                for module in model.modules()
                if type(module) in IN_A_STEP and id(module) not in inside
            ]


_steps: weakref.WeakKeyDictionary[nn.Module, _Steps] = weakref.WeakKeyDictionary()
_first_step = threading.Lock()


def step(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[None]:
    """Return a context for a call of `model` with these arguments, in which it is as fast as this package makes it.

    In a decode step on a CPU, Linear and decoder layers have their classes of layers.py, also for other threads that
    are in a step of the same model. Prompts are prompts.py's. A model whose call was compiled is left as it is.
    """
    compiled = "forward" in model.__dict__ or getattr(model, "_compiled_call_impl", None) is not None
    if compiled:
        return nullcontext()
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
        tokens = None if tokens is None else tokens[..., 0]
    return _with_classes(model) if _is_decode_step(tokens) and available() else prompt(tokens)


def _is_decode_step(tokens: Any) -> bool:
    return (
        isinstance(tokens, torch.Tensor)
        and tokens.is_cpu
        and 0 < tokens.numel() <= FEW
        and not torch.is_grad_enabled()
        and not nn.modules.module._has_any_global_hook()
    )


@contextmanager
def _with_classes(model: nn.Module) -> Iterator[None]:
    with _first_step:
        steps = _steps.setdefault(model, _Steps())
    steps.enter(model)
    try:
        yield
    finally:
        steps.leave()
