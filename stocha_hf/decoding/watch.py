"""What a plan was made from, so that it may be used again: modules with their classes, tensors with their addresses.

A plan exists where each module is the native one, or a quantized one, and nothing hangs on its call. Lists of all that
was read are compared before each use, which takes tenths of a millisecond.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stocha_hf.decoding.both_layouts import input_rows
from stocha_hf.decoding.conditions import is_called
from stocha_hf.decoding.ffn import zero_up_to
from stocha_hf.decoding.layers import IN_A_STEP
from stocha_hf.decoding.state import gate_copy, input_major, neuron_major
from stocha_hf.decoding.structs import is_quantized

ATTENTION = ("sdpa", "eager")  # what transformers may be asked to compute attention with


class Refused(Exception):
    """Something of the model must be called."""


class Watch:
    """The parts of one model on one device that something was made from."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.config, self.dtype, self.device = model.config, model.dtype, device
        self.modules: list[tuple[nn.Module, type]] = []
        self.children: list[tuple[Any, str, Any]] = []  # a module's table, a name in it, the child
        self.tensors: list[tuple[Any, str, Any, int]] = []  # the same of a tensor, and its address
        self.rules: list[tuple[Any, str, float]] = []  # an MLP, its activation and threshold
        self.gates: list[tuple[Any, Any]] = []  # an MLP that skips neurons, and its transposed down
        self.copies: list[tuple[Any, Any]] = []  # an MLP, and the copy that predicts its gates, or None
        self.cutting: list[tuple[Any, ...]] = []  # a projection that cuts: its threshold, centre, factors, and where
        self.inputs: list[tuple[Any, Any]] = []  # such a projection, and its transposed weight
        self.layouts: list[tuple[Any, Any]] = []  # a quantized one, and its copy of both_layouts.py or None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # copies and pickles of a model do not take it along

    def is_current(self) -> bool:
        """Return whether the model is what it was."""
        return (
            all(_is(module, kind) and not is_called(module) for module, kind in self.modules)
            and all(table.get(name) is child for table, name, child in self.children)
            and all(table.get(name) is tensor and tensor.data_ptr() == at for table, name, tensor, at in self.tensors)
            and all(mlp.running == name and zero_up_to(mlp) == cut for mlp, name, cut in self.rules)
            and all(neuron_major(mlp) is down_t for mlp, down_t in self.gates)
            and all(gate_copy(mlp) is copy for mlp, copy in self.copies)
            and all(_cut(module) == (module, *cut) for module, *cut in self.cutting)
            and all(input_major(module) is copy for module, copy in self.inputs)
            and all(input_rows(module) is copy for module, copy in self.layouts)
            and self.config._attn_implementation in ATTENTION
        )

    def module(self, module: nn.Module, kind: type | None) -> None:
        """Note a module that must stay of this class, with its children, without anything that hangs on its call."""
        if kind is None or not _is(module, kind) or is_called(module):
            raise Refused
        self.modules.append((module, kind))
        self.children += [(module._modules, name, child) for name, child in module._modules.items()]

    def parameter(self, module: nn.Module, name: str) -> torch.Tensor:
        """Note and return a module's parameter."""
        tensor = module._parameters.get(name)
        if type(tensor) is not nn.Parameter or tensor.dtype != self.dtype:
            raise Refused
        return self.tensor(module._parameters, name, tensor)

    def tensor(self, table: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Note and return what a table of a module holds by this name."""
        if tensor.device != self.device or not tensor.is_contiguous():
            raise Refused
        self.tensors.append((table, name, tensor, tensor.data_ptr()))
        return tensor

    def rule(self, mlp: Any) -> float:
        """Note a patched FFN's activation, and return the gate value up to which it gives zeros."""
        threshold = zero_up_to(mlp)
        self.rules.append((mlp, mlp.running, threshold))
        return threshold

    def neuron_major(self, mlp: Any) -> torch.Tensor:
        """Note and return the transposed down of a patched FFN that skips neurons."""
        down_t = neuron_major(mlp)
        if down_t is None:
            raise Refused
        self.gates.append((mlp, down_t))
        return down_t

    def cut(self, module: Any) -> None:
        """Note a projection that cuts its input, where all others do."""
        if "limits" in module.__dict__:  # of a run that learns them, in the place of its threshold
            raise Refused
        found = _cut(module)
        if any(where != found[-1] for *_, where in self.cutting):
            raise Refused
        self.cutting.append(found)
        if found[3]:
            self.parameter(*found[3])

    def cuts(self, tokens: int) -> bool:
        """Return whether a step of so many tokens a sequence cuts inputs, as the model says."""
        where = self.cutting[0][-1] if self.cutting else "never"
        return where == "always" or (where == "decode" and tokens == 1)

    def input_major(self, module: Any) -> torch.Tensor:
        """Note and return the transposed weight of a projection that cuts its input."""
        copy = input_major(module)
        if copy is None:
            raise Refused
        self.inputs.append((module, copy))
        return copy

    def layout(self, module: Any) -> Any:
        """Note and return the copy that steps with cuts read of a quantized projection; None where there is none."""
        copy = None
        if is_quantized(module):
            copy = input_rows(module)
            self.layouts.append((module, copy))
        return copy

    def coarse(self, mlp: Any) -> Any:
        """Note and return the copy that predicts a patched FFN's gates, None where there is none of this gate."""
        copy = gate_copy(mlp)
        self.copies.append((mlp, copy))
        return copy


def _cut(module: Any) -> tuple[Any, ...]:
    factors = module.__dict__.get("factors", ())  # none in folders' copies of before
    return module, module.input_threshold, module.input_centre, factors, module.cut_forced or module.cut_inference


def _is(module: nn.Module, kind: type) -> bool:
    """Whether a module is of this class, or of the one that it has while another thread is in a step of the model."""
    return type(module) is kind or type(module) is IN_A_STEP.get(kind)
