"""The error of the residual stream that distillation adds: its value, its gradient, and what it is indifferent to."""

from __future__ import annotations

import pytest
import torch
from helpers import first_is_fast, tiny_model

from stocha_hf.errors import StochaError
from stocha_hf.modeling_stocha import StochaConfig
from stocha_hf.patching import patch, set_activation
from stocha_hf.training.compiled_layers import compile_layers
from stocha_hf.training.hidden_error import HiddenError, layer_error

TOKENS = torch.tensor([[1, 5, 9, 17, 33, 4, 8, 60], [2, 3, 0, 0, 0, 0, 0, 0]])
MASK = (TOKENS != 0).long()


def pair(activation: str = "relu") -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same tiny model twice: the student with another activation."""
    student, teacher = tiny_model(), tiny_model()
    for model, name in ((student, activation), (teacher, "silu")):
        patch(model, StochaConfig())
        set_activation(model, name, 0.3)
    return student.train(), teacher.train()


def recorded(error: HiddenError, student: torch.nn.Module, teacher: torch.nn.Module) -> torch.Tensor:
    with error.recording():
        student(TOKENS, attention_mask=MASK, use_cache=False)
        with torch.no_grad():
            teacher(TOKENS, attention_mask=MASK, use_cache=False)
    return error.mean(MASK)


def test_it_is_the_relative_error_of_what_transformers_calls_hidden_states():
    student, teacher = pair()
    found = recorded(HiddenError(student, teacher), student, teacher)
    states = []
    for model in (student, teacher):
        last: list[torch.Tensor] = []
        handle = model.model.norm.register_forward_pre_hook(lambda norm, args, last=last: last.append(args[0]))
        hidden = model(TOKENS, attention_mask=MASK, output_hidden_states=True, use_cache=False).hidden_states
        handle.remove()
        states.append([*hidden[1:-1], *last])  # the last of transformers' is normed
    expected = []
    for ours, theirs in zip(*states, strict=True):
        ours, theirs = ours[MASK.bool()].double(), theirs[MASK.bool()].double()
        expected.append(((ours - theirs).square().sum(0) / theirs.square().sum(0)).mean().item())
    assert found.item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert found.item() > 1e-4


def test_a_model_has_no_error_to_itself_and_features_of_any_size_count_alike():
    student, teacher = pair("silu")
    assert recorded(HiddenError(student, teacher), student, teacher).item() == 0
    ours, theirs = torch.randn(2, 8, 6), torch.randn(2, 8, 6)
    sizes = torch.tensor([1, 1e3, 1e-2, 5, 1, 300])
    assert layer_error(ours * sizes, theirs * sizes, MASK).item() == pytest.approx(
        layer_error(ours, theirs, MASK).item(), rel=1e-4
    )


@pytest.mark.parametrize("how", first_is_fast(["checkpointed", "checkpointed in a reentrant way", "compiled"]))
def test_its_gradient_reaches_every_ffn_of_the_student_and_nothing_outside_of_recording_counts(how):
    gradients = []
    for case in ("plainly", how):
        torch.manual_seed(0)
        student, teacher = pair()
        if case == "compiled":
            for model in (student, teacher):
                compile_layers(model, backend="aot_eager")
        if case.startswith("checkpointed"):
            student.enable_input_require_grads()
            student.gradient_checkpointing_enable({"use_reentrant": "reentrant" in case})
        error = HiddenError(student, teacher)
        student(TOKENS, attention_mask=MASK, use_cache=False)
        recorded(error, student, teacher).backward()
        assert error.streams == ([], [])
        gradients.append([layer.mlp.down_proj.weight.grad for layer in student.model.layers])
        assert all(parameter.grad is None for parameter in teacher.parameters())
    for plain, other in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, other, rtol=1e-3, atol=1e-6)


def test_streams_without_a_gradient_as_some_checkpointing_leaves_them_are_refused():
    student, teacher = pair()
    error = HiddenError(student, teacher)
    with pytest.raises(StochaError, match="use_reentrant: false"), torch.no_grad():
        recorded(error, student, teacher)
    assert error.streams == ([], [])
