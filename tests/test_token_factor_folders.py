"""Folders with tokens' own factors of thresholds, converted: they keep them, or leave them out with the cuts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_warm, tiny_model, tiny_tokenizer
from safetensors.torch import load_file
from test_token_factors import TOKENS, factor_model, factors
from transformers import AutoModelForCausalLM

from stocha_hf.checkpoints.inspection import INDEX, read_json
from stocha_hf.conversion.averaging import average
from stocha_hf.conversion.convert import convert
from stocha_hf.conversion.export import export
from stocha_hf.cuts_stocha import cut_projections
from stocha_hf.decoding.structs import is_quantized
from stocha_hf.models import load_model
from stocha_hf.quantization_stocha import StochaQuantConfig

pytestmark = pytest.mark.usefixtures("one_thread")


def saved(folder: Path, model_type: str = "llama", **options: Any) -> Path:
    factor_model(model_type, prefill=True).save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "cut")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def names(folder: Path) -> list[str]:
    return sorted(name for name in tensors(folder) if name.endswith("_token_factor"))


@torch.no_grad()
def logits(folder: Path, **options: Any) -> torch.Tensor:
    return load_model(str(folder), **options).eval()(TOKENS).logits


def of_floats(quantized: Any) -> Any:
    """The model in floats that quantized weights stand for, with the same factors."""
    model = factor_model(prefill=True)
    for name, module in quantized.named_modules():
        if is_quantized(module):
            model.get_submodule(name).weight.data = module.dequantized()
    return model.eval()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantizing_keeps_them_on_loading_and_in_folders(folder: Path, bits: int, tmp_path: Path) -> None:
    loaded = load_model(str(folder), quantization_config=StochaQuantConfig(bits=bits)).eval()
    assert {name: value.tolist() for name, value in factors(loaded).items()} == {
        name: tensors(folder)[name].tolist() for name in names(folder)
    }
    assert all(module.factors for module in cut_projections(loaded))
    with torch.no_grad():
        expected = loaded(TOKENS).logits
        torch.testing.assert_close(expected, of_floats(loaded)(TOKENS).logits, rtol=1e-3, atol=1e-3)
    loaded.save_pretrained(tmp_path / "saved")
    convert(folder, tmp_path / "small", bits=bits)
    assert names(tmp_path / "small") == names(tmp_path / "saved") == names(folder)
    torch.testing.assert_close(logits(tmp_path / "saved"), expected)
    small = logits(tmp_path / "small")
    with torch.no_grad():
        exact = of_floats(load_model(str(tmp_path / "small")))(TOKENS).logits
    torch.testing.assert_close(small, exact, rtol=1e-3, atol=1e-3)
    for module in cut_projections(loaded):
        module.factors = ()
    with torch.no_grad():
        assert not torch.allclose(loaded(TOKENS).logits, expected, atol=0.01)
    torch.save(small, tmp_path / "expected.pt")
    done = run_warm(
        "import sys, torch; sys.modules['stocha_hf'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'small')!r}, trust_remote_code=True).eval()\n"
        f"found = model(torch.tensor({TOKENS.tolist()})).logits\n"
        f"expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        "print(torch.allclose(found, expected, rtol=1e-3, atol=1e-3))\n"
    )
    assert done.stdout.split()[-1] == "True", done.stderr


def test_quantizing_for_a_text_keeps_them(folder: Path, text: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "small", bits=4, calibrate=str(text))
    assert names(tmp_path / "small") == names(folder)
    with torch.no_grad():
        expected = of_floats(load_model(str(tmp_path / "small")))(TOKENS).logits
    torch.testing.assert_close(logits(tmp_path / "small"), expected, rtol=1e-3, atol=1e-3)


def test_copies_with_another_fallback_keep_them(folder: Path, tmp_path: Path) -> None:
    done = convert(folder, tmp_path / "out", inputs_fallback=0.5, inputs_fallback_tokens=4)
    assert done.stocha["inputs"]["token_factors"] is True and done.stocha["inputs"]["fallback"] == 0.5
    before, after = tensors(folder), tensors(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    convert(folder, tmp_path / "half", dtype="float16")
    assert {value.dtype for value in tensors(tmp_path / "half").values()} == {torch.float16}
    assert names(tmp_path / "half") == names(folder)
    assert all(
        getattr(*module.factors).dtype == torch.float16
        for module in cut_projections(load_model(str(tmp_path / "half")))
    )


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"bits": 8}])
def test_taking_the_cuts_off_leaves_them_out(sharded: bool, options: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path / "cut", max_shard_size="20KB" if sharded else "1GB")
    assert (folder / INDEX).exists() == sharded
    convert(folder, tmp_path / "out", inputs=0, **options)
    assert not names(tmp_path / "out")
    native = tiny_model()
    dtype = getattr(torch, options.get("dtype", "float32"))
    found = load_model(str(tmp_path / "out"))
    assert not cut_projections(found) and not factors(found)
    if "bits" in options:
        return
    assert found.state_dict().keys() == native.state_dict().keys()
    for name, value in native.state_dict().items():
        assert torch.equal(found.state_dict()[name], value.to(dtype)), name
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), "by the native class too"
    if sharded:
        index = read_json(tmp_path / "out" / INDEX, "an index")
        files = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
        assert {*index["weight_map"].values()} == files and index["weight_map"].keys() == tensors(
            tmp_path / "out"
        ).keys()
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors(tmp_path / "out").values())


def test_cuts_anew_have_none_unless_they_are_trained(folder: Path, text: Path, tmp_path: Path) -> None:
    uncut = tmp_path / "uncut"
    convert(folder, uncut, inputs=0)
    for options in ({}, {"bits": 4}):
        given: Any = {"inputs": 0.5, "calibrate": str(text), **options}
        for source, out in ((folder, "again"), (uncut, "first")):
            done = convert(source, tmp_path / out, overwrite=True, **given)
            assert not done.stocha["inputs"].get("token_factors") and not names(tmp_path / out)
        assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "first"))


def test_learned_thresholds_anew_have_none(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stocha_hf.conversion import learned_cuts

    learn = learned_cuts.learn_input_cuts
    monkeypatch.setattr(learned_cuts, "learn_input_cuts", lambda *args, **kwargs: learn(*args, steps=2, **kwargs))
    monkeypatch.setattr(learned_cuts, "BATCH", 6)
    convert(folder, tmp_path / "out", inputs=0.5, inputs_allotment="learned", calibrate=str(text))
    assert not names(tmp_path / "out") and torch.isfinite(logits(tmp_path / "out")).all()


def test_an_average_has_the_mean_of_them(folder: Path, tmp_path: Path) -> None:
    other = factor_model(prefill=True)
    for value in other.parameters():
        value.data.mul_(3)
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    average([folder, tmp_path / "other"], tmp_path / "mean")
    before, after = tensors(folder), tensors(tmp_path / "mean")
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], 2 * value)
    load_model(str(tmp_path / "mean"))


def test_exports_without_cuts_leave_them_out(tmp_path: Path, text: Path) -> None:
    pytest.importorskip("gguf")
    folder, uncut = saved(tmp_path / "name", "qwen2"), tmp_path / "uncut" / "name"
    uncut.parent.mkdir()
    convert(folder, uncut, inputs=0)
    for source, where in ((folder, tmp_path), (uncut, uncut.parent)):
        export(source, where / "m.gguf", activation="silu")
        export(source, where / "vllm", format="vllm", activation="silu")
    assert (tmp_path / "m.gguf").read_bytes() == (uncut.parent / "m.gguf").read_bytes()
    assert not names(tmp_path / "vllm")
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "vllm", output_loading_info=True)
    assert not any(info.values())
