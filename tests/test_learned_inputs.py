"""Thresholds that are learned with the weights: their gradient, the share that is read, folders, resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers import tiny_model, tiny_tokenizer
from helpers.training import SILU, losses, run
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from stocha_hf.cuts import PROJECTIONS, SHARED, InputCuts
from stocha_hf.cuts_stocha import cut_inputs, cut_projections
from stocha_hf.errors import StochaError
from stocha_hf.measurement.blocks import blocks
from stocha_hf.measurement.evaluation import evaluate
from stocha_hf.measurement.selection.input_scales import inputs_of
from stocha_hf.measurement.selection.learned import STIFF
from stocha_hf.measurement.selection.threshold_gradients import Group, cutting
from stocha_hf.modeling_stocha import StochaConfig, become
from stocha_hf.models import load_model
from stocha_hf.patching import patch
from stocha_hf.spec import ARCHITECTURES
from stocha_hf.training.compiled_layers import compile_layers
from stocha_hf.training.learned_cut import CutLinear
from stocha_hf.training.learned_inputs import LearnedInputs
from stocha_hf.training.uncut_prompts import prompts_uncut

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.randint(4, 64, (4, 16), generator=torch.Generator().manual_seed(0))
AT = torch.rand(4, 16, generator=torch.Generator().manual_seed(1)) > 0.3
OPTIONS: dict[str, Any] = {
    "schedule": SILU,
    "input_thresholds": "learned",
    "input_threshold_rate": 0.05,
    "distill_weight": 1.0,
    "save_steps": 4,
    "logging_steps": 1,
}


def cut_model(model_type: str = "llama", layers: int = 2, apart: float = 0.1, names: Any = PROJECTIONS) -> Any:
    """Cut from 0.4 on, from 0.5 in the second layer, and with `apart` more where a projection shares its input."""
    model = tiny_model(model_type, num_hidden_layers=layers)
    base = getattr(model.config, ARCHITECTURES[model_type].act_key)
    more = {"v_proj": apart, "up_proj": apart}
    limits = {name: [0.4 + 0.1 * layer + more.get(name, 0.0) for layer in range(layers)] for name in names}
    patch(model, StochaConfig(activation=base, inputs=InputCuts(limits, share=0.3, train=True)))
    return model.train()


@pytest.fixture
def cut_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "cut"
    cut_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def trained(model: Any, learned: LearnedInputs, steps: int) -> list[float]:
    """The losses of a few steps, of two passes each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    with prompts_uncut(model) as share:
        for _ in range(steps):
            for rows, share.cut_at in zip(TOKENS.split(2), AT.split(2), strict=True):
                learned.count(share.cut_at)
                loss = model(rows, labels=rows, use_cache=False).loss
                (loss / 2).backward()
            learned.step(1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    return found


def test_a_step_has_the_gradients_of_learning_alone_but_for_what_the_price_would_pull_through_weights() -> None:
    model, native = cut_model(apart=0.0), tiny_model()
    learned = LearnedInputs(model, 0.01, Accelerator(cpu=True))
    sizes = [block.linears[name].weight.numel() for block in blocks(native) for names in SHARED for name in names]
    groups = []
    for layer, block in enumerate(blocks(native)):
        for names in SHARED:
            logs = torch.nn.Parameter(torch.full((inputs_of(block, names),), 0.4 + 0.1 * layer).log())
            groups.append(Group(block, names, logs, sum(block.linears[n].weight.numel() for n in names) / sum(sizes)))
    found = []
    for price, target in ((0.0, 1.0), (3.0, 0.6)):
        learned.price, learned.target = torch.tensor(price), torch.tensor(target)
        with prompts_uncut(model) as share:
            share.cut_at = AT
            learned.count(AT)
            loss = model(TOKENS, labels=TOKENS, use_cache=False).loss
            loss.backward()
        learned.step(0.0)
        found.append(learned.logs.grad)
    with cutting(groups, AT):
        other = native(TOKENS, labels=TOKENS, use_cache=False).loss
        read = torch.stack([group.weight * group.kept for group in groups]).sum()
    torch.testing.assert_close(other, loss)
    assert learned.read()["inputs_cut"] == pytest.approx(1 - read.item(), abs=1e-6)
    of_loss, of_read = (torch.autograd.grad(x, [g.logs for g in groups], retain_graph=True) for x in (other, read))
    over = read.detach() - 0.6
    expected = torch.cat(of_loss).view(2, -1)
    torch.testing.assert_close(found[0], expected)
    expected = (found[1] - found[0])[-1, -48:]  # nothing follows the last down_proj
    torch.testing.assert_close(expected, (3 + STIFF * over) * of_read[-1])


def test_a_share_that_is_none_ends_the_run_and_is_not_followed() -> None:
    model = cut_model()
    learned = LearnedInputs(model, 0.1, Accelerator(cpu=True))
    trained(model, learned, 1)
    assert 0 < learned.read()["inputs_cut"] < 1
    with prompts_uncut(model) as share:
        share.cut_at = AT
        learned.count(AT[:1])  # of more tokens than it was told of
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    learned.step(1.0)
    with pytest.raises(StochaError, match=r"came out as -.*: expected one from 0 to 1"):
        learned.read()
    with pytest.raises(StochaError, match="came out as"), learned.folded():
        pass


def test_steps_that_cut_no_token_count_for_nothing() -> None:
    model = cut_model()
    learned = LearnedInputs(model, 0.1, Accelerator(cpu=True))
    for at in (AT & False, AT, AT & False):
        with prompts_uncut(model) as share:
            share.cut_at = at
            learned.count(at)
            model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        learned.step(0.0)
        found = learned.read()
        assert 0 < found["inputs_cut"] < 1 if at.any() else not found
    assert learned.logs.isfinite().all() and learned.target.isfinite() and learned.price == 1


@pytest.mark.slow
def test_a_run_that_leaves_all_numbers_says_so_and_its_own_error_first(
    cut_folder: Path, text: Path, tmp_path: Path
) -> None:
    options = OPTIONS | {"distill_weight": 0.0, "save_strategy": "no"}
    with pytest.raises(StochaError, match="the loss is not finite at step"):
        run(cut_folder, text, tmp_path / "weights", **options, learning_rate=1e6, max_grad_norm=0)
    for kind in ("no", "steps"):
        with pytest.raises(StochaError, match=r"input_threshold_rate is 50\.0 and thresholds went beyond"):
            run(cut_folder, text, tmp_path / kind, **options | {"input_threshold_rate": 50, "save_strategy": kind})
        assert not (tmp_path / kind / "model.safetensors").exists()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_folded_model_computes_what_it_does_and_goes_on_as_it_was(model_type: str) -> None:
    model = cut_model(model_type)
    learned = LearnedInputs(model, 0.1, Accelerator(cpu=True))
    trained(model, learned, 3)
    spread, weights = learned.logs.std(1), [weight.detach().clone() for weight in model.parameters()]
    assert spread.min() > 0.05
    with torch.no_grad(), cut_inputs(model, "always"):
        before = model(TOKENS).logits
        with learned.folded():
            thresholds = model.config.stocha["inputs"]["thresholds"]
            assert thresholds["v_proj"][0] / thresholds["q_proj"][0] == pytest.approx(0.5 / 0.4)
        for weight, now in zip(weights, model.parameters(), strict=True):
            torch.testing.assert_close(now, weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model(TOKENS).logits, before, rtol=1e-4, atol=1e-4)
    learned.close()
    learned.close()
    assert not any({"limits", "more", "seen"} & vars(module).keys() for module in cut_projections(model))
    with torch.no_grad(), cut_inputs(model, "always"):
        torch.testing.assert_close(model(TOKENS).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("apart", [0.0, 0.1])
def test_one_compiled_layer_serves_all_layers_thresholds_and_prices(fresh_compiler: None, apart: float) -> None:
    alone = cut_model(layers=3, apart=apart)
    learned = LearnedInputs(alone, 0.1, Accelerator(cpu=True))
    expected, logs = trained(alone, learned, 3), learned.logs
    model = cut_model(layers=3, apart=apart)
    learned = LearnedInputs(model, 0.1, Accelerator(cpu=True))
    undo = compile_layers(model, backend="aot_eager")
    counters.clear()
    assert trained(model, learned, 3) == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(learned.logs, logs, rtol=1e-3, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    undo()
    learned.close()


def test_projections_without_cuts_are_left_as_they_are() -> None:
    model = cut_model(names=("q_proj", "down_proj"))
    own = type("Remote", (CutLinear,), {})  # a class of their own, as remote code has
    for module in cut_projections(model):
        become(module, own)
    learned = LearnedInputs(model, 0.1, Accelerator(cpu=True))
    trained(model, learned, 2)
    assert len(cut_projections(model)) == 4
    learned.close()
    assert {type(module) for module in cut_projections(model)} == {own}
    assert {*model.config.stocha["inputs"]["thresholds"]} == {"q_proj", "down_proj"}


@pytest.mark.slow
def test_a_run_learns_at_the_bytes_of_its_beginning_leaves_folded_folders_and_resumes(
    cut_folder: Path, base: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    history = run(cut_folder, text, out, teacher=base, uncut_prompts=0.5, **OPTIONS)
    cut = [row["inputs_cut"] for row in history if "inputs_cut" in row]
    assert len(cut) == 8 and max(cut) < min(cut) + 0.02 and "input_price" in history[0]
    for folder in (out, out / "checkpoint-4"):
        model, native = load_model(str(folder)), AutoModelForCausalLM.from_pretrained(folder)
        assert {*native.state_dict()} == {*tiny_model().state_dict()}
        with torch.no_grad(), cut_inputs(model, "never"):
            torch.testing.assert_close(model(TOKENS).logits, native(TOKENS).logits)
    (stage,) = json.loads((out / "config.json").read_text())["stocha"]["history"]
    assert stage["input_thresholds"] == "learned with the weights"
    weights = load_model(str(out)).state_dict()

    shutil.rmtree(out / "checkpoint-8")
    assert losses(run(cut_folder, text, out, teacher=base, uncut_prompts=0.5, **OPTIONS)) == losses(history)
    assert all(torch.equal(value, weights[name]) for name, value in load_model(str(out)).state_dict().items())

    (out / "model.safetensors").unlink()  # as of a run that was killed before its end
    assert losses(run(cut_folder, text, out, teacher=base, uncut_prompts=0.5, **OPTIONS)) == losses(history)
    assert not (out / "checkpoint-9").exists()
    assert all(torch.equal(value, weights[name]) for name, value in load_model(str(out)).state_dict().items())

    state = out / "checkpoint-8" / "learned_inputs.pt"
    for damage in (lambda: state.write_bytes(b"no archive"), state.unlink):
        damage()
        with pytest.raises(StochaError, match=r"learned_inputs\.pt is missing or damaged: .*remove .*checkpoint-8"):
            run(cut_folder, text, out, teacher=base, uncut_prompts=0.5, **OPTIONS)


@pytest.mark.slow
def test_learned_thresholds_reach_a_lower_loss_than_held_ones_at_the_same_bytes(
    cut_folder: Path, base: Path, text: Path, tmp_path: Path
) -> None:
    found = {}
    options: dict[str, Any] = {"max_steps": 60, "save_steps": 60, "learning_rate": 1e-3, "logging_steps": 20}
    for kind in ("held", "learned"):
        options["input_thresholds"] = kind
        history = run(cut_folder, text, tmp_path / kind, teacher=base, **OPTIONS | options)
        model = load_model(str(tmp_path / kind))
        with cut_inputs(model, "always"):
            found[kind] = [row["kl"] for row in history if "kl" in row][-1], evaluate(model, TOKENS).bytes_read.share
    print(found)
    assert found["learned"][0] < 0.95 * found["held"][0]
    assert found["learned"][1] == pytest.approx(found["held"][1], abs=0.02)


def test_what_thresholds_are_not_learned_with_is_refused_in_a_sentence(
    cut_folder: Path, base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model, options, words in (
        (base, {}, "the model computes all inputs in full in training"),
        (cut_folder, {"use_peft": True}, "use_peft true: an adapter has no place"),
        (cut_folder, {"dtype": "bfloat16"}, "the weights are torch.bfloat16: expected dtype: float32"),
        (cut_folder, {"input_thresholds": "free"}, "input_thresholds is 'free': expected 'held' or 'learned'"),
        (cut_folder, {"input_threshold_rate": -1}, "input_threshold_rate is -1.0: expected a number of at least 0"),
    ):
        with pytest.raises(StochaError, match=words):
            run(model, text, tmp_path / "none", **OPTIONS | options)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(StochaError, match="learned with FSDP or DeepSpeed"):
        run(cut_folder, text, tmp_path / "none", **OPTIONS)
    assert not (tmp_path / "none").exists()
