"""What decode steps hold beside a model's parameters: transposed weights, and a coarse gate if asked for.

A sparse step reads the rows of active neurons, and down_proj has a column a neuron; so has any projection that cuts
its input a column for each of the input's entries. So the first step makes a copy, [inputs, outputs], a row an input.
The parameter stays as it is: state dicts, optimizers and tools see what they saw before. On a CPU the memory stays the
same too where a file holds the parameter: its pages go back to the file, and prefill reads the copy. Elsewhere the
copy costs as much as the parameter; `held_bytes` counts it.

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
from stocha_hf.decoding.structs import is_quantized


class DecodeState:
    """Of one weight: `transposed`, a copy; of an FFN's down_proj also `coarse`, a copy of the gate or None.
    Copies and pickles of a model do not take it along.
    """

    def __init__(self) -> None:
        self.transposed: torch.Tensor | None = None
        self.key: tuple[int, int] = (0, 0)
        self.is_sole = False  # the parameter's pages were given back: who needs all of down_proj reads the copy
        self.coarse: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def key_of(weight: torch.Tensor) -> tuple[int, int]:
    """Return where a weight's memory is and how often it was changed in place."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def key_of_linear(module: Any) -> tuple[int, int]:
    """Return the key of a Linear layer's weight, or of its codes where it is quantized."""
    return key_of(module.codes if is_quantized(module) else module._parameters["weight"])


def gate_copy(mlp: Any) -> Any:
    """Return the copy that predicts a patched FFN's gates; None where there is none of its gate as it is."""
    copy = None if mlp.decode_state is None else mlp.decode_state.coarse
    return copy if copy is not None and copy.key == key_of_linear(mlp._modules["gate_proj"]) else None


def neuron_major(mlp: Any, thorough: bool = False) -> torch.Tensor | None:
    """Return down_proj's weight as a contiguous [M, H] copy; see `transposed`."""
    return transposed(mlp, "decode_state", _down(mlp), thorough)


def input_major(module: Any) -> torch.Tensor | None:
    """Return the weight of a projection that cuts its input as a contiguous [inputs, outputs] copy."""
    return transposed(module, "input_major", module._parameters["weight"])


def transposed(holder: Any, name: str, weight: torch.Tensor, thorough: bool = False) -> torch.Tensor | None:
    """Return a weight's transposed copy, which the DecodeState of this name holds, made now if none is current.

    `thorough` compares entries on a GPU as well, which waits for it: in prefill. None where the copy does not exist
    and cannot be made: while compiling or recording a CUDA graph, and among processes, whose sharding may move the
    weights at any time.
    """
    state = getattr(holder, name)
    if torch.compiler.is_compiling():
        return None if state is None else state.transposed
    if state is not None and state.transposed is not None and _is_current(state, weight, thorough):
        return state.transposed
    if (weight.is_cuda and torch.cuda.is_current_stream_capturing()) or (
        torch.distributed.is_available() and torch.distributed.is_initialized()
    ):
        return None
    state = state or DecodeState()
    setattr(holder, name, state)
    with torch.inference_mode(False), torch.no_grad():
        state.transposed, state.key = weight.detach().t().contiguous(), key_of(weight)
    state.is_sole = release(weight)
    return state.transposed


def sole_copy(mlp: Any) -> torch.Tensor | None:
    """Return down_proj's copy where it is current and the parameter's own pages were given back, else None."""
    return sole(mlp.decode_state, _down(mlp))


def sole(state: DecodeState | None, weight: torch.Tensor) -> torch.Tensor | None:
    """Return the copy in a state where it is current and the weight's own pages were given back, else None."""
    if state is None or not state.is_sole or torch.compiler.is_compiling():
        return None
    return state.transposed if _is_current(state, weight) else None


def _down(mlp: Any) -> torch.Tensor:
    """down_proj.weight, by the tables of nn.Module: its attributes take a microsecond each, and a step asks often."""
    return mlp._modules["down_proj"]._parameters["weight"]


def _is_current(state: DecodeState, weight: torch.Tensor, thorough: bool = False) -> bool:
    copy: Any = state.transposed
    if state.key != key_of(weight) or copy.dtype != weight.dtype or copy.device != weight.device:
        return False
    if weight.is_cuda:
        can_wait = thorough and not torch.cuda.is_current_stream_capturing()
        return not can_wait or torch.equal(weight.detach().diagonal(), copy.diagonal())
    if (library := kernels()) is None:
        return torch.equal(weight.detach().diagonal(), copy.diagonal())
    return bool(library.stocha_same(weight.data_ptr(), copy.data_ptr(), *weight.shape, weight.element_size()))


def held_bytes(model: nn.Module) -> int:
    """Return the bytes that decode steps hold beside a model's parameters."""
    states = [module.__dict__.get(name) for module in model.modules() for name in ("decode_state", "input_major")]
    return sum(_bytes(state) for state in states if state is not None)


def _bytes(state: Any) -> int:
    if not isinstance(state, DecodeState):
        return int(state.nbytes)  # of both_layouts.py
    coarse = 0 if state.coarse is None else state.coarse.nbytes
    return coarse + (0 if state.transposed is None else state.transposed.nbytes)
