"""Tokens' own factors that are learned with thresholds: gradients, what they gain, and the folders they leave."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers import tiny_model, tiny_tokenizer
from helpers.training import SILU, losses, run
from test_learned_inputs import AT, OPTIONS, TOKENS, cut_folder, cut_model, trained
from test_token_factors import factor_model

from stocha_hf.cuts_stocha import cut_inputs, cut_projections
from stocha_hf.errors import StochaError
from stocha_hf.measurement.evaluation import evaluate
from stocha_hf.models import load_model
from stocha_hf.spec import ARCHITECTURES
from stocha_hf.training.compiled_layers import compile_layers
from stocha_hf.training.learned_cut import check_learned
from stocha_hf.training.learned_inputs import LearnedInputs
from stocha_hf.training.uncut_prompts import prompts_uncut

pytestmark = pytest.mark.usefixtures("one_thread")
__all__ = ["cut_folder"]


def learns(model: Any, rate: float = 0.3) -> tuple[LearnedInputs, Any]:
    learned = LearnedInputs(model, 0.1, Accelerator(cpu=True), factor_rate=rate)
    return learned, learned.factors


@pytest.mark.parametrize("apart", [0.0, 0.1])
def test_gradients_are_those_of_all_limits_of_a_token_together(apart: float) -> None:
    model = cut_model(apart=apart)
    learned, factors = learns(model)
    at, inputs = torch.zeros_like(AT), {}
    at[1, 7] = True
    for index, block in enumerate(learned.blocks):
        for name in factors.names:
            block.linears[name].register_forward_pre_hook(
                lambda module, args, key=(index, name): inputs.update({key: args[0][1, 7].detach()})
            )
    with prompts_uncut(model) as share:
        share.cut_at = at
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    parts = dict(zip((names[0] for names in learned.cuts), learned.parts.split(learned.widths), strict=True))
    of_cuts = dict(zip((names[0] for names in learned.cuts), learned._by_cut(learned.found), strict=True))
    for layer in range(2):
        found = factors.found[layer].split(factors.lengths, -1)
        for name, (of_loss, of_reading) in zip(factors.names, found, strict=True):
            cuts = [cut for cut in of_cuts if factors.leaders[cut] == name]
            loss = sum(of_cuts[cut][layer, 0].sum() for cut in cuts)
            fewer = -sum((parts[cut] * of_cuts[cut][layer, 1]).sum() for cut in cuts)
            assert loss != 0 and fewer < 0
            x = torch.cat([inputs[layer, name], torch.ones(1)])
            torch.testing.assert_close(of_loss, x * loss, rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(of_reading, x * fewer, rtol=1e-4, atol=1e-7)


def test_a_step_in_doubt_pays_for_what_it_reads_and_nothing_is_cut_there() -> None:
    model = cut_model()
    learned, factors = learns(model)
    at, found = AT & (torch.arange(16) < 9), []
    for paid in (None, AT):
        with prompts_uncut(model) as share:
            share.cut_at, share.paid_at = at, paid
            learned.count(at if paid is None else paid)
            loss = model(TOKENS, labels=TOKENS, use_cache=False).loss
            loss.backward()
        found.append((loss.item(), learned._by_cut(learned.found)[0].clone(), factors.found.clone()))
        learned.step(0.0)
        assert 0 < learned.read()["inputs_cut"] < 1
    (loss, limits, tokens), (other_loss, other_limits, other_tokens) = found
    assert loss == other_loss
    torch.testing.assert_close(limits[:, 0], other_limits[:, 0])
    torch.testing.assert_close(tokens[:, 0], other_tokens[:, 0])
    assert (other_limits[:, 1:].sum(-1) > limits[:, 1:].sum(-1)).all()
    assert not torch.allclose(tokens[:, 1], other_tokens[:, 1])


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_folded_model_computes_what_it_does_and_goes_on_as_it_was(model_type: str) -> None:
    model = cut_model(model_type)
    learned, factors = learns(model)
    trained(model, learned, 3)
    assert factors.values.abs().sum(-1).min() > 0.05
    with torch.no_grad(), cut_inputs(model, "always"):
        before = model(TOKENS).logits
        with learned.folded():
            kept = {name: value.clone() for name, value in model.state_dict().items()}
        torch.testing.assert_close(model(TOKENS).logits, before, rtol=1e-4, atol=1e-4)
    learned.close()
    assert not any({"by_loss", "by_reading", "part"} & vars(module).keys() for module in cut_projections(model))
    with torch.no_grad(), cut_inputs(model, "always"):
        torch.testing.assert_close(model(TOKENS).logits, before, rtol=1e-4, atol=1e-4)
    names = [name for name in kept if name.endswith("_token_factor")]
    assert len(names) == 8 and all(kept[name].any() for name in names)
    again, other = learns(model)  # from the folder's own, at a scale of its own
    rows = [torch.cat([kept[name] for name in names[first : first + 4]]) for first in (0, 4)]
    torch.testing.assert_close(other.values, torch.stack(rows))
    again.close()


def test_a_run_goes_on_only_with_factors_where_it_had_them() -> None:
    with_factors, without = learns(cut_model())[0], learns(cut_model(), rate=0.0)[0]
    with pytest.raises(StochaError, match=r"input_factor_rate is 0\.0, and the run's checkpoint has learned factors"):
        without.load_state_dict(with_factors.state_dict())
    old = {key: value for key, value in without.state_dict().items() if key != "units"}  # as earlier versions wrote
    with pytest.raises(StochaError, match=r"input_factor_rate is 0\.3, and the run's checkpoint has no factors"):
        with_factors.load_state_dict(old)
    without.load_state_dict(old)


def test_thresholds_are_learned_of_a_model_whose_folders_copy_knows_no_price_of_doubts() -> None:
    model = cut_model()
    cutting = cut_projections(model)[0].cutting
    del cutting.paid_at
    assert trained(model, LearnedInputs(model, 0.1, Accelerator(cpu=True)), 1)
    del cutting.paid_at
    with prompts_uncut(model) as share:
        assert share is cutting and share.paid_at is None


@torch.no_grad()
def test_a_step_between_those_of_a_run_cuts_by_what_is_learned() -> None:
    model = cut_model()
    learned = learns(model)[0]
    with torch.enable_grad():
        trained(model, learned, 3)
    model.eval()

    def logits() -> torch.Tensor:
        cache = model(TOKENS[:1, :6], use_cache=True).past_key_values
        return model(TOKENS[:1, 6:7], past_key_values=cache).logits

    found = logits()
    learned.close()
    torch.testing.assert_close(found, logits(), rtol=1e-4, atol=1e-4)


def test_an_adapter_learns_beside_them(tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "cut"
    factor_model(train=True).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    options = {"schedule": SILU, "use_peft": True, "max_steps": 1, "learning_rate": 1e-3}
    assert losses(run(folder, text, tmp_path / "out", **options | {"logging_steps": 1}))


def test_code_of_before_learns_no_factors_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cut_model()
    args = SimpleNamespace(fp16=False, input_factor_rate=0.1)
    check_learned(model, args, adapter=False)
    kind = type(cut_projections(model)[0])
    monkeypatch.setattr(kind, "state", tuple(key for key in kind.state if key != "factors"))
    with pytest.raises(StochaError, match="is of before tokens' factors: expected that of now"):
        check_learned(model, args, adapter=False)
    args.input_factor_rate = 0.0
    check_learned(model, args, adapter=False)


@pytest.mark.slow
def test_one_compiled_layer_serves_all(fresh_compiler: None) -> None:
    from torch._dynamo.utils import counters

    found = []
    for compiled in (False, True):
        model = cut_model(layers=3, apart=0.0)
        learned, factors = learns(model)
        if compiled:
            undo = compile_layers(model, backend="aot_eager")
            counters.clear()
        found.append((trained(model, learned, 3), factors.units.detach()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-2, atol=1e-2)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    undo()
    learned.close()


@pytest.mark.slow
def test_a_run_leaves_folders_with_them_and_resumes(cut_folder: Path, base: Path, text: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"teacher": base, "uncut_prompts": 0.5, "input_factor_rate": 0.05}
    out = tmp_path / "out"
    history = run(cut_folder, text, out, **options)
    cut = [row["inputs_cut"] for row in history if "inputs_cut" in row]
    assert len(cut) == 8 and max(cut) < min(cut) + 0.04
    entry = json.loads((out / "config.json").read_text())["stocha"]
    assert entry["inputs"]["token_factors"] is True and entry["history"][-1]["input_factor_rate"] == 0.05
    weights = load_model(str(out)).state_dict()
    assert {*weights} > {*tiny_model().state_dict()} and len(weights) == len(tiny_model().state_dict()) + 8
    for path in out.glob("checkpoint-8/*"):
        path.unlink()
    (out / "checkpoint-8").rmdir()
    assert losses(run(cut_folder, text, out, **options)) == losses(history)
    assert all(torch.equal(value, weights[name]) for name, value in load_model(str(out)).state_dict().items())
    # those of a folder stay as they are where no rate is given, and held thresholds do not know them
    options["input_factor_rate"] = 0.0
    run(out, text, tmp_path / "on", **options | {"learning_rate": 0.0, "input_threshold_rate": 0.0})
    on = load_model(str(tmp_path / "on")).state_dict()
    for name in weights:
        torch.testing.assert_close(on[name], weights[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(StochaError, match=r"tokens' own factors.*expected input_thresholds: learned"):
        run(out, text, tmp_path / "held", **options | {"input_thresholds": "held"})
    with pytest.raises(StochaError, match=r"input_factor_rate is 0\.1 and input_thresholds held"):
        run(cut_folder, text, tmp_path / "held", **options | {"input_thresholds": "held", "input_factor_rate": 0.1})


@pytest.mark.slow
def test_factors_reach_a_lower_loss_at_the_same_bytes(
    cut_folder: Path, base: Path, text: Path, tmp_path: Path
) -> None:
    found = []
    options: dict[str, Any] = {"max_steps": 80, "save_steps": 80, "learning_rate": 1e-9, "logging_steps": 20}
    for rate in (0.0, 0.2):
        history = run(
            cut_folder, text, tmp_path / str(rate), teacher=base, **OPTIONS | options, input_factor_rate=rate
        )
        model = load_model(str(tmp_path / str(rate)))
        with cut_inputs(model, "always"):
            kl = [row["kl"] for row in history if "kl" in row][-1]
            found.append((kl, evaluate(model, TOKENS).bytes_read.share))
    (without, share), (with_factors, other) = found
    assert with_factors < without and other == pytest.approx(share, abs=0.03)
