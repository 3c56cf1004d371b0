"""The second term of distillation: the residual stream after every layer, the student's against the teacher's.

KL sees what comes out of the last layer; here every layer is told what it should have made, as in FitNets (Romero et
al., arXiv 1412.6550; docs/experiments/training.md says what it gained). Student and teacher are of the same shape, so
nothing has to be projected. Errors are relative for each feature by itself, because a few features of
a Llama's stream are hundreds of times larger than all others (Sun et al., arXiv 2402.17762) and would decide alone.

    error = HiddenError(model, teacher)
    with error.recording():
        ...                                        # a forward pass of each
    loss = loss + 1.0 * error.mean(attention_mask)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from stocha_hf.errors import StochaError
from stocha_hf.training.compiled_layers import decoder_layers

TINY = 1e-6  # mean square of a feature that the teacher does not use


def layer_error(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over features of |student - teacher|^2 / |teacher|^2, each summed over tokens; 0-dim float32.

    Both are [batch, seq, hidden]; `mask` [batch, seq] is 0 where there is padding.
    """
    student, teacher, mask = student.float(), teacher.float(), mask.float()[..., None]
    wrong = ((student - teacher).square() * mask).sum((0, 1))
    size = (teacher.square() * mask).sum((0, 1))
    return (wrong / size.clamp(min=TINY * mask.numel())).mean()


class HiddenError:
    """layer_error between two patched models, in the forward passes that each makes once while `recording`.

    The models are of one shape (check_same_shape). `layer_error` is this module's function of that name, or what
    torch.compile makes of it.
    """

    def __init__(self, student: Any, teacher: Any, layer_error: Callable[..., torch.Tensor] = layer_error) -> None:
        self.layer_error = layer_error
        self.on = False
        self.streams: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self._hooks: list[Any] = []
        for model, stream in zip((student, teacher), self.streams, strict=True):
            for layer in decoder_layers(model):
                self._hooks.append(layer.register_forward_hook(functools.partial(self._keep, stream)))

    def _keep(self, stream: list[torch.Tensor], layer: Any, args: Any, output: Any) -> None:
        if self.on:  # not so in backward, where checkpointing runs the layers once more
            stream.append(output[0] if isinstance(output, tuple) else output)

    @contextmanager
    def recording(self) -> Iterator[None]:
        self.on = True
        try:
            yield
        finally:
            self.on = False

    def mean(self, mask: torch.Tensor) -> torch.Tensor:
        """Over layers, of what was recorded, which is forgotten here; it has a gradient for the student.

        Raises StochaError when a gradient cannot flow.
        """
        student, teacher = (list(stream) for stream in self.streams)
        for stream in self.streams:
            stream.clear()
        if not any(ours.requires_grad for ours in student):
            raise StochaError(
                "distill_hidden found no gradients in the layers' outputs: expected gradient_checkpointing: false, or "
                "gradient_checkpointing_kwargs: {use_reentrant: false}"
            )
        errors = [self.layer_error(ours, theirs, mask) for ours, theirs in zip(student, teacher, strict=True)]
        return torch.stack(errors).mean()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def check_same_shape(student_config: Any, teacher_config: Any) -> None:
    """Raises StochaError when the streams of two models (configs of transformers) cannot be compared."""
    student, teacher = ((c.num_hidden_layers, c.hidden_size) for c in (student_config, teacher_config))
    if student != teacher:
        raise StochaError(
            f"distill_hidden compares layer by layer, but the teacher has {teacher[0]} layers of width {teacher[1]} "
            f"and the student {student[0]} of width {student[1]}: expected a teacher of the student's shape"
        )
