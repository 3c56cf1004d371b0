"""How many bytes of weights a decode step has to read, counted on the tokens that a model is measured on.

A decode step at batch 1 is as fast as memory gives it the weights. It needs a projection's column only where the
projection's input is not 0, and a row of up_proj only where the gate's activation is not 0: the gate, computed first,
tells. So the share of a projection that is read follows from the zeros that are really there, token by token. A method
that leaves out more, such as a choice of neurons made before the gate, counts it here itself (selection/applied.py).

Counted are the decoder blocks' parameters and lm_head, each in its own dtype; not the cache, the one row of the
embedding, and activations. `share` is that of the blocks alone, since lm_head is read whole by all.

    meter = ReadMeter(model)
    model(tokens)
    meter.read()  # BytesRead(step=..., blocks=..., lm_head=..., dense_blocks=..., share=0.53)
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import nn

from stocha_hf.cuts_stocha import is_cut
from stocha_hf.measurement.blocks import PROJECTIONS, blocks
from stocha_hf.measurement.records import BytesRead


class Tally:
    """A sum over tokens of the share that is read of something, kept on the device."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | float = 0.0
        self._tokens = 0

    def add(self, shares: torch.Tensor) -> None:
        """Count one share for each entry of `shares` [...]."""
        self._sum = self._sum + shares.sum(dtype=torch.float64)
        self._tokens += shares.numel()

    def mean(self) -> float:
        """The mean share; 1 where nothing was counted."""
        return float(self._sum) / self._tokens if self._tokens else 1.0


class ReadMeter:
    """Counts, until close(), which weights of `model` decode steps would read.

    `columns_counted` names the projections, as (block, name), and `rows_counted` the blocks, of which the caller
    counts columns or the FFN's rows itself, in `columns` and `rows`. `start` says for a forward of so many tokens
    which is the first that counts. Raises StochaError for a model without decoder blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        columns_counted: Container[tuple[int, str]] = (),
        rows_counted: Container[int] = (),
        start: Callable[[int], int] = lambda length: 0,
    ) -> None:
        self._blocks = blocks(model)
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        embedding, *_ = getattr(head, "tied_to", (head,))  # a quantized lm_head that is tied holds no tensors
        self._lm_head = stored_bytes(embedding)
        self.columns = [{name: Tally() for name in PROJECTIONS} for _ in self._blocks]
        self.rows = [{name: Tally() for name in PROJECTIONS} for _ in self._blocks]
        self.extra = [0.0] * len(self._blocks)  # bytes beside the weights, of each block
        self._hooks = []
        for index, block in enumerate(self._blocks):
            for name in PROJECTIONS:
                if (index, name) not in columns_counted:
                    self._hooks.append(
                        block.linears[name].register_forward_pre_hook(
                            lambda m, args, tally=self.columns[index][name]: _count(tally, _read_of(m, args[0]), start)
                        )
                    )
            if index not in rows_counted:
                self._hooks.append(
                    block.act.register_forward_hook(
                        lambda m, args, act, tally=self.rows[index]["up_proj"]: _count(tally, act, start)
                    )
                )

    def read(self) -> BytesRead:
        """Return the mean over the tokens so far."""
        dense = read = 0.0
        for index, block in enumerate(self._blocks):
            dense += stored_bytes(block.module)
            read += stored_bytes(block.module) + self.extra[index]
            for name, linear in block.linears.items():
                share = self.columns[index][name].mean() * self.rows[index][name].mean()
                read -= (1 - share) * weight_bytes(linear)
        return BytesRead(round(read) + self._lm_head, round(read), self._lm_head, round(dense), read / dense)

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()


def _count(tally: Tally, values: torch.Tensor, start: Callable[[int], int]) -> None:
    """Count the entries other than zero of [..., length, size]."""
    tail = values.detach()[..., start(values.shape[-2]) :, :]
    if tail.numel():
        tally.add(torch.count_nonzero(tail, -1) / tail.shape[-1])


def _read_of(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """What of its input x [..., size] a projection reads weights for: x, with 0 where the projection itself cuts."""
    cuts = is_cut(linear) and linear.cuts(x)
    return linear.cut(x) - linear.input_centre if cuts else x


def stored_bytes(module: nn.Module) -> int:
    """The bytes of a module's parameters and buffers, each in its own dtype."""
    return sum(tensor.numel() * tensor.element_size() for tensor in [*module.parameters(), *module.buffers()])


def weight_bytes(linear: nn.Module) -> int:
    """The bytes of a projection without its bias, which is read whole."""
    bias = getattr(linear, "bias", None)
    return stored_bytes(linear) - (bias.numel() * bias.element_size() if bias is not None else 0)
