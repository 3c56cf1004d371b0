"""A converted folder in fresh processes: natively, with remote code where stocha_hf cannot be imported, and with
stocha_hf.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
from helpers import run_warm
from transformers import AutoModelForCausalLM

from stocha_hf import modeling_stocha
from stocha_hf.conversion.convert import convert

LOAD = """
import hashlib, json, sys
import torch
{before}
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
tokens = torch.tensor([[1, 5, 9, 17, 33, 4, 8, 60]])
for folder in sys.argv[1:]:
{load}
    digest = hashlib.sha256(model(tokens).logits.detach().numpy().tobytes()).hexdigest()
    greedy = model.generate(tokens, max_new_tokens=8, do_sample=False)[0].tolist()
    print(json.dumps([type(model).__name__, digest, greedy]))
"""
WITHOUT_STOCHA = """
sys.modules["stocha_hf"] = None  # any import of it raises ImportError
try:
    import stocha_hf
    raise SystemExit("stocha_hf could be imported")
except ImportError:
    pass
"""
NATIVE = "model = AutoModelForCausalLM.from_pretrained(folder)"
REMOTE = 'model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, device_map="cpu")'


def load(code: str, *folders: Path, before: str = "") -> list[list]:
    """[class name, hash of the logits, greedy tokens] of each folder, loaded by `code` in one fresh process."""
    done = run_warm(LOAD.format(load=textwrap.indent(code, "    "), before=before), *folders)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()[-len(folders) :]]


@pytest.mark.slow
def test_the_three_loads_give_the_same_numbers(checkpoint, tmp_path):
    source, outputs = checkpoint(), [tmp_path / "stocha", tmp_path / "relu"]
    for output in outputs:
        convert(source, output, activation=output.name)
    native = load(NATIVE, *outputs)
    without = load(REMOTE, *outputs, before=WITHOUT_STOCHA)
    installed = load(REMOTE, *outputs, before="import stocha_hf; stocha_hf.patch")
    assert [name for name, *_ in native] == ["LlamaForCausalLM"] * 2
    assert [name for name, *_ in without + installed] == ["StochaLlamaForCausalLM"] * 4
    for stocha, relu, custom_stocha, custom_relu in (native + without, native + installed):
        assert stocha[1:] == custom_stocha[1:] and relu[1:] == custom_relu[1:]
        assert stocha[1] != relu[1]


@pytest.mark.slow
def test_the_remote_class_trains_forces_modes_saves_and_reloads_without_stocha_hf(checkpoint, tmp_path):
    out, saved = tmp_path / "out", tmp_path / "saved"
    convert(checkpoint("mistral"), out)
    use = """
model.train()
first, second = (model(torch.tensor([[1, 5, 9]]), labels=torch.tensor([[1, 5, 9]])) for _ in range(2))
assert not torch.equal(first.logits, second.logits)
first.loss.backward()
model.eval()
with model.stocha_mode("relu"):
    relu = model(torch.tensor([[1, 5, 9]])).logits
assert not torch.equal(relu, model(torch.tensor([[1, 5, 9]])).logits)
bare = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(bare).__name__ == "StochaMistralModel"
"""
    [before] = load(REMOTE + use + f"model.save_pretrained({str(saved)!r})", out, before=WITHOUT_STOCHA)
    assert load(REMOTE, saved, before=WITHOUT_STOCHA) == [before]
    assert load(NATIVE, saved) == [["MistralForCausalLM", *before[1:]]]
    kept = ("architectures", "auto_map", "stocha", "hidden_act", "model_type")
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (out, saved))
    assert {key: first[key] for key in kept} == {key: second[key] for key in kept}
    assert (saved / "modeling_stocha.py").read_bytes() == (out / "modeling_stocha.py").read_bytes()


@pytest.mark.slow
def test_pipeline_and_chat_template_work_on_a_published_folder(checkpoint, tmp_path):
    out = tmp_path / "out"
    convert(checkpoint(), out)
    code = """
generate = pipeline("text-generation", model=folder, trust_remote_code=True)
model = generate.model
reply = generate([{"role": "user", "content": "w9 w17"}], max_new_tokens=4, do_sample=False)[0]["generated_text"]
assert reply[-1]["role"] == "assistant" and reply[-1]["content"], reply
"""
    assert load(code, out)[0][0] == "StochaLlamaForCausalLM"


def test_a_folder_that_the_native_class_saved_is_made_whole_by_converting_it(checkpoint, tmp_path):
    converted, saved, out = (tmp_path / name for name in ("converted", "saved", "out"))
    convert(checkpoint(), converted, activation="fatrelu", threshold=0.1)
    AutoModelForCausalLM.from_pretrained(converted).save_pretrained(saved)
    assert not (saved / "modeling_stocha.py").exists(), "the native class saves no code"
    assert convert(saved, out).stocha["threshold"] == 0.1
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(model).__name__ == "StochaLlamaForCausalLM"


def test_a_config_without_a_stocha_entry_is_refused_by_name(checkpoint):
    with pytest.raises(ValueError, match="run stocha-convert on the model first"):
        modeling_stocha.StochaLlamaForCausalLM.from_pretrained(checkpoint())
