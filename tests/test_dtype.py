"""Conversion to another dtype: the values are torch's, config.json says so, and nothing else differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_refused, call_command, run_python
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stocha_hf.checkpoints.inspection import INDEX, SINGLE
from stocha_hf.checkpoints.tensors import Tensors
from stocha_hf.conversion.convert import convert
from stocha_hf.errors import StochaError
from stocha_hf.measurement.selection.learned import learn_input_cuts
from stocha_hf.models import load_model

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.tensor([[1, 5, 9, 17, 33, 4, 8, 60]])
GATE = "model.layers.1.mlp.gate_proj.weight"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_cast(found: Path, plain: Path, dtype: torch.dtype) -> None:
    """`found` is `plain` in another dtype, tensor by tensor as torch casts it."""
    cast, expected = tensors_of(found), tensors_of(plain)
    assert cast.keys() == expected.keys() and {value.dtype for value in cast.values()} == {dtype}
    assert all(torch.equal(value, expected[name].to(dtype)) for name, value in cast.items())
    before, after = config_of(plain), config_of(found)
    assert after.pop("dtype") == str(dtype).removeprefix("torch.")
    before.pop("dtype")
    assert after == before


@pytest.mark.parametrize(
    ("model_type", "stored", "dtype", "shards"),
    [
        ("llama", torch.float32, "bfloat16", "20KB"),
        ("qwen2", torch.float32, "float16", "1GB"),
        ("gemma3_text", torch.bfloat16, "float32", "20KB"),
        ("mistral", torch.float16, "bfloat16", "1GB"),
    ],
)
def test_weights_are_cast_as_torch_does_and_all_else_stays(checkpoint, tmp_path, model_type, stored, dtype, shards):
    source, plain, out = (
        checkpoint(model_type, dtype=stored, max_shard_size=shards),
        tmp_path / "plain",
        tmp_path / "o",
    )
    before = contents(source)
    convert(source, plain, p=0.4)
    done = convert(source, out, p=0.4, dtype=dtype)
    assert contents(source) == before
    assert_cast(out, plain, getattr(torch, dtype))
    expected, found = contents(plain), contents(out)
    assert expected.keys() == found.keys() == set(done.files)
    weights = {name for name in expected if name.endswith(".safetensors")}
    changed = {name for name in expected if found[name] != expected[name]}
    assert changed == weights | {"config.json"} | ({INDEX} if shards == "20KB" else set())
    if shards == "20KB":
        index, told = (json.loads((folder / INDEX).read_text()) for folder in (out, plain))
        assert index["weight_map"] == told["weight_map"] and len(set(index["weight_map"].values())) > 1
        assert index["metadata"].pop("total_size") == sum(value.nbytes for value in tensors_of(out).values())
        told["metadata"].pop("total_size")
        assert index["metadata"] == told["metadata"]
    logits = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))(TOKENS).logits
    for remote in (False, True):
        model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=remote)
        assert model.dtype == getattr(torch, dtype) and torch.equal(model(TOKENS).logits, logits)


def test_the_command_casts_a_converted_folder_and_keeps_its_entry(checkpoint, tmp_path):
    convert(checkpoint(), tmp_path / "run", activation="fatrelu", threshold=[0.1, 0.2])
    done = call_command("stocha-convert", tmp_path / "run", tmp_path / "out", "--dtype", "bfloat16", "--json")
    assert done.returncode == 0, done.stderr
    assert_cast(tmp_path / "out", tmp_path / "run", torch.bfloat16)
    assert (tmp_path / "out" / SINGLE).stat().st_size < 0.6 * (tmp_path / "run" / SINGLE).stat().st_size


@pytest.mark.parametrize("keys", [(), ("dtype",), ("torch_dtype",), ("torch_dtype", "dtype")])
def test_config_names_the_dtype_by_the_keys_that_it_has(checkpoint, tmp_path, keys):
    source = checkpoint()
    config = {key: value for key, value in config_of(source).items() if key != "dtype"}
    (source / "config.json").write_text(json.dumps(config | dict.fromkeys(keys, "float32")))
    convert(source, tmp_path / "out", dtype="bfloat16")
    found = config_of(tmp_path / "out")
    assert {key: found[key] for key in ("dtype", "torch_dtype") if key in found} == dict.fromkeys(
        keys or ("dtype",), "bfloat16"
    )


def test_the_dtype_that_is_there_copies_bytes_without_torch(checkpoint, tmp_path):
    source = checkpoint(dtype=torch.bfloat16, max_shard_size="20KB")
    convert(source, tmp_path / "plain")
    code = """
import sys
from stocha_hf.conversion.convert import convert
convert(sys.argv[1], sys.argv[2], dtype="bfloat16")
print("torch" in sys.modules)
"""
    assert run_python(code, source, tmp_path / "out").stdout.split() == ["False"]
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_a_value_that_the_dtype_cannot_hold_is_refused_by_name(checkpoint, tmp_path):
    source = checkpoint()
    Tensors(source).overwrite(GATE, torch.full((48, 32), 1e5))
    done = call_command("stocha-convert", source, tmp_path / "out", "--dtype", "float16")
    assert_refused(done, f"{GATE} of source has values that are not finite in float16", "choose another dtype")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    convert(source, tmp_path / "out", dtype="bfloat16")
    convert(source, tmp_path / "plain")
    assert_cast(tmp_path / "out", tmp_path / "plain", torch.bfloat16)


def test_other_tensors_of_any_shape_are_cast_too(checkpoint, tmp_path):
    source = checkpoint()
    more = {"v_head.scale": torch.tensor(1.7), "v_head.none": torch.zeros(0, 4)}
    save_file(load_file(source / SINGLE) | more, source / SINGLE, {"format": "pt"})
    convert(source, tmp_path / "out", dtype="float16")
    convert(source, tmp_path / "plain")
    assert_cast(tmp_path / "out", tmp_path / "plain", torch.float16)


def test_what_is_fitted_is_rounded_once(checkpoint, text, tmp_path, monkeypatch):
    """A refit and learned thresholds compute as without a dtype, and write what they found in it."""
    monkeypatch.setattr(learn_input_cuts, "__kwdefaults__", learn_input_cuts.__kwdefaults__ | {"steps": 3})
    source = checkpoint()
    asked: list[dict[str, Any]] = [
        {"refit": text, "refit_tokens": 512, "target_sparsity": 0.8},
        {"inputs": 0.5, "inputs_allotment": "learned", "calibrate": text},
        {"inputs": 0.5, "calibrate": text},
    ]
    for index, options in enumerate(asked):
        plain, out = tmp_path / f"plain{index}", tmp_path / f"out{index}"
        convert(source, plain, **options)
        convert(source, out, dtype="bfloat16", **options)
        assert_cast(out, plain, torch.bfloat16)


def test_a_fitted_value_that_the_dtype_cannot_hold_is_refused_by_name(checkpoint):
    tensors = Tensors(checkpoint(dtype=torch.float16))
    for value in (1e5, -1e5, float("nan")):
        with pytest.raises(StochaError, match=f"{GATE} has values that are not finite in float16"):
            tensors.overwrite(GATE, torch.zeros(48, 32).index_fill(1, torch.tensor([3]), value))


def test_with_bits_codes_stay_and_the_rest_is_cast(checkpoint, text, tmp_path):
    source = checkpoint()
    for index, options in enumerate(({"bits": 8}, {"bits": 4, "calibrate": text, "calibrate_tokens": 512})):
        plain, out = tmp_path / f"plain{index}", tmp_path / f"out{index}"
        convert(source, plain, **options)
        convert(source, out, dtype="bfloat16", **options)
        before, after = tensors_of(plain), tensors_of(out)
        changed = {name for name in before if before[name].dtype != after[name].dtype}
        assert changed == {name for name in before if before[name].dtype == torch.float32} and changed
        assert all(torch.equal(after[name], value.to(after[name].dtype)) for name, value in before.items())
        assert config_of(out) == config_of(plain) | {"dtype": "bfloat16"}
        assert load_model(str(out), dtype="auto").dtype == torch.bfloat16


def test_a_quantized_source_is_refused_in_a_sentence(checkpoint, tmp_path):
    convert(checkpoint(), tmp_path / "small", bits=4)
    done = call_command("stocha-convert", tmp_path / "small", tmp_path / "out", "--dtype", "bfloat16")
    assert_refused(done, "small is quantized to 4 bits: expected bf16, fp16 or fp32 weights for dtype bfloat16")
    convert(tmp_path / "small", tmp_path / "out")
    assert tensors_of(tmp_path / "out").keys() == tensors_of(tmp_path / "small").keys()


def test_a_dtype_that_is_none_is_refused(checkpoint, tmp_path):
    with pytest.raises(StochaError, match="dtype is 'int8': expected one of bfloat16, float16, float32"):
        convert(checkpoint(), tmp_path / "out", dtype="int8")
