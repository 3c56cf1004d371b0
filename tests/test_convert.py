"""Conversion: bytes stay, config says what changed, the output is whole or absent, and re-running changes what is
asked.
"""

from __future__ import annotations

import hashlib
import json
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from helpers import BIN, assert_refused, call_command, run_command, run_python
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import stocha_hf
from stocha_hf.checkpoints.architecture import Sizes, expected_tensors
from stocha_hf.checkpoints.staging import staged_folder
from stocha_hf.conversion.convert import convert
from stocha_hf.modeling_stocha import StochaConfig
from stocha_hf.spec import ARCHITECTURES, MODELING_FILE

TOKENS = torch.tensor([[1, 5, 9, 17, 33, 4, 8, 60]])


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def hashes(folder: Path, pattern: str = "*") -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob(pattern) if path.is_file()
    }


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(".*partial*")]


@pytest.mark.parametrize(
    ("model_type", "dtype", "tied", "shards"),
    [
        ("llama", torch.float32, False, "1GB"),
        ("llama", torch.bfloat16, True, "20KB"),
        ("mistral", torch.float16, False, "20KB"),
        ("qwen2", torch.bfloat16, True, "1GB"),
        ("qwen3", torch.float16, False, "1GB"),
        ("gemma2", torch.float32, True, "20KB"),
        ("gemma3_text", torch.bfloat16, True, "1GB"),
    ],
)
def test_converted_folder_has_the_same_bytes_and_keys_and_loads_both_ways(
    checkpoint, tmp_path, model_type, dtype, tied, shards
):
    source = checkpoint(model_type, dtype=dtype, tie_word_embeddings=tied, max_shard_size=shards)
    done = convert(source, tmp_path / "out", p=0.4)
    out, row = tmp_path / "out", ARCHITECTURES[model_type]
    assert hashes(out, "*.safetensors") == hashes(source, "*.safetensors")
    assert (len(hashes(out, "*.safetensors")) > 1) == (shards == "20KB")
    before, after = config_of(source), config_of(out)
    assert {key: after[key] for key in before} == before
    assert after["auto_map"] == {
        "AutoConfig": "modeling_stocha.StochaAutoConfig",
        "AutoModelForCausalLM": f"modeling_stocha.Stocha{row.causal_lm}",
        "AutoModel": f"modeling_stocha.Stocha{row.model}",
    }
    assert after["stocha"]["base"] == after["stocha"]["inference"] == after[row.act_key] == row.act
    assert after["stocha"]["p"] == 0.4 and done.layers == 2 and done.stocha == after["stocha"]
    original, native = AutoModelForCausalLM.from_pretrained(source), AutoModelForCausalLM.from_pretrained(out)
    custom = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(native) is type(original) and type(custom).__name__ == f"Stocha{row.causal_lm}"
    logits = original(TOKENS).logits
    assert native.dtype == custom.dtype == logits.dtype == dtype
    assert torch.equal(native(TOKENS).logits, logits) and torch.equal(custom(TOKENS).logits, logits)


@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_a_relu_checkpoint_gives_the_same_numbers_natively_and_with_remote_code(checkpoint, tmp_path, activation):
    convert(checkpoint(), tmp_path / "out", activation=activation)
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    custom = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(native(TOKENS).logits, custom(TOKENS).logits)
    assert config_of(tmp_path / "out")["hidden_act"] == activation


def test_what_belongs_to_the_model_comes_along_and_what_does_not_stays(checkpoint, tmp_path):
    source = checkpoint()
    wanted = {"USE_POLICY.md": "use", "NOTICE": "notice", "special_tokens_map.json": "{}"}
    unknown = {"notes.txt": "x", "pytorch_model.bin": "pickle", "model.gguf": "GGUF", "remote.py": "raise SystemExit"}
    for name, text in (wanted | unknown).items():
        (source / name).write_text(text)
    for folder, name in (("onnx", "model.onnx"), ("additional_chat_templates", "tool.jinja")):
        (source / folder).mkdir()
        (source / folder / name).write_text("x")
    out = tmp_path / "out"
    files = convert(source, out).files
    expected = {"additional_chat_templates/tool.jinja", "chat_template.jinja", "config.json", "generation_config.json"}
    expected |= {"LICENSE", "README.md", "model.safetensors", "modeling_stocha.py", "tokenizer.json"}
    assert set(files) == expected | {"tokenizer_config.json", *wanted}
    assert (out / "modeling_stocha.py").read_bytes() == MODELING_FILE.read_bytes()
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card and "- en" in card and "library_name: transformers" in card


def test_converting_again_changes_only_what_is_asked(checkpoint, tmp_path):
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    convert(checkpoint(), first, p=0.7, positive="relu", base_model="org/model")
    convert(first, second, p=0.2)
    before, after = config_of(first), config_of(second)
    assert after.pop("stocha") == before.pop("stocha") | {"p": 0.2} and after == before
    convert(second, third, activation="relu")
    entry = config_of(third)["stocha"]
    assert entry == config_of(second)["stocha"] | {"activation": "relu", "inference": "relu"}
    assert entry["source"]["id"] == "org/model" and config_of(third)["hidden_act"] == "relu"
    back = tmp_path / "back"
    convert(third, back, activation="stocha")
    assert config_of(back) == config_of(second)
    assert len({*hashes(first, "*.safetensors").values(), *hashes(back, "*.safetensors").values()}) == 1
    assert "license: apache-2.0" in (back / "README.md").read_text()


def test_overwrite_replaces_a_checkpoint_and_nothing_else(checkpoint, tmp_path):
    source, out = checkpoint(), tmp_path / "out"
    convert(source, out)
    (out / "old.txt").write_text("old")
    assert_refused(call_command("stocha-convert", source, out), "exists", "--overwrite")
    assert call_command("stocha-convert", source, out, "--overwrite", "--p", 0.6).returncode == 0
    assert config_of(out)["stocha"]["p"] == 0.6 and not (out / "old.txt").exists()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    assert_refused(call_command("stocha-convert", source, precious, "--overwrite"), "not a checkpoint folder")
    assert (precious / "thesis.tex").exists() and not leftovers(tmp_path)


def test_the_copy_is_no_link(checkpoint, tmp_path):
    source, out = checkpoint(), tmp_path / "out"
    before = hashes(source)
    convert(source, out)
    for path in out.iterdir():
        path.write_bytes(b"overwritten")
    assert hashes(source) == before


def test_the_command_reports_json(checkpoint, tmp_path):
    done = run_command("stocha-convert", checkpoint(), tmp_path / "out", "--json", "--activation", "relu")
    figures = json.loads(done.stdout)
    assert done.returncode == 0 and figures["layers"] == 2 and figures["output"] == str(tmp_path / "out")
    assert figures["source"] == {"id": "source", "revision": None} and figures["stocha"]["inference"] == "relu"


def test_commands_and_package_import_without_torch():
    code = "import sys, runpy, stocha_hf; stocha_hf.__version__; dir(stocha_hf); print('torch' in sys.modules)"
    assert run_python(code).stdout.split() == ["False"]
    code = f"""
import sys, stocha_hf.cli.convert as convert, stocha_hf.cli.publish as publish
for verb in (convert, publish):
    print("example:" in verb.parser().format_help(), [name for name in {["torch", "transformers"]} if name in
    sys.modules])
"""
    assert run_python(code).stdout.splitlines() == ["True []"] * 2


@pytest.fixture
def large_source(tmp_path) -> Path:
    """96 MB in one file, so that a kill has something to interrupt."""
    folder = tmp_path / "large"
    folder.mkdir()
    config = {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 1, "head_dim": 8, "vocab_size": 8}
    shapes = dict(expected_tensors(Sizes.of(config, "large")))
    tensors = {f"model.{name}": torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    tensors["lm_head.weight"] = tensors.pop("model.lm_head.weight")
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_no_output_or_a_whole_one(large_source, tmp_path):
    out = tmp_path / "out"
    command = [str(BIN / "stocha-convert"), str(large_source), str(out), "--overwrite"]
    start = time.monotonic()
    subprocess.run(command, check=True)
    whole, duration = hashes(out), time.monotonic() - start
    outcomes = set()
    for i in range(11):
        run = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        time.sleep(duration * (i + 1) / 10)
        run.send_signal(signal.SIGKILL)
        outcomes.add(run.wait())
        assert not out.exists() or hashes(out) == whole
    assert -signal.SIGKILL in outcomes
    subprocess.run(command, check=True)
    assert hashes(out) == whole and not leftovers(tmp_path)


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path):
    """The state such a kill leaves: no output, the old one beside a complete new one under hidden names."""
    out = tmp_path / "out"
    old = tmp_path / ".out.partial-0000-old"
    for folder in (old, tmp_path / ".out.partial-0000"):
        folder.mkdir()
    (old / "config.json").write_text("{}")
    with pytest.raises(KeyError), staged_folder(out):
        raise KeyError
    assert (out / "config.json").exists() and not leftovers(tmp_path)


def test_a_running_conversion_is_not_swept_up_by_another(tmp_path):
    out = tmp_path / "out"
    with staged_folder(out) as mine:
        (mine / "file").write_text("mine")
        code = (
            "import sys; from stocha_hf.checkpoints.staging import staged_folder\n"
            "with staged_folder(sys.argv[1], True) as f: pass"
        )
        assert run_python(code, out).returncode == 0
        assert (mine / "file").exists()
        out.rmdir()
    assert (out / "file").read_text() == "mine"


def test_files_are_as_readable_as_the_folder(tmp_path):
    with staged_folder(tmp_path / "out") as folder:
        (folder / "weights").touch(mode=0o600)
    assert (tmp_path / "out/weights").stat().st_mode & 0o666 == (tmp_path / "out").stat().st_mode & 0o666


def test_a_full_disk_is_one_sentence_and_leaves_nothing(large_source, tmp_path):
    """A limit on the size of files stands in for the disk: the kernel refuses the same write() half way through."""
    limit = 20 << 20
    done = subprocess.run(
        [str(BIN / "stocha-convert"), str(large_source), str(tmp_path / "new" / "out")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
    )
    assert_refused(done, "cannot write", "free space")
    assert not (tmp_path / "new").exists()


def test_converting_does_not_read_tensors(large_source, tmp_path):
    """Peak memory stays below the size of the weights (96 MB), whatever their size."""
    code = r"""
import re, sys
from stocha_hf.conversion.convert import convert
convert(sys.argv[1], sys.argv[2])
print(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1], "torch" in sys.modules)
"""
    peak, torch_loaded = run_python(code, large_source, tmp_path / "out").stdout.split()
    assert int(peak) * 1024 < 90e6 and torch_loaded == "False"


def test_in_memory_patch_and_convert_write_the_same_entry(checkpoint, tmp_path):
    source = checkpoint()
    convert(source, tmp_path / "converted", p=0.4)
    model = AutoModelForCausalLM.from_pretrained(source)
    stocha_hf.patch(model, StochaConfig(p=0.4))
    model.save_pretrained(tmp_path / "saved")
    saved, converted = config_of(tmp_path / "saved"), config_of(tmp_path / "converted")
    del converted["stocha"]["source"]
    assert saved == converted
    assert (tmp_path / "saved" / "modeling_stocha.py").read_bytes() == MODELING_FILE.read_bytes()
