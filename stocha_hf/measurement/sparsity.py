"""Counting the zeros of the feed-forward layers' hidden vector.

The hidden vector is the input of down_proj, [..., M]. The meter hangs on a forward pre-hook of that module,
which works inside peft, DDP and FSDP alike, since stocha_mlps finds the layers in any wrapper.
training/sparsity_target.py steers the share of zeros by L1, training/thresholds.py by thresholds.

    meter = SparsityMeter(model)
    with meter.record():
        model(**inputs)
    meter.read()  # {"mean": 0.67, "per_layer": [...]}
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from stocha_hf.errors import StochaError
from stocha_hf.models import patched_layers


class SparsityMeter:
    """Counts exact zeros of the hidden vectors of every StochaMLP of `model`, while recording, in int64 on the device.

    Only read() waits for the GPU. torch.compile compiles a model once more when recording first starts. What
    activation checkpointing computes again in backward is not counted. Several meters of one model count separately.
    Raises StochaError for a model without patched layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.recording = False
        self._counted: list[Any] = [layer.down_proj for layer in patched_layers(model)]
        # The counters, (zeros, elements), stand on the modules, and the hook knows their name only: a compiler then
        # has one graph for all layers. The first free name: a meter after another one does not compile anew.
        names = (f"zeros_and_elements_{i}" for i in itertools.count())
        self._name = next(name for name in names if not hasattr(self._counted[0], name))
        for module in self._counted:
            device = next((weight.device for weight in module.parameters()), None)
            setattr(module, self._name, tuple(torch.zeros((), dtype=torch.int64, device=device) for _ in range(2)))
        self._hooks = [module.register_forward_pre_hook(self._count) for module in self._counted]

    def _count(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        if self.recording and not _in_backward():
            hidden = args[0].detach()
            zeros, elements = getattr(module, self._name)
            if zeros.device != hidden.device:
                zeros, elements = zeros.to(hidden.device), elements.to(hidden.device)
                setattr(module, self._name, (zeros, elements))
            zeros.add_((hidden == 0).sum())
            elements.add_(hidden.numel())

    @contextmanager
    def record(self) -> Iterator[None]:
        """Count every forward inside the context, training or not."""
        self.recording = True
        try:
            yield
        finally:
            self.recording = False

    def read(self) -> dict[str, Any]:
        """{"mean": share of zeros, "per_layer": [share, ...]} of what this rank recorded since the last read.

        Raises StochaError when no forward was recorded.
        """
        counts = [getattr(module, self._name) for module in self._counted]
        numbers = [[count.item() for count in pair] for pair in counts]
        zeros, elements = torch.tensor(numbers, dtype=torch.float64).view(-1, 2).unbind(1)
        if not counts or not elements.all():
            raise StochaError("no forward pass was recorded since the last read: run one inside meter.record()")
        for count in itertools.chain(*counts):
            count.zero_()
        return {"mean": (zeros.sum() / elements.sum()).item(), "per_layer": (zeros / elements).tolist()}

    def close(self) -> None:
        """Take the hooks and counters off the model; a second call does nothing."""
        for module, hook in zip(self._counted, self._hooks, strict=True):
            hook.remove()
            delattr(module, self._name)
        self._counted, self._hooks = [], []


def _in_backward() -> bool:
    """Whether autograd is running this code: activation checkpointing's second forward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
