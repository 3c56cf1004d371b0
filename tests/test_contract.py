"""What passes between a published copy of modeling_stocha.py and the installed package: old files go on working."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from helpers import run_warm, tiny_model, tiny_tokenizer

from stocha_hf.decoding.runtime import CONTRACT, for_contract
from stocha_hf.errors import StochaError
from stocha_hf.modeling_stocha import StochaConfig, StochaMLP
from stocha_hf.patching import patch

RELEASED = Path(__file__).parent / "released"
DECODE = """
import sys, warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
    tokens = torch.tensor([[5, 9, 13, 21, 34, 8, 55, 40]])
    with torch.no_grad():
        cache = model(tokens[:, :4]).past_key_values
        steps = [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(4, 8)]
told = [str(warning.message) for warning in caught if "stocha" in str(warning.message)]
file = sys.modules[type(model).__module__].__file__
torch.save({"logits": torch.cat(steps, 1), "told": told, "file": file}, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("released", sorted(path.name for path in RELEASED.glob("*.py")))
def test_a_released_file_decodes_with_this_package_and_warns_at_most_once(released: str, tmp_path: Path) -> None:
    model = tiny_model()
    patch(model, StochaConfig(activation="fatrelu", threshold=[0.05, 0.1]))
    folder = tmp_path / "published"
    model.save_pretrained(folder)
    del model.config.auto_map["AutoConfig"]  # which no file of 0.1 has
    model.config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    shutil.copy(RELEASED / released, folder / "modeling_stocha.py")
    done = run_warm(DECODE, folder, tmp_path / "found.pt")
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    assert Path(found["file"]).read_bytes() == (RELEASED / released).read_bytes()
    with torch.enable_grad():  # the dense path
        expected = model.eval()(torch.tensor([[5, 9, 13, 21, 34, 8, 55, 40]])).logits[:, 4:].detach()
    torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-4)
    assert len(found["told"]) <= 1 and all("renew the file" in told for told in found["told"]), found["told"]


def test_a_contract_that_this_package_does_not_know_is_said_once_and_computed_in_pytorch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert StochaMLP.contract == CONTRACT
    with pytest.raises(StochaError, match="asks for contract 99: expected 1; install a newer stocha_hf"):
        for_contract(99)
    monkeypatch.setattr("stocha_hf.modeling_stocha.CONTRACT", 99)
    monkeypatch.setattr(StochaMLP, "runtime", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = tiny_model()
        patch(model, StochaConfig(activation="relu"))
    assert ["contract 99" in str(warning.message) for warning in caught] == [True]
    native = tiny_model(hidden_act="relu")
    with torch.no_grad():
        tokens = torch.tensor([[5, 9, 13]])
        assert torch.equal(model.eval()(tokens).logits, native(tokens).logits)


@pytest.mark.slow
def test_a_failing_import_inside_the_runtime_is_reported() -> None:
    code = (
        "import sys; sys.modules['stocha_hf.decoding.ops'] = None\n"
        "import stocha_hf, stocha_hf.modeling_stocha as m; from transformers import LlamaConfig, LlamaForCausalLM\n"
        "model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,"
        " num_attention_heads=1)); stocha_hf.patch(model, m.StochaConfig()); print(m.StochaMLP.runtime)"
    )
    done = run_warm(code)
    assert done.stdout.strip() == "None" and "stocha_hf.decoding.ops" in done.stderr, done.stderr
