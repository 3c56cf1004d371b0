"""Honest failure of stocha-convert: one sentence on stderr, exit status 2, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import assert_refused, run_command
from safetensors.torch import load_file, save_file


def edit_config(**changes):
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def edit_index(change):
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return edit


def rename_tensor(old: str, new: str):
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file({name.replace(old, new): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")

    return edit


def to_fp8(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}, folder / "model.safetensors")


def to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(name: str, keep: int):
    def edit(folder: Path) -> None:
        path = next(folder.glob(name))
        path.write_bytes(path.read_bytes()[:keep])

    return edit


def spoil_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"\xff" * 64 + path.read_bytes()[72:])


def remove(name: str):
    return lambda folder: next(folder.glob(name)).unlink()


def first(weight_map: dict) -> str:
    return next(iter(weight_map))


SOURCES = {
    "a model type outside the table": (edit_config(model_type="gpt2"), ["'gpt2'", "expected", "llama"]),
    "a mixture of experts": (edit_config(model_type="mixtral"), ["'mixtral'", "dense gated"]),
    "no model type": (edit_config(model_type=None), ["None"]),
    "gptq": (edit_config(quantization_config={"quant_method": "gptq"}), ["quantized (gptq)", "original model"]),
    "awq": (edit_config(quantization_config={"quant_method": "awq"}), ["quantized (awq)"]),
    "bitsandbytes": (edit_config(quantization_config={"quant_method": "bitsandbytes"}), ["quantized (bitsandbytes)"]),
    "fp8 by config": (edit_config(quantization_config={"quant_method": "fp8"}), ["quantized (fp8)"]),
    "fp8 by tensors": (to_fp8, ["F8_E4M3", "BF16, F16, F32"]),
    "another activation": (edit_config(hidden_act="gelu_new"), ["'gelu_new'", "expected 'silu'"]),
    "a FFN without gate": (rename_tensor("gate_proj", "fc1"), ["gate_proj", "missing"]),
    "a FFN of another shape": (edit_config(intermediate_size=64), ["[48, 32]", "[64, 32]"]),
    "fewer layers than the config says": (
        edit_config(num_hidden_layers=3),
        ["layers.2.", "missing"],
    ),
    "its own modeling code": (edit_config(auto_map={"AutoModelForCausalLM": "m.X"}), ["its own modeling code"]),
    "pickles only": (to_pickle, ["pytorch_model.bin", "pickle", "safetensors"]),
    "no weights": (remove("model.safetensors"), ["no weights", "expected model.safetensors"]),
    "a truncated file": (
        cut("model.safetensors", -10),
        ["truncated or corrupt", "download it again"],
    ),
    "a file of a few bytes": (cut("model.safetensors", 5), ["truncated or corrupt"]),
    "an empty file": (cut("model.safetensors", 0), ["truncated or corrupt"]),
    "a corrupt header": (spoil_header, ["truncated or corrupt"]),
    "no config": (remove("config.json"), ["config.json does not exist"]),
    "a config that is no JSON": (cut("config.json", 20), ["config.json cannot be read"]),
}
SHARDED = {
    "a missing shard": (remove("model-00002*"), ["model-00002", "which is missing"]),
    "a truncated shard": (cut("model-00002*", -1), ["model-00002", "truncated or corrupt"]),
    "an index that leaves the folder": (
        edit_index(lambda m: m.update({first(m): "../../x"})),
        ["'../../x'", "same folder"],
    ),
    "an index with an absolute path": (edit_index(lambda m: m.update({first(m): "/etc/passwd"})), ["'/etc/passwd'"]),
    "an index of an absent file": (
        edit_index(lambda m: m.update({first(m): "a.safetensors"})),
        ["a.safetensors", "missing"],
    ),
    "an index of an absent tensor": (edit_index(lambda m: m.update(other=m[first(m)])), ["other", "no shard holds"]),
    "an index without a map": (edit_index(lambda m: m.clear()), ["no weight_map"]),
}
ARGUMENTS = {
    "p above 1": (["--p", "1.5"], ["p is 1.5", "between 0 and 1"]),
    "p below 0": (["--p=-0.1"], ["p is -0.1"]),
    "p that is no number": (["--p", "half"], ["'half'"]),
    "p that is not finite": (["--p", "nan"], ["p is nan"]),
    "an unknown activation": (["--activation", "swiglu"], ["'swiglu'", "expected one of stocha"]),
    "an unknown positive side": (["--positive", "gelu"], ["'gelu'", "silu, relu, drawn"]),
    "stochastic inference": (["--inference", "stocha"], ["deterministic"]),
    "topk without k": (["--activation", "topk"], ["k is None"]),
    "an unknown dtype": (["--dtype", "int4"], ["'int4'", "bfloat16"]),
    "a revision of a local folder": (["--revision", "main"], ["--revision main"]),
    "private without a repo": (["--private"], ["--private", "--push-to-hub"]),
    "an unknown option": (["--liger"], ["--liger"]),
}


def assert_nothing_written(folder: Path) -> None:
    assert [path.name for path in folder.iterdir() if path.name != "source"] == []


@pytest.mark.parametrize("case", SOURCES)
def test_source(checkpoint, tmp_path, case):
    spoil, words = SOURCES[case]
    source = checkpoint()
    spoil(source)
    assert_refused(run_command("stocha-convert", source, tmp_path / "out"), *words)
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("case", SHARDED)
def test_sharded_source(checkpoint, tmp_path, case):
    spoil, words = SHARDED[case]
    source = checkpoint(max_shard_size="20KB")
    spoil(source)
    assert_refused(run_command("stocha-convert", source, tmp_path / "out"), *words)
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(checkpoint, tmp_path, case):
    arguments, words = ARGUMENTS[case]
    assert_refused(run_command("stocha-convert", checkpoint(), tmp_path / "out", *arguments), *words)
    assert_nothing_written(tmp_path)


def test_output(checkpoint, tmp_path):
    source = checkpoint()
    (tmp_path / "file").write_text("mine")
    assert_refused(run_command("stocha-convert", source, tmp_path / "file"), "exists")
    assert_refused(run_command("stocha-convert", source, tmp_path / "file", "--overwrite"), "no checkpoint folder")
    assert_refused(
        run_command("stocha-convert", source, tmp_path / "file" / "out"),
        "cannot write",
        "expected a folder with write",
    )
    assert_refused(run_command("stocha-convert", source, "/sys/stocha/out"), "cannot write /sys/stocha/out")
    assert_refused(run_command("stocha-convert", source), "OUTPUT")
    assert (tmp_path / "file").read_text() == "mine"


def test_missing_and_broken_local_sources(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    out = tmp_path / "out"
    assert_refused(run_command("stocha-convert", tmp_path / "absent", out), "does not exist", "Hub id")
    assert_refused(run_command("stocha-convert", tmp_path / "absent.gguf", out), "does not exist")
    assert_refused(run_command("stocha-convert", tmp_path / "broken.gguf", out), "cannot be read as GGUF")
    assert not out.exists()
