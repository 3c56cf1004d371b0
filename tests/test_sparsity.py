"""Sparsity: exact counts, the documented L1 gradient, a controller that arrives, thresholds that meet their target."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers import tiny_model
from torch._dynamo.utils import counters

import stocha_hf
from stocha_hf.cuts import InputCuts
from stocha_hf.cuts_stocha import cut_inputs
from stocha_hf.errors import StochaError
from stocha_hf.measurement.sparsity import SparsityMeter
from stocha_hf.modeling_stocha import StochaLlamaForCausalLM, stocha_mlps
from stocha_hf.training.sparsity_target import SparsityTarget
from stocha_hf.training.thresholds import apply_thresholds, fatrelu_thresholds, moved_thresholds

pytestmark = pytest.mark.usefixtures("one_thread")


def relu_model(model_type: str = "llama", **overrides: Any) -> Any:
    model = tiny_model(model_type, **overrides)
    stocha_hf.patch(model, stocha_hf.StochaConfig(activation="relu"))
    return model.train()


def batch(seed: int = 0, rows: int = 3) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 64, (rows, 16), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def hidden_vectors(model: Any, inputs: Any) -> tuple[list[torch.Tensor], Any]:
    """Each layer's input of down_proj, and the model's output."""
    seen: list[torch.Tensor] = []
    hooks = [
        mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        for mlp in stocha_mlps(model)
    ]
    output = model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen, output


def shares(model: Any, inputs: Any) -> list[float]:
    return [(hidden == 0).double().mean().item() for hidden in hidden_vectors(model, inputs)[0]]


@pytest.mark.parametrize("wrapper", ["none", "peft"])
def test_meter_counts_exact_zeros_while_recording_only(wrapper: str) -> None:
    model = relu_model()
    expected = [shares(model, batch(seed)) for seed in (1, 2)]
    if wrapper == "peft":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj", "gate_proj"]))
    meter = SparsityMeter(model)
    model(**batch(0))
    with pytest.raises(StochaError, match="record"):
        meter.read()
    with meter.record():
        model(**batch(1))
        model(**batch(2))
    model(**batch(3))
    read = meter.read()
    assert read["per_layer"] == pytest.approx([sum(pair) / 2 for pair in zip(*expected, strict=True)], abs=1e-12)
    assert read["mean"] == pytest.approx(sum(read["per_layer"]) / 2, abs=1e-12)
    with meter.record():
        model(**batch(1))
    assert meter.read()["per_layer"] == pytest.approx(expected[0], abs=1e-12)
    meter.close()
    with meter.record():
        model(**batch(1))
    with pytest.raises(StochaError):
        meter.read()


def test_meter_counts_a_checkpointed_forward_once() -> None:
    model = relu_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    meter = SparsityMeter(model)
    with meter.record():
        model(**batch(1)).loss.backward()
    _, elements = stocha_mlps(model)[0].down_proj.zeros_and_elements_0
    assert elements == 3 * 16 * 48
    assert meter.read()["per_layer"] == pytest.approx(shares(model, batch(1)), abs=1e-12)


def test_gradient_is_that_of_the_documented_loss_over_accumulated_batches() -> None:
    model, coefficient, batches = relu_model(), 3.0, [batch(1), batch(2, rows=2)]
    tokens = sum(part["input_ids"].numel() for part in batches)
    for part in batches:
        hidden, output = hidden_vectors(model, part)
        share = part["input_ids"].numel() / tokens
        (share * output.loss + coefficient * share * sum(h.abs().mean() for h in hidden)).backward()
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    target = SparsityTarget(model, 0.9)
    target.coefficient = coefficient
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for part in batches:
            target.set_tokens(tokens)
            (part["input_ids"].numel() / tokens * model(**part).loss).backward()
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weight.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_penalty_is_silent_in_eval_and_after_close_and_refuses_float16() -> None:
    model = relu_model()
    target = SparsityTarget(model, 0.9)
    target.coefficient = 100.0
    target.set_tokens(48)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(**batch()).loss.backward()
        return model.model.layers[0].mlp.up_proj.weight.grad.clone()

    penalised = gradient()
    model.eval()
    plain = gradient()
    model.train()
    target.close()
    assert torch.equal(gradient(), plain) and not torch.allclose(penalised, plain)
    SparsityTarget(model, 0.9)
    with pytest.raises(StochaError, match="float16"):
        stocha_mlps(model)[0].half()(torch.ones(1, 32, dtype=torch.float16, requires_grad=True))
    for wrong in (0.0, 1.0, 90.0):
        with pytest.raises(StochaError, match="between 0 and 1"):
            SparsityTarget(model, wrong)
    with pytest.raises(StochaError, match="patch"):
        SparsityMeter(tiny_model())


def test_a_target_that_begins_late_rises_over_what_is_left_of_training() -> None:
    target = SparsityTarget(relu_model(), 0.9, ramp=0.5)
    target.update(0.8, 0.7)
    assert [target.wanted(at) for at in (0.8, 0.85, 0.9, 1.0)] == pytest.approx([0.7, 0.8, 0.9, 0.9])


@pytest.mark.slow
def test_compiled_model_recompiles_for_recording_only() -> None:
    model = relu_model(num_hidden_layers=1)
    meter, target = SparsityMeter(model), SparsityTarget(model, 0.9)

    def gradient(run: Any) -> torch.Tensor:
        model.zero_grad()
        run(**batch()).loss.backward()
        return model.model.layers[0].mlp.up_proj.weight.grad.clone()

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend="aot_eager")
    for coefficient in (0.5, 5.0):
        target.coefficient = coefficient
        target.set_tokens(48)
        torch.testing.assert_close(gradient(compiled), gradient(model), rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for _ in range(2):
        with meter.record():
            gradient(compiled)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    assert meter.read()["per_layer"] == pytest.approx(shares(model, batch()), abs=1e-12)


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    """[1024, 24] tokens of a Markov chain."""
    chance = torch.Generator().manual_seed(0)
    following = torch.softmax(3 * torch.randn(64, 64, generator=chance), -1)
    ids = torch.randint(64, (1024, 1), generator=chance)
    for _ in range(23):
        ids = torch.cat([ids, torch.multinomial(following[ids[:, -1]], 1, generator=chance)], 1)
    return ids


def train(model: Any, text: torch.Tensor, rate: float, share: float, steps: int, resume_at: int = -1) -> Any:
    """Trains with AdamW under a cosine; returns the final share of zeros and (share, coefficient) of every update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    meter, target, history = SparsityMeter(model), SparsityTarget(model, share), []
    chance = torch.Generator().manual_seed(5)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = rate * min(1, step / 10) * (1 + math.cos(math.pi * step / steps)) / 2
        ids = text[torch.randint(len(text), (8,), generator=chance)]
        target.set_tokens(ids.numel())
        meter.recording = step % 5 == 0
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if meter.recording:
            history.append((meter.read()["mean"], target.coefficient))
            target.update(step / steps, history[-1][0])
        if step == resume_at:
            saved = json.loads(json.dumps(target.state_dict()))
            target.close()
            target = SparsityTarget(model, share)
            target.load_state_dict(saved)
    with meter.record(), torch.no_grad():
        model(input_ids=text[:256])
    reached = meter.read()["mean"]
    meter.close()
    target.close()
    return reached, history


@pytest.fixture(scope="module")
def trained(text: torch.Tensor) -> dict[str, Any]:
    """Two starting points: fresh weights, and weights trained without a penalty to speak of."""
    fresh = relu_model(intermediate_size=64, initializer_range=0.1)
    taught = copy.deepcopy(fresh)
    train(taught, text, 5e-3, 1e-3, 100)
    return {"fresh": fresh, "taught": taught}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "rate", "share"),
    [("fresh", 2e-3, 0.6), ("fresh", 1e-2, 0.9), ("taught", 2e-3, 0.9), ("taught", 1e-2, 0.6), ("taught", 1e-2, 0.95)],
)
def test_target_is_reached(trained: Any, text: torch.Tensor, start: str, rate: float, share: float) -> None:
    reached, history = train(copy.deepcopy(trained[start]), text, rate, share, 200)
    assert reached == pytest.approx(share, abs=0.04)  # a change of 1e-6 in the weights moves it by 0.025
    assert len({round(coefficient, 6) for _, coefficient in history}) > 20  # it was steered all along


@pytest.mark.slow
def test_target_below_the_start_switches_the_penalty_off(trained: Any, text: torch.Tensor) -> None:
    unpenalised, _ = train(copy.deepcopy(trained["taught"]), text, 2e-3, 1e-3, 60)
    reached, history = train(copy.deepcopy(trained["taught"]), text, 2e-3, 0.2, 60)
    assert history[-1][1] == SparsityTarget.LIMITS[0]
    assert reached == pytest.approx(unpenalised, abs=0.03) and reached > 0.2


@pytest.mark.slow
def test_resume_continues_the_same_trajectory(trained: Any, text: torch.Tensor) -> None:
    runs = [train(copy.deepcopy(trained["fresh"]), text, 5e-3, 0.8, 60, resume_at=at) for at in (-1, 35)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [0.6, 0.9])
def test_thresholds_meet_the_target(dtype: torch.dtype, target: float) -> None:
    model = relu_model(num_hidden_layers=4).to(dtype).eval()
    batches = [batch(seed) for seed in range(3)]
    before = model(**batches[0]).logits
    thresholds = fatrelu_thresholds(model, batches, target)
    assert torch.equal(model(**batches[0]).logits, before)  # nothing changed yet
    apply_thresholds(model, thresholds)
    meter = SparsityMeter(model)
    with meter.record(), torch.no_grad():
        for inputs in batches:
            model(**inputs)
    read = meter.read()
    assert read["mean"] == pytest.approx(target, abs=0.005)
    assert read["per_layer"] == pytest.approx([target] * 4, abs=0.03)


@pytest.mark.parametrize("trains", [True, False])
def test_thresholds_meet_the_target_under_the_models_input_cuts_in_whatever_mode_it_was_left(trains: bool) -> None:
    """An evaluation leaves eval(), in which rows are computed without cuts."""
    cuts = InputCuts({name: [0.6, 0.6] for name in ("q_proj", "gate_proj", "up_proj")}, train=trains)
    found = []
    for training in (True, False):
        model = tiny_model()
        stocha_hf.patch(model, stocha_hf.StochaConfig(activation="relu", inputs=cuts))
        found.append(fatrelu_thresholds(model.train(training), [batch()], 0.8))
        assert moved_thresholds(model.train(), [batch()], 0.7) == moved_thresholds(model.eval(), [batch()], 0.7)
    assert found[0] == found[1]
    apply_thresholds(model, found[0])
    with cut_inputs(model, "always"):
        under_cuts = sum(shares(model, batch())) / 2
    assert under_cuts == pytest.approx(0.8, abs=0.002)
    assert sum(shares(model, batch())) / 2 != pytest.approx(0.8, abs=0.004)  # the cuts matter


def test_thresholds_are_saved(tmp_path: Path) -> None:
    model, thresholds = relu_model().eval(), [0.25, 1.5]
    apply_thresholds(model, thresholds)
    model.save_pretrained(tmp_path)
    loaded = StochaLlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.hidden_act == "relu" and loaded.config.stocha["inference"] == "fatrelu"
    assert [mlp.threshold for mlp in stocha_mlps(loaded)] == thresholds
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)


def test_a_layer_beyond_the_target_gets_no_threshold_and_the_others_less() -> None:
    model = relu_model(num_hidden_layers=3)
    stocha_mlps(model)[1].gate_proj.weight.data.zero_()  # gate 0 everywhere: nothing but zeros
    thresholds = fatrelu_thresholds(model, [batch()], 0.8)
    apply_thresholds(model, thresholds)
    measured = shares(model, batch())
    assert thresholds[1] == 0 and measured[1] == 1
    assert measured[0] == pytest.approx(0.7, abs=0.01) and measured[2] == pytest.approx(0.7, abs=0.01)


def test_where_plain_relu_makes_more_zeros_than_the_target_thresholds_are_zero() -> None:
    assert fatrelu_thresholds(relu_model(), [batch()], 0.2) == [0.0, 0.0]


def test_thresholds_refuse_what_they_cannot_meet() -> None:
    model = relu_model()
    with pytest.raises(StochaError, match="below 1"):
        fatrelu_thresholds(model, [batch()], 1.0)
    with pytest.raises(StochaError, match="3 thresholds were given: expected 2"):
        apply_thresholds(model, [0.1, 0.2, 0.3])
    assert model.config.stocha["activation"] == "relu" and stocha_mlps(model)[0].threshold == 0.0


def test_moved_thresholds_scale_what_every_layer_leaves_by_one_factor() -> None:
    model = relu_model(num_hidden_layers=3).eval()
    apply_thresholds(model, [0.05, 0.1, 0.2])
    before = shares(model, batch())
    for _ in range(4):  # a threshold changes what the layers after it see
        apply_thresholds(model, moved_thresholds(model, [batch()], 0.9))
    after = shares(model, batch())
    factors = [(1 - late) / (1 - early) for early, late in zip(before, after, strict=True)]
    assert sum(after) / 3 == pytest.approx(0.9, abs=0.005)
    assert factors == pytest.approx([sum(factors) / 3] * 3, rel=0.1) and factors[0] < 1


def test_moved_thresholds_stop_at_plain_relu() -> None:
    model = relu_model(num_hidden_layers=3).eval()
    plain = shares(model, batch())
    apply_thresholds(model, [0.5, 0.5, 0.5])
    for _ in range(4):
        apply_thresholds(model, moved_thresholds(model, [batch()], 0.1))
    assert shares(model, batch()) == pytest.approx(plain, abs=1e-3)
