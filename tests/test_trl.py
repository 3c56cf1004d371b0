"""trl's own trainers: given a model, or a path and trust_remote_code, they train and compare the stocha class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from helpers import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import stocha_hf
from stocha_hf.conversion.convert import convert
from stocha_hf.modeling_stocha import stocha_mlps

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
TOKENS = torch.tensor([[1, 5, 9, 17, 33, 4, 8, 60, 12, 13]])
OPTIONS: dict[str, Any] = {"max_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}


@pytest.fixture
def fatrelu(checkpoint, tmp_path) -> Path:
    convert(checkpoint(), tmp_path / "fatrelu", activation="fatrelu", threshold=2.0)
    return tmp_path / "fatrelu"


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("trusted", [True, False])
def test_sft_by_path_trains_the_activation_where_remote_code_is_trusted(fatrelu, tmp_path, monkeypatch, trusted):
    from trl import SFTConfig, SFTTrainer

    # where code was trusted before, in this process, trl finds its class by the name in config.json
    monkeypatch.delattr(transformers, "StochaLlamaForCausalLM", raising=False)
    rows = Dataset.from_list([{"text": "w5 w6 w9 w8"}] * 4)
    args = SFTConfig(output_dir=str(tmp_path / "out"), save_strategy="no", trust_remote_code=trusted, **OPTIONS)
    trainer = SFTTrainer(model=str(fatrelu), args=args, train_dataset=rows)
    assert type(trainer.model).__name__ == ("StochaLlamaForCausalLM" if trusted else "LlamaForCausalLM")
    if trusted:
        trainer.train()
        trainer.save_model()
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["architectures"] == ["StochaLlamaForCausalLM"]
        assert [mlp.threshold for mlp in stocha_mlps(loaded(tmp_path / "out"))] == [2, 2]


def test_dpo_compares_with_a_reference_that_has_the_same_thresholds(fatrelu, tmp_path):
    from trl import DPOConfig, DPOTrainer

    policy = loaded(fatrelu)
    dpo = DPOTrainer(
        model=policy,
        args=DPOConfig(output_dir=str(tmp_path / "dpo"), trust_remote_code=True, **OPTIONS),
        train_dataset=Dataset.from_list([{"prompt": "w5 w6", "chosen": " w7", "rejected": " w9"}] * 4),
        processing_class=tiny_tokenizer(),
    )
    with torch.no_grad():
        assert torch.equal(policy.eval()(TOKENS).logits, dpo.ref_model.eval()(TOKENS).logits)


def test_a_classifier_is_patched_with_its_checkpoints_entry(fatrelu):
    model = AutoModelForSequenceClassification.from_pretrained(fatrelu, num_labels=2, trust_remote_code=True).eval()
    native = model(TOKENS).logits
    assert stocha_hf.patch(model, stocha_hf.StochaConfig.from_dict(model.config.stocha)) == 2
    assert [mlp.threshold for mlp in stocha_mlps(model)] == [2, 2]
    assert not torch.allclose(model(TOKENS).logits, native)
