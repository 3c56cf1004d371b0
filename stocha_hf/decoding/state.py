"""What decode steps hold beside a model's parameters: down_proj transposed, and a coarse gate if asked for.

A sparse step reads the rows of active neurons, and down_proj has a column a neuron. So the first step makes a copy,
[M, H], a row a neuron. The parameter stays as it is: state dicts, optimizers and tools see what they saw before. On a
CPU the memory stays the same too where a file holds the parameter: its pages go back to the file, and prefill reads
the copy. Elsewhere the copy costs a third of the FFNs' memory; `held_bytes` counts it.

A copy must not outlive the weights it was made from. Version counters miss changes through `.data`, by which adapters
are merged, so a few entries are compared: at every step on a CPU, in prefill on a GPU. That finds a change of all
entries. train() drops the copy: call it after changing single entries through `.data`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stocha_hf.decoding.build import kernels
from stocha_hf.decoding.memory import release


class DecodeState:
    """Of one FFN: `down_t` [M, H], its dtype the weights'; `coarse`, a CoarseGate, a PackedGate or None. Copies and
    pickles of a model do not take it along.
    """

    def __init__(self) -> None:
        self.down_t: torch.Tensor | None = None
        self.key: tuple[int, int] = (0, 0)
        self.is_sole = False  # the parameter's pages were given back: who needs all of down_proj reads the copy
        self.coarse: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def key_of(weight: torch.Tensor) -> tuple[int, int]:
    """Return where a weight's memory is and how often it was changed in place."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def neuron_major(mlp: Any, thorough: bool = False) -> torch.Tensor | None:
    """Return down_proj's weight as a contiguous [M, H] copy, made now if there is none that is current.

    `thorough` compares entries on a GPU as well, which waits for it: in prefill. None where the copy does not exist
    and cannot be made: while compiling or recording a CUDA graph, and among processes, whose sharding may move the
    weights at any time.
    """
    state = mlp.decode_state
    if torch.compiler.is_compiling():
        return None if state is None else state.down_t
    weight = _down(mlp)
    if state is not None and state.down_t is not None and _is_current(state, weight, thorough):
        return state.down_t
    if (weight.is_cuda and torch.cuda.is_current_stream_capturing()) or (
        torch.distributed.is_available() and torch.distributed.is_initialized()
    ):
        return None
    mlp.decode_state = state = state or DecodeState()
    with torch.inference_mode(False), torch.no_grad():
        state.down_t, state.key = weight.detach().t().contiguous(), key_of(weight)
    state.is_sole = release(weight)
    return state.down_t


def sole_copy(mlp: Any) -> torch.Tensor | None:
    """Return the copy where it is current and the parameter's own pages were given back, else None."""
    state = mlp.decode_state
    if state is None or not state.is_sole or torch.compiler.is_compiling():
        return None
    return state.down_t if _is_current(state, _down(mlp)) else None


def _down(mlp: Any) -> torch.Tensor:
    """down_proj.weight, by the tables of nn.Module: its attributes take a microsecond each, and a step asks often."""
    return mlp._modules["down_proj"]._parameters["weight"]


def _is_current(state: DecodeState, weight: torch.Tensor, thorough: bool = False) -> bool:
    down_t: Any = state.down_t
    if state.key != key_of(weight) or down_t.dtype != weight.dtype or down_t.device != weight.device:
        return False
    if weight.is_cuda:
        can_wait = thorough and not torch.cuda.is_current_stream_capturing()
        return not can_wait or torch.equal(weight.detach().diagonal(), down_t.diagonal())
    if (library := kernels()) is None:
        return torch.equal(weight.detach().diagonal(), down_t.diagonal())
    return bool(library.stocha_same(weight.data_ptr(), down_t.data_ptr(), *weight.shape, weight.element_size()))


def held_bytes(model: nn.Module) -> int:
    """Return the bytes that decode steps hold beside a model's parameters."""
    states = [module.__dict__.get("decode_state") for module in model.modules()]
    return sum(_bytes(state) for state in states if state is not None)


def _bytes(state: DecodeState) -> int:
    coarse = 0 if state.coarse is None else state.coarse.nbytes
    return coarse + (0 if state.down_t is None else state.down_t.nbytes)
