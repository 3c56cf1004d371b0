"""A method that was calibrated for a model, hung on it for a while.

    selection = METHODS["teal"].calibrate(model, windows, 0.4)
    with selection.applied(model) as meter:                # at every token: perplexity of windows
        model(tokens)
    meter.read()                                           # BytesRead
    with selection.applied(model, decoding=True):          # the prompt whole, then every decode step with the cuts
        model.generate(**inputs)

The weights are the model's own, whatever they are by then: a selection calibrated before a refit can be applied after
it. A prompt is read whole in either way, since reading it in one pass reads all weights once anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from stocha_hf.errors import StochaError
from stocha_hf.measurement.blocks import Block, blocks
from stocha_hf.measurement.bytes_read import ReadMeter
from stocha_hf.measurement.selection.cuts import InputCut, NeuronCut

Prepare = Callable[[torch.Tensor, dict[str, torch.Tensor]], None]
PLACES = ("attention_mask", "position_ids")  # that say which tokens are padding, and where the others stand


@dataclass(frozen=True)
class Selection:
    """The cuts of a model's blocks: of projections' inputs by name, and of neurons, one mapping and one cut a block.

    `needs_prompt` says that the choice is made on the prompt, so that there must be one. `prepare` is given each
    forward's token ids [batch, tokens] before it runs, and its attention_mask and position_ids if it has them.
    """

    inputs: list[dict[str, InputCut]]
    neurons: list[NeuronCut | None] = field(default_factory=list)
    needs_prompt: bool = False
    prepare: Prepare | None = None

    @property
    def remembers(self) -> bool:
        """Whether a decode step depends on choices of steps before, so that the rows of a batch must stay the same."""
        return any(cut is not None and cut.remembers for cut in self.neurons)

    @contextmanager
    def applied(self, model: nn.Module, *, decoding: bool = False, prompt: int = 0) -> Iterator[ReadMeter]:
        """Inside, the model runs with the cuts; yields what counts the bytes read where they are made.

        Args:
            model: The model it was calibrated for, or one of the same shape.
            decoding: Cut as in use: of forwards that keep a cache, those of one token, which come after the prompt.
                Forwards with `use_cache=False`, by which likelihoods are measured, are cut at every token.
            prompt: Else: how many tokens at the start of every forward are not cut.

        Raises:
            StochaError: the model has another number of blocks, or there is no prompt where one is needed.
        """
        found = blocks(model)
        neurons = self.neurons or [None] * len(found)
        if len(self.inputs) != len(found) or len(neurons) != len(found):
            raise StochaError(f"the model has {len(found)} blocks: expected {len(self.inputs)}, as when calibrated")
        if self.needs_prompt and not (decoding or prompt):
            raise StochaError("this method chooses neurons by the prompt: expected a prompt of at least one token")

        forward = _Forward()

        def start(length: int) -> int:
            if decoding:
                return length if forward.is_cached and length > 1 else 0
            return min(prompt, length)

        columns = {(index, name) for index, cuts in enumerate(self.inputs) for name in cuts}
        columns |= {(index, "down_proj") for index, cut in enumerate(neurons) if cut}
        meter = ReadMeter(model, columns, {index for index, cut in enumerate(neurons) if cut and cut.rows}, start)
        hooks = _Hooks(model, meter, start, forward)
        try:
            hooks.watch(model, self.prepare)
            for index, (block, cuts, cut) in enumerate(zip(found, self.inputs, neurons, strict=True)):
                if cut is not None:  # before the inputs' cuts, whose input is what it leaves
                    hooks.add_neurons(index, block, cut, "down_proj" not in cuts)
                for name, input_cut in cuts.items():
                    hooks.add_input(index, block.linears[name], name, input_cut)
            yield meter
        finally:
            meter.close()
            hooks.remove()


@dataclass
class _Forward:
    """What is known of the forward that runs: whether it keeps a cache, and [batch, tokens, 1] 0 at padding."""

    is_cached: bool = True
    real: torch.Tensor | None = None


class _Hooks:
    """The hooks of an applied selection."""

    def __init__(self, model: Any, meter: ReadMeter, start: Callable[[int], int], forward: _Forward) -> None:
        self._meter, self._start, self._forward = meter, start, forward
        self._size = model.dtype.itemsize
        self._handles: list[Any] = []

    def watch(self, model: nn.Module, prepare: Prepare | None) -> None:
        """Note what each forward is given, and let `prepare` see it."""

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            mask = kwargs.get("attention_mask")
            if prepare is not None:
                given = {key: kwargs[key] for key in PLACES if isinstance(kwargs.get(key), torch.Tensor)}
                prepare(kwargs["input_ids"] if "input_ids" in kwargs else args[0], given)
            self._forward.is_cached = kwargs.get("use_cache") is not False
            self._forward.real = mask[..., None] if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None

        inner: Any = getattr(model, "base_model", model)  # which some call alone, to read a prompt without logits
        self._handles.append(inner.register_forward_pre_hook(before, with_kwargs=True))

    def add_input(self, index: int, linear: Any, name: str, cut: InputCut) -> None:
        columns = self._meter.columns[index][name]
        corrections: list[tuple[int, torch.Tensor | None]] = []
        self._meter.extra[index] += cut.extra_bytes(linear.out_features, self._size)

        def before(module: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
            x = args[0]
            first = self._start(x.shape[1])
            if first == x.shape[1]:
                return None
            tail = x[:, first:]
            keep = cut.keep(tail)
            kept = cut.kept(tail, keep)
            columns.add((keep & (tail != 0) if not cut.centre else keep).float().mean(-1))
            corrections[:] = [(first, cut.correction(tail, kept))]
            return torch.cat([x[:, :first], kept], 1) if first else kept, *args[1:]

        def after(module: nn.Module, args: Any, output: torch.Tensor) -> Any:
            first, correction = corrections.pop() if corrections else (0, None)
            if correction is None:
                return None
            output = output.clone()
            output[:, first:] += correction
            return output

        self._handles += [linear.register_forward_pre_hook(before), linear.register_forward_hook(after)]

    def add_neurons(self, index: int, block: Block, cut: NeuronCut, counts_columns: bool) -> None:
        acts: list[torch.Tensor] = []
        columns, rows = self._meter.columns[index]["down_proj"], self._meter.rows[index]
        cut.begin()

        def before(module: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
            hidden, act = args[0], acts.pop()
            first = self._start(hidden.shape[1])
            real = self._forward.real
            if first and real is not None and real.shape[1] == hidden.shape[1]:  # padding is 0 to a choice
                keep = cut.keep(act * real, hidden * real, first)
            else:
                keep = cut.keep(act, hidden, first)
            if first == hidden.shape[1]:
                return None
            tail = hidden[:, first:]
            if counts_columns:
                columns.add((keep & (tail != 0)).float().mean(-1))
            read = cut.rows_read(keep)
            for name in cut.rows:
                rows[name].add(read)
            kept = tail.masked_fill(~keep, 0)
            return torch.cat([hidden[:, :first], kept], 1) if first else kept, *args[1:]

        self._handles += [
            block.act.register_forward_hook(lambda module, args, act: acts.append(act)),
            block.linears["down_proj"].register_forward_pre_hook(before),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
