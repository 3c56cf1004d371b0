"""Weights in 8 and 4 bits: packing, loading, saving, converting, publishing."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
import transformers
from helpers import first_is_fast, run_warm, tiny_model
from safetensors.torch import load_file

from stocha_hf import StochaError, convert, load_model, modeling_stocha, quantization_stocha
from stocha_hf.conversion import quantize as quantizing
from stocha_hf.conversion.error_feedback import round_with_feedback
from stocha_hf.data import calibration_windows
from stocha_hf.measurement.bytes_read import ReadMeter
from stocha_hf.modeling_stocha import ARCHITECTURES, StochaConfig
from stocha_hf.patching import patch
from stocha_hf.publishing.upload import _additions, _publishable
from stocha_hf.quantization import Quantization
from stocha_hf.quantization_stocha import PROJECTIONS, StochaQuantConfig, dequantize, pack, quantize

TOKENS = torch.tensor([[1, 5, 9, 17, 33, 4, 8, 60], [1, 7, 7, 20, 41, 3, 62, 11]])
pytestmark = pytest.mark.usefixtures("one_thread")


def test_bytes_hold_codes_in_the_order_that_kernels_read() -> None:
    codes = torch.arange(64).remainder(16).view(1, 64)
    packed = pack(codes, 4)
    assert packed.dtype == torch.uint8 and packed.shape == (1, 32)
    for group, byte in ((0, 0), (0, 15), (1, 3)):
        assert packed[0, 16 * group + byte] == codes[0, 32 * group + byte] + 16 * codes[0, 32 * group + byte + 16]
    words = torch.tensor([[(23 << 4 | 8) << 7 | 60, (24 << 4) << 7 | 127]]).to(torch.int16)  # 1.5 x 2^-1, 2^0
    scale, zero = torch.tensor([0.75, 1.0]), torch.tensor([7.5, 15.875])
    weights = (codes.view(2, 32) - zero[:, None]) * scale[:, None]
    assert torch.equal(dequantize(packed, words, 4, 40), weights.view(1, 64)[:, :40])
    assert torch.equal(
        dequantize(codes.to(torch.int8), scale[None].half(), 8, 64), (codes.view(2, 32) * scale[:, None]).view(1, 64)
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("ids", [torch.empty(1, 0, dtype=torch.int64), torch.empty(1, 0), torch.tensor([[-1]])])
def test_ids_that_are_none_are_refused_as_a_native_model_refuses_them(bits: int, ids: torch.Tensor) -> None:
    native, quantized = tiny_model(), tiny_model()
    quantization_stocha.exchange(quantized, Quantization(bits), fill=True)
    errors = []
    for model in (native, quantized):
        with torch.no_grad(), pytest.raises((RuntimeError, IndexError)) as caught:
            model.eval()(ids)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]
    empty = quantized.get_input_embeddings()(torch.empty(2, 0, dtype=torch.int64))
    assert empty.shape == (2, 0, native.config.hidden_size)


@pytest.mark.parametrize(("bits", "most"), [(4, 0.09), (8, 0.007)])
def test_the_error_is_that_of_the_bits_and_what_a_group_can_hold_is_exact(bits: int, most: float) -> None:
    """A normal weight's range in 32 is 4.1 deviations; in 15 steps, the error is 0.27 / sqrt(12) = 0.08."""
    weight = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    made = quantize(weight, bits)
    assert made[1].shape == (64, 4)
    again = dequantize(*made, bits, 100)
    assert (again - weight).norm() / weight.norm() < most
    twice = dequantize(*quantize(again, bits), bits, 100)
    assert (twice - again).norm() <= 0.01 * (again - weight).norm()
    for flat in (torch.zeros(2, 32), torch.full((2, 32), 127 / 512), torch.full((2, 32), -127 / 512)):
        torch.testing.assert_close(dequantize(*quantize(flat, bits), bits, 32), flat, rtol=0.005, atol=0)
    for size in (1e-5 if bits == 4 else 1e-3, 100.0):  # the size of weights does not matter
        sized = dequantize(*quantize(size * weight, bits), bits, 100)
        assert (sized - size * weight).norm() < most * (size * weight).norm()


def test_errors_count_by_importance() -> None:
    weight = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(32)
    importance[::4] = 100.0
    errors = [
        ((dequantize(*quantize(weight, 4, counts), 4, 32) - weight) ** 2 * importance).sum()
        for counts in (None, importance)
    ]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", first_is_fast(ARCHITECTURES))
def test_a_model_is_quantized_saved_and_loaded(model_type: str, tied: bool, tmp_path: Path) -> None:
    native = tiny_model(model_type, tie_word_embeddings=tied)
    native.save_pretrained(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "relu", activation="relu")
    kind = getattr(modeling_stocha, f"Stocha{ARCHITECTURES[model_type].causal_lm}")
    model = kind.from_pretrained(
        tmp_path / "relu",
        quantization_config=StochaQuantConfig(bits=4, in_8_bits=["v_proj"] if tied else ["embed_tokens"]),
    )
    with torch.no_grad():  # what it computes is what a model of the dequantized weights computes
        for name, module in model.named_modules():
            if isinstance(module, quantization_stocha.Quantized):
                native.get_submodule(name).weight.copy_(module.dequantized())
    patch(native, StochaConfig(activation="relu"))
    torch.testing.assert_close(model(TOKENS).logits, native(TOKENS).logits, rtol=1e-4, atol=1e-5)
    head = model.get_output_embeddings()
    assert ReadMeter(model).read().lm_head == head.codes.nbytes + head.scale.nbytes, "the tied one is read too"
    model.save_pretrained(tmp_path / "saved")
    again = load_model(str(tmp_path / "saved"))
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    own = getattr(transformers, ARCHITECTURES[model_type].causal_lm).from_pretrained(tmp_path / "saved")
    assert torch.equal(own(TOKENS).logits, model(TOKENS).logits)  # the native class too, once the quantizer is known
    again.save_pretrained(tmp_path / "twice")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("saved", "twice")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert (f"model.{'embed_tokens' if tied else 'layers.0.mlp.up_proj'}.codes" in files[0]) and (
        "lm_head.codes" in files[0]
    ) is not tied


def test_converting_to_bits_writes_what_loading_would_compute(checkpoint, tmp_path: Path) -> None:
    convert(checkpoint(max_shard_size="20KB"), tmp_path / "relu", activation="relu")
    done = convert(tmp_path / "relu", tmp_path / "small", bits=4, in_8_bits=["down_proj"])
    assert done.bits == 4 and done.stocha["history"][-1]["method"] == "quantize" and "LICENSE" in done.files
    assert {"modeling_stocha.py", "quantization_stocha.py", "model.safetensors"} <= set(done.files)
    assert not any("-of-" in name or name.endswith(".index.json") for name in done.files)
    model = load_model(str(tmp_path / "small"))
    loaded = modeling_stocha.StochaLlamaForCausalLM.from_pretrained(
        tmp_path / "relu", quantization_config=StochaQuantConfig(bits=4, in_8_bits=["down_proj"])
    )
    assert torch.equal(model(TOKENS).logits, loaded(TOKENS).logits)
    card = (tmp_path / "small" / "README.md").read_text()
    assert "`down_proj` to 8 bits, all others to 4" in " ".join(card.split()) and "quantization_stocha.py" in card
    changed = convert(tmp_path / "small", tmp_path / "silu", activation="silu")  # what is no weight can still change
    assert "quantization_stocha.py" in changed.files and load_model(str(tmp_path / "silu")).config.hidden_act == "silu"


def test_a_mean_of_bits_puts_what_loses_most_in_8(checkpoint, tmp_path: Path) -> None:
    """The source's down_proj of layer 1 is 4-bit already, so that of layer 0 loses more."""
    native = tiny_model("llama", intermediate_size=64)
    exact = native.model.layers[1].mlp.down_proj
    with torch.no_grad():
        exact.weight.copy_(dequantize(*quantize(exact.weight, 4), 4, exact.weight.shape[1]))
    native.save_pretrained(tmp_path / "source")
    with pytest.raises(StochaError, match=r"bits is 4.4, but v_proj in 8 bits and .* a mean of at least 4.\d+$"):
        convert(tmp_path / "source", tmp_path / "out", bits=4.4)
    with pytest.raises(StochaError, match=r"take 8.5: expected 4 or 8, or fewer names of projections in in_8_bits$"):
        convert(tmp_path / "source", tmp_path / "out", bits=7.9, in_8_bits=PROJECTIONS)
    sizes = [math.prod(part.weight.shape) for name, part in native.named_modules() if name.endswith("_proj")]
    least = 4.5 + 4 * 2 * native.model.layers[0].self_attn.v_proj.weight.numel() / sum(sizes)
    convert(tmp_path / "source", tmp_path / "out", bits=least + 4 * exact.weight.numel() / sum(sizes) + 0.01)
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert entry["in_8_bits"] == ["v_proj", "embed_tokens", "lm_head", "layers.0.mlp.down_proj"]
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert "in groups of 32: `v_proj`, `embed_tokens`, `lm_head`, 1 matrix of single layers to 8 bits, all" in card
    assert "all others to 4; at most 5" in card
    model = load_model(str(tmp_path / "out"))
    assert [layer.mlp.down_proj.bits for layer in model.model.layers] == [8, 4]


def test_a_killed_quantization_goes_on_and_ends_with_the_same_bytes(checkpoint, tmp_path: Path, monkeypatch) -> None:
    source = checkpoint()
    convert(source, tmp_path / "whole", bits=8)
    calls: list[Path] = []
    save = quantizing._save

    def saved(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save(path, tensors)

    monkeypatch.setattr(quantizing, "_save", saved)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", bits=8)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.quantization").exists()
    whole = calls[0].read_bytes()
    calls[0].write_bytes(whole[:1000])
    with pytest.raises(StochaError, match=rf"{calls[0]} cannot be read .*remove it and start again"):
        convert(source, tmp_path / "out", bits=8)
    calls[0].write_bytes(whole)
    convert(source, tmp_path / "out", bits=8)
    assert [path.name for path in calls].count(calls[0].name) == 1
    assert not (tmp_path / ".out.quantization").exists()
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path


@pytest.mark.parametrize("transposed", [False, True])
def test_error_feedback_makes_the_error_in_outputs_smaller(transposed: bool) -> None:
    """Inputs that go together, as a model's do, can make up for each other's rounding."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 96, generator=generator)  # [outputs, inputs]
    x = torch.randn(500, 12, generator=generator) @ torch.randn(12, 96, generator=generator)
    x += 0.1 * torch.randn(500, 96, generator=generator)
    matrix = weight.t() if transposed else weight
    errors = []
    for made in (quantize(matrix, 4), round_with_feedback(matrix, x.T @ x, transposed)):
        again = dequantize(*made, 4, matrix.shape[1])
        errors.append((x @ (again.t() if transposed else again).T - x @ weight.T).norm())
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("model_type", first_is_fast(["llama", "gemma3_text"]))
def test_calibrating_keeps_more_of_what_the_model_computes(model_type: str, checkpoint, text, tmp_path: Path) -> None:
    source = checkpoint(model_type)
    convert(source, tmp_path / "relu", activation="relu")
    convert(tmp_path / "relu", tmp_path / "plain", bits=4)
    done = convert(tmp_path / "relu", tmp_path / "fitted", bits=4, calibrate=str(text), calibrate_tokens=2000)
    assert done.stocha["history"][-1] == {"method": "quantize", "bits": 4, "data": "text.jsonl", "tokens": 2000}
    windows = calibration_windows(str(text), source, 640, 64, seed=1)
    errors = []
    with torch.no_grad():
        expected = load_model(str(tmp_path / "relu"), dtype=torch.float32)(windows).logits
        for name in ("plain", "fitted"):
            errors.append((load_model(str(tmp_path / name), dtype=torch.float32)(windows).logits - expected).norm())
    assert errors[1] < 0.95 * errors[0]


LOAD = """
import json, sys
sys.modules["stocha_hf"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = torch.tensor(json.loads(sys.argv[2]))
print(json.dumps([type(model).__name__, model(tokens).logits.tolist()]))
model.save_pretrained(sys.argv[3])
"""


@pytest.mark.slow
def test_without_stocha_hf_the_folder_loads_by_its_own_code(checkpoint, tmp_path: Path) -> None:
    convert(checkpoint(tie_word_embeddings=True), tmp_path / "small", activation="relu", bits=4)
    done = run_warm(LOAD, tmp_path / "small", TOKENS.tolist(), tmp_path / "saved")
    assert done.returncode == 0, done.stderr
    name, logits = json.loads(done.stdout.splitlines()[-1])
    assert name == "StochaLlamaForCausalLM"
    torch.testing.assert_close(torch.tensor(logits), load_model(str(tmp_path / "small"))(TOKENS).logits)
    for file in ("modeling_stocha.py", "cuts_stocha.py", "quantization_stocha.py", "config.json"):
        assert (tmp_path / "saved" / file).is_file()
    assert torch.equal(
        load_model(str(tmp_path / "saved"))(TOKENS).logits, load_model(str(tmp_path / "small"))(TOKENS).logits
    )


def test_layout_of_projections_that_cut_their_inputs() -> None:
    cut = {"q_proj": (896, 896), "v_proj": (2048, 2048), "up_proj": (4864, 896), "down_proj": (896, 4864)}
    assert Quantization().laid_out({}, 0.0, skips=False).transposed == ()
    assert Quantization().laid_out({}, 0.0, skips=True).transposed == ("down_proj",)
    assert Quantization().laid_out(cut, 0.4, skips=False).transposed == ("up_proj", "v_proj")  # v_proj has 8 bits
    assert Quantization().laid_out(cut, 0.4, skips=True).transposed == ("down_proj", "up_proj", "v_proj")
    assert Quantization().laid_out(cut, 0.6, skips=False).transposed == ("down_proj", "up_proj", "v_proj")


@pytest.mark.parametrize("long_row", [16, 2048])
def test_projections_that_cut_their_inputs_go_on_cutting(
    long_row: int, checkpoint, text, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stocha_hf.quantization.LONG_ROW", long_row)
    convert(checkpoint(), tmp_path / "cut", inputs=0.5, calibrate=str(text), inputs_prefill=True)
    convert(tmp_path / "cut", tmp_path / "small", bits=8)
    model, plain = load_model(str(tmp_path / "small")), load_model(str(tmp_path / "cut"))
    query = model.model.layers[0].self_attn.q_proj
    assert type(query).__name__ == "CutQuantizedLinear" and query.transposed == (long_row == 16)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, quantization_stocha.Quantized):
                plain.get_submodule(name).weight.copy_(module.dequantized())
    torch.testing.assert_close(model(TOKENS).logits, plain(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_publishing_sends_all_files_of_code(checkpoint, tmp_path: Path) -> None:
    convert(checkpoint(), tmp_path / "small", bits=4)
    sent = {
        item.path_in_repo for item in _additions(tmp_path / "small", _publishable(tmp_path / "small"), "user/model")
    }
    assert {"modeling_stocha.py", "cuts_stocha.py", "quantization_stocha.py", "model.safetensors"} <= sent
    settings = json.loads((tmp_path / "small" / "config.json").read_text())
    assert settings["auto_map"]["AutoModelForCausalLM"] == "quantization_stocha.StochaLlamaForCausalLM"


def test_casts_leave_codes_and_scales_alone(checkpoint, tmp_path: Path) -> None:
    convert(checkpoint(dtype=torch.bfloat16), tmp_path / "small", bits=4)
    model = load_model(str(tmp_path / "small"), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model(TOKENS).logits.dtype == torch.bfloat16
    logits = model.to(torch.float32)(TOKENS).logits
    gate = model.model.layers[0].mlp.gate_proj
    assert (gate.codes.dtype, gate.scale.dtype, logits.dtype) == (torch.uint8, torch.int16, torch.float32)
    assert torch.equal(logits, load_model(str(tmp_path / "small"), dtype=torch.float32)(TOKENS).logits)


def test_adapters_are_honoured_and_trained_and_cannot_be_merged(checkpoint, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    convert(checkpoint(), tmp_path / "small", bits=4)
    model = load_model(str(tmp_path / "small"), dtype=torch.float32)
    before = model(TOKENS).logits
    adapted = get_peft_model(model, LoraConfig(target_modules=["down_proj", "q_proj"], r=2, init_lora_weights=False))
    assert not torch.allclose(adapted(TOKENS).logits, before)
    adapted(TOKENS, labels=TOKENS).loss.backward()
    grads = [parameter.grad for name, parameter in adapted.named_parameters() if "lora_B" in name]
    assert len(grads) == 4 and all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    for safe in (False, True):
        with pytest.raises(
            RuntimeError, match="weight is quantized: expected a float weight to merge an adapter into"
        ):
            adapted.merge_and_unload(safe_merge=safe)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"bits": 3}, "bits is 3: expected 4 or 8"),
        ({"bits": True}, "bits is True"),
        ({"in_8_bits": "v_proj"}, "in_8_bits is 'v_proj': expected a list"),
        ({"transposed": [5]}, "transposed is [5]"),
        ({"format": 3}, "format is 3: expected 1 or 2; install a newer stocha_hf"),
        ({"group_size": 64}, "group_size is 64: expected 32"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"colour": "red"}, "the keys ['colour']"),
    ],
)
def test_a_wrong_entry_is_refused_in_one_sentence(entry: dict, words: str) -> None:
    for make in (Quantization.from_dict, lambda given: StochaQuantConfig(**given)):
        with pytest.raises(ValueError, match=re.escape(words)):
            make(entry)


def test_the_public_function_refuses_what_the_command_refuses(checkpoint, tmp_path: Path) -> None:
    for bits in (3, "4", True):
        with pytest.raises(StochaError, match="expected 4 or 8"):
            convert(checkpoint(name=f"source{bits}"), tmp_path / "out", bits=bits)
    assert not (tmp_path / "out").exists()
