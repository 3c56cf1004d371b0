"""What an installed stocha_hf does for modeling_stocha.py: the other end of a contract with a version.

Every published repo carries the modeling_stocha.py of its day, so what passes between that file and this package must
not change without a number. The file asks `for_contract(its number)` and calls what comes back:

    ffn(mlp, x)                               an FFN in eval mode, or None: the native path is to run
    stocha(gate, up, p, base, positive)       StochA's hidden vector in training, or None
    step(model, args, kwargs)                 a context around a model's call
    held_bytes(model)                         bytes held beside the parameters

Of an MLP it relies on gate_proj, up_proj, down_proj, act_fn, running, threshold, hidden(gate, up) and a free attribute
decode_state. Contract 0, of stocha_hf 0.1, is served by stocha_hf/sparse.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from stocha_hf.decoding import noise
from stocha_hf.decoding.conditions import FEW
from stocha_hf.decoding.ffn import ffn
from stocha_hf.decoding.ops import available
from stocha_hf.decoding.state import held_bytes
from stocha_hf.errors import StochaError

CONTRACT = 1


class Runtime(NamedTuple):
    """The functions of contract 1."""

    ffn: Callable[..., torch.Tensor | None]
    stocha: Callable[..., torch.Tensor | None]
    step: Callable[..., AbstractContextManager[None]]
    held_bytes: Callable[[nn.Module], int]


def for_contract(number: int) -> Runtime:
    """Return the functions for a modeling_stocha.py of this contract. Raises StochaError for an unknown one."""
    if number != CONTRACT:
        raise StochaError(
            f"modeling_stocha.py asks for contract {number}: expected {CONTRACT}; install a newer stocha_hf"
        )
    return Runtime(ffn, noise.stocha, step, held_bytes)


Replaceable = list[tuple[nn.Module, type, type]]  # a module, its native class, its class in a step
_found: weakref.WeakKeyDictionary[nn.Module, tuple[list[int], Replaceable]] = weakref.WeakKeyDictionary()


def step(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[None]:
    """Return a context for a call of `model` with these arguments, in which it is as fast as this package makes it.

    In a decode step on a CPU, Linear and decoder layers have their classes of layers.py. Two threads in one model do
    no harm: the first to leave takes the classes away, and the other goes on by the native way.
    """
    if not _is_decode_step(args, kwargs) or not available():
        return nullcontext()
    return _with_classes(model)


def _is_decode_step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
        tokens = None if tokens is None else tokens[..., 0]
    return (
        isinstance(tokens, torch.Tensor)
        and tokens.is_cpu
        and 0 < tokens.numel() <= FEW
        and not torch.is_grad_enabled()
        and not nn.modules.module._has_any_global_hook()
    )


@contextmanager
def _with_classes(model: nn.Module) -> Iterator[None]:
    replaceable = _replaceable(model)
    try:
        for module, native, faster in replaceable:
            if type(module) is native:
                object.__setattr__(module, "__class__", faster)  # nn.Module's own setter takes 3 microseconds
        yield
    finally:
        for module, native, faster in replaceable:
            if type(module) is faster:
                object.__setattr__(module, "__class__", native)


def _replaceable(model: Any) -> Replaceable:
    """The modules with a class of layers.py, looked for once and again when layers were exchanged.

    Not an FFN's Linear layers, whose kernel is the FFN's.
    """
    from stocha_hf.decoding.layers import IN_A_STEP

    layers = [id(layer) for layer in model.base_model.layers]
    known = _found.get(model)
    if known is None or known[0] != layers:
        of_ffns = {id(part) for mlp in model.modules() if "decode_state" in mlp.__dict__ for part in mlp.children()}
        found = [
            (module, type(module), IN_A_STEP[type(module)])
            for module in model.modules()
            if type(module) in IN_A_STEP and id(module) not in of_ffns
        ]
        _found[model] = known = (layers, found)
    return known[1]
