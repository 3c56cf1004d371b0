"""Input cuts: what a projection computes and when, in every way to call a model, and the conversion that sets them."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_refused, call_command, run_warm, tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

import stocha_hf
from stocha_hf.cuts import ATTENTION, PROJECTIONS, InputCuts
from stocha_hf.cuts_stocha import CutInput, cut_inputs, cut_projections, projections
from stocha_hf.measurement.evaluation import compare, evaluate
from stocha_hf.measurement.selection.input_cuts import calibrate_inputs
from stocha_hf.modeling_stocha import StochaConfig
from stocha_hf.models import load_model
from stocha_hf.patching import patch, unpatch
from stocha_hf.publishing.upload import _additions, _publishable
from stocha_hf.spec import ARCHITECTURES, CUTS_FILE, MODELING_FILE

TOKENS = torch.tensor([[1, 5, 9, 17, 33, 4, 8, 60]])
OTHER = torch.randint(3, 64, (1, 8), generator=torch.Generator().manual_seed(2))  # cuts change what follows it
pytestmark = pytest.mark.usefixtures("one_thread")


def cuts(of: Any = PROJECTIONS, **fields: Any) -> InputCuts:
    return InputCuts({name: [0.3, 0.4] for name in of}, **fields)


def cut_model(model_type: str = "llama", *, activation: str | None = None, **fields: Any) -> Any:
    model = tiny_model(model_type)
    patch(model, StochaConfig(activation=activation or ARCHITECTURES[model_type].act, inputs=cuts(**fields)))
    return model


def reference(model_type: str = "llama", of: Any = PROJECTIONS, centre: float = 0.0) -> Any:
    """A native model whose projections are given what is left of their inputs, at every token."""
    model = tiny_model(model_type)
    for layer, limit in zip(projections(model), (0.3, 0.4), strict=True):
        for name in of:
            layer[name].register_forward_pre_hook(
                lambda module, args, limit=limit: torch.where((args[0] - centre).abs() > limit, args[0], centre)
            )
    return model


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_eval_cuts_where_a_sequence_has_one_new_token_and_nowhere_else(model_type: str) -> None:
    native, model = tiny_model(model_type), cut_model(model_type)
    assert model.state_dict().keys() == native.state_dict().keys()
    with torch.no_grad():
        cache, other = (some(TOKENS[:, :5]).past_key_values for some in (model, native))
        verified = [
            some(TOKENS[:, 5:7], past_key_values=kept).logits for some, kept in ((model, cache), (native, other))
        ]
        assert close(*verified)  # several tokens after a cache, as assisted generation verifies them
        step = model(TOKENS[:, 7:], past_key_values=cache).logits
    full, whole = native(TOKENS).logits, model(TOKENS).logits
    expected = _step(reference(model_type), native)
    assert torch.equal(whole, full)
    assert close(step, expected) and not close(step, full[:, 7:])


def _step(model: Any, prompt: Any) -> torch.Tensor:
    """One token by `model` after a prompt that another model read."""
    return model(TOKENS[:, 7:], past_key_values=prompt(TOKENS[:, :7]).past_key_values).logits


def test_prefill_cuts_at_every_token_and_a_context_overrules() -> None:
    everywhere, model, native = cut_model(prefill=True), cut_model(), tiny_model()
    expected = reference()(TOKENS).logits
    assert torch.equal(everywhere(TOKENS).logits, expected)
    with model.cut_inputs("always"):
        assert torch.equal(model(TOKENS).logits, expected)
        with stocha_hf.cut_inputs(model, "never"):
            assert torch.equal(_step(model, model), _step(native, native))
        assert torch.equal(model(TOKENS).logits, expected)
    assert torch.equal(model(TOKENS).logits, native(TOKENS).logits)
    with pytest.raises(ValueError, match="where the model cuts inputs is 'often': expected one of never, decode"):
        model.cut_inputs("often").__enter__()
    patch(native, StochaConfig())
    with pytest.raises(ValueError, match="expected one with input cuts"):
        native.cut_inputs("always").__enter__()


def test_what_is_near_a_centre_becomes_the_centre_and_nan_stays() -> None:
    model = cut_model(prefill=True, of=["down_proj"], centres={"down_proj": [0.1, 0.1]})
    assert close(model(TOKENS).logits, reference(of=["down_proj"], centre=0.1)(TOKENS).logits)
    projection = cut_projections(model)[0]
    x = torch.tensor([[0.5, -0.1, 0.3, float("nan"), -float("inf")]])
    assert torch.equal(projection.cut(x).nan_to_num(7.0), torch.tensor([[0.5, 0.1, 0.1, 7.0, -torch.finfo().max]]))


def test_an_ffn_that_is_sparse_by_its_gate_stays_so_beside_attention_with_cuts() -> None:
    model = cut_model(activation="relu", of=ATTENTION)
    calls = []
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *args: calls.append(args))
    native = tiny_model(hidden_act="relu")
    expected = reference(of=ATTENTION)
    expected.config.hidden_act, *_ = (
        "relu",
        [setattr(layer.mlp, "act_fn", nn.ReLU()) for layer in expected.model.layers],
    )
    assert torch.equal(_step(model, native), _step(expected, native)) and calls
    with torch.no_grad():  # the kernels of the FFN, where it has no hook
        assert close(_step(model, native), _step(expected, native))


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_rows_of_a_padded_batch_and_both_caches_write_what_each_alone_writes(activation: str) -> None:
    model = cut_model(activation=activation)
    short, long = TOKENS[:, :3], OTHER
    padded = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.int64), short], 1), long])
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    alone = [model.generate(prompt, **settings)[0, prompt.shape[1] :] for prompt in (short, long)]
    for kind in (None, "static"):
        rows = model.generate(padded, attention_mask=padded != 0, cache_implementation=kind, **settings)[:, 8:]
        assert torch.equal(rows, torch.stack(alone))
    with model.cut_inputs("never"):
        whole = model.generate(long, **settings)
    assert not torch.equal(whole[0, 8:], alone[1])


@pytest.mark.slow
def test_drafts_with_cuts_are_verified_without() -> None:
    model, native = cut_model(), tiny_model()
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with torch.enable_grad():  # PyTorch's sums in both
        drafted = model.generate(OTHER, assistant_model=copy.deepcopy(model), **settings)[:, :-1]  # the last: no draft
        assert not torch.equal(drafted, model.generate(OTHER, **settings)[:, :-1])
        assert torch.equal(drafted, native.generate(OTHER, **settings)[:, :-1])


def test_training_is_without_cuts_unless_they_are_asked_for() -> None:
    native, off, on = tiny_model().train(), cut_model().train(), cut_model(train=True).train()
    assert torch.equal(off(TOKENS).logits, native(TOKENS).logits)
    found = on(TOKENS, labels=TOKENS)
    assert torch.equal(found.logits, reference()(TOKENS).logits)
    on.gradient_checkpointing_enable()
    again = on(TOKENS, labels=TOKENS)
    expected = reference()
    for result in (again, expected(TOKENS, labels=TOKENS)):
        result.loss.backward()
        assert torch.equal(result.loss, found.loss)
    for name, weight in on.named_parameters():
        assert torch.allclose(weight.grad, expected.get_parameter(name).grad, rtol=1e-4, atol=1e-6), name


def test_hooks_see_what_a_projection_is_given_and_an_adapter_reads_it_in_full() -> None:
    from peft import LoraConfig, get_peft_model

    model, native, seen = cut_model(prefill=True), tiny_model(), []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    native.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(TOKENS), native(TOKENS)
    assert torch.equal(*seen)
    settings: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    x = torch.randn(1, 4, 32)
    later = tiny_model()
    torch.manual_seed(0)
    adapters = [get_peft_model(model, LoraConfig(**settings)).eval()]
    torch.manual_seed(0)
    adapters.append(get_peft_model(later, LoraConfig(**settings)).eval())
    patch(later, StochaConfig(activation="silu", inputs=cuts(prefill=True)))  # patched after the adapter
    for adapted in adapters:
        lora = adapted.base_model.model.model.layers[0].self_attn.q_proj
        inner, delta = lora.base_layer, lora.scaling["default"] * lora.lora_B["default"](lora.lora_A["default"](x))
        assert close(lora(x), nn.functional.linear(torch.where(x.abs() > 0.3, x, 0), inner.weight) + delta)
    assert torch.equal(adapters[0](TOKENS).logits, adapters[1](TOKENS).logits)
    merged = adapters[0].merge_and_unload()
    assert len(cut_projections(merged)) == 14


def test_copies_pickles_and_folders_cut_too_and_unpatching_restores(tmp_path: Path) -> None:
    model, native = cut_model(prefill=True), tiny_model()
    expected = model(TOKENS).logits
    model.save_pretrained(tmp_path / "saved")
    loaded = load_model(str(tmp_path / "saved"))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(other(TOKENS).logits, expected)
    del model.model.layers[0]
    model.config.num_hidden_layers = 1
    model.save_pretrained(tmp_path / "shallow")
    shallow = load_model(str(tmp_path / "shallow"))
    assert [module.input_threshold for module in cut_projections(shallow)] == [0.4] * 7
    unpatch(loaded)
    assert torch.equal(loaded(TOKENS).logits, native(TOKENS).logits)
    assert {type(layer[name]) for layer in projections(loaded) for name in PROJECTIONS} == {nn.Linear}
    assert not any("input_threshold" in vars(module) for module in loaded.modules())


def test_a_projection_of_another_class_that_a_quantizer_put_in_is_cut(tmp_path: Path) -> None:
    class Quantized(nn.Linear):
        pass

    cut_model(prefill=True).save_pretrained(tmp_path / "saved")
    from stocha_hf.modeling_stocha import StochaLlamaForCausalLM

    model = StochaLlamaForCausalLM(load_model(str(tmp_path / "saved")).config)
    assert not cut_projections(model)  # a quantizer finds nn.Linear
    for layer in projections(model):
        for name in PROJECTIONS:
            layer[name].__class__ = Quantized
    model.eval()
    assert len(cut_projections(model)) == 14
    assert all(isinstance(module, Quantized) and isinstance(module, CutInput) for module in cut_projections(model))


@pytest.mark.slow
def test_a_compiled_model_has_one_graph(fresh_compiler: None) -> None:
    model = cut_model()
    del model.model.layers[1:]  # each compiles as the first
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert close(compiled(TOKENS, use_cache=False).logits, model(TOKENS, use_cache=False).logits)
        assert close(compiled(TOKENS[:, :1], use_cache=False).logits, model(TOKENS[:, :1], use_cache=False).logits)


def test_calibrated_thresholds_cut_the_share_that_was_asked_for() -> None:
    model = tiny_model()
    windows = torch.randint(3, 64, (8, 32), generator=torch.Generator().manual_seed(0))
    found = calibrate_inputs(model, windows, 0.4)
    given: list[torch.Tensor] = []
    layer = projections(model)[1]
    layer["down_proj"].register_forward_pre_hook(lambda module, args: given.append(args[0].abs()))
    model(windows)
    assert (given[0] <= found.thresholds["down_proj"][1]).float().mean().item() == pytest.approx(0.4, abs=0.005)
    assert found.thresholds["q_proj"] == found.thresholds["v_proj"] and found.share == 0.4
    greedy = calibrate_inputs(model, windows, 0.4, ["q_proj", "o_proj", "down_proj"], "greedy")
    assert [*greedy.thresholds] == ["q_proj", "o_proj", "down_proj"]
    patch(other := tiny_model(), StochaConfig(activation="silu", inputs=greedy))
    share = evaluate(other, windows).bytes_read.share  # type: ignore[union-attr]
    sizes = {name: module.weight.numel() for name, module in projections(model)[0].items() if name in PROJECTIONS}
    cut = sum(sizes[name] for name in greedy.thresholds) / sum(sizes.values())
    assert share == pytest.approx(1 - 0.4 * cut, abs=0.03)
    model.model.layers[1].input_layernorm.weight.data.fill_(float("nan"))
    with pytest.raises(stocha_hf.StochaError, match="not finite on the calibration text"):
        calibrate_inputs(model, windows, 0.4)


def test_evaluation_cuts_at_every_token_and_says_how_much() -> None:
    model, native = cut_model(), tiny_model()
    windows = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    patch(native, StochaConfig(activation="silu"))
    found, without = evaluate(model, windows), evaluate(native, windows)
    assert found.perplexity == evaluate(cut_model(prefill=True), windows).perplexity != without.perplexity
    assert found.inputs_cut == "at every token" and without.inputs_cut is None
    assert found.bytes_read is not None and without.bytes_read is not None
    assert 0.2 < found.bytes_read.share < 0.9 and without.bytes_read.share == 1
    assert compare(model, native, windows).kl > 0.001
    with cut_inputs(model, "decode"):
        assert evaluate(model, windows).perplexity == found.perplexity


@pytest.mark.slow
def test_convert_writes_thresholds_and_the_native_folder_is_the_original(
    checkpoint: Any, text: Path, tmp_path: Path
) -> None:
    source, out = checkpoint(), tmp_path / "cut"
    done = call_command(
        "stocha-convert", source, out, "--inputs", 0.4, "--calibrate", text, "--calibrate-tokens", 2048
    )
    assert done.returncode == 0, done.stderr
    assert "40% of the inputs of q_proj" in done.stdout and "the native class" in done.stdout
    entry = json.loads((out / "config.json").read_text())["stocha"]
    assert entry["activation"] == entry["inference"] == "silu"
    assert entry["inputs"]["share"] == 0.4 and entry["inputs"]["calibration"]["data"] == "text.jsonl"
    assert {len(values) for values in entry["inputs"]["thresholds"].values()} == {2}
    assert "cuts nothing" in (out / "README.md").read_text()
    native, original = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, source))
    remote = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert torch.equal(native(TOKENS).logits, original(TOKENS).logits)
    assert torch.equal(_step(remote, native), _step(load_model(str(out)), native))
    assert not close(_step(remote, native), _step(native, native))
    done = call_command("stocha-eval", out, "--data", text, "--length", 32, "--windows", 4)
    assert "inputs are cut at every token" in done.stdout, done.stdout


@pytest.mark.slow
def test_converting_again_changes_what_is_asked_for(checkpoint: Any, text: Path, tmp_path: Path) -> None:
    source = checkpoint()
    first = stocha_hf.convert(source, tmp_path / "a", inputs=0.4, calibrate=text, calibrate_tokens=64)
    second = stocha_hf.convert(tmp_path / "a", tmp_path / "b", p=0.7)
    assert second.stocha["inputs"] == first.stocha["inputs"]
    third = stocha_hf.convert(
        tmp_path / "b",
        tmp_path / "c",
        activation="relu",
        inputs=0.5,
        calibrate=text,
        inputs_prefill=True,
        inputs_train=True,
    )
    assert third.stocha["inputs"]["thresholds"].keys() == {*ATTENTION}
    assert third.stocha["inputs"]["prefill"] and third.stocha["inputs"]["train"]
    assert third.stocha["inputs"]["thresholds"]["q_proj"][0] > first.stocha["inputs"]["thresholds"]["q_proj"][0]
    assert_refused(
        call_command("stocha-convert", tmp_path / "c", tmp_path / "d", "--refit", text), "--inputs 0", "cuts its"
    )
    last = stocha_hf.convert(tmp_path / "c", tmp_path / "d", inputs=0)
    assert "inputs" not in last.stocha and last.stocha["activation"] == "relu"


def test_only_folders_that_cut_carry_the_code_that_cuts_and_without_it_a_sentence_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = cut_model(), tiny_model()
    patch(plain, StochaConfig(activation="relu"))
    for name, saved in (("cut", model), ("plain", plain)):
        saved.save_pretrained(tmp_path / name)
    assert (tmp_path / "cut" / "cuts_stocha.py").is_file() and not (tmp_path / "plain" / "cuts_stocha.py").exists()
    named = [json.loads((tmp_path / name / "config.json").read_text())["auto_map"] for name in ("cut", "plain")]
    assert [names["AutoModel"] for names in named] == [
        "cuts_stocha.StochaLlamaModel",
        "modeling_stocha.StochaLlamaModel",
    ]
    monkeypatch.setitem(sys.modules, "stocha_hf.cuts_stocha", None)
    with pytest.raises(ValueError, match=r"cuts_stocha.py cannot be imported .*: expected it beside modeling_stocha"):
        model.eval()


def test_the_code_that_is_published_is_of_one_version(tmp_path: Path) -> None:
    cut_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)

    def sent() -> dict[str, Any]:
        return {
            item.path_in_repo: item.path_or_fileobj for item in _additions(tmp_path, _publishable(tmp_path), "a/b")
        }

    assert Path(sent()["cuts_stocha.py"]) == tmp_path / "cuts_stocha.py"
    released = next((Path(__file__).parent / "released").glob("*.py")).read_bytes()
    (tmp_path / "modeling_stocha.py").write_bytes(released)  # which knows nothing that cuts_stocha.py asks it for
    found = sent()
    assert Path(found["modeling_stocha.py"]) == MODELING_FILE and Path(found["cuts_stocha.py"]) == CUTS_FILE
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoConfig"].startswith("cuts_stocha.")


@pytest.mark.slow
def test_the_remote_class_cuts_without_stocha_hf(tmp_path: Path) -> None:
    cut_model().save_pretrained(tmp_path / "cut")
    code = """
import sys; sys.modules["stocha_hf"] = None
import torch; from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=8, do_sample=False)[0].tolist())
"""
    done = run_warm(code, tmp_path / "cut")
    assert done.returncode == 0, done.stderr
    found = load_model(str(tmp_path / "cut")).generate(torch.tensor([[1, 5, 9]]), max_new_tokens=8, do_sample=False)
    assert json.loads(done.stdout) == found[0].tolist()
