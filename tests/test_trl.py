"""trl's own trainers: given a model, they train and compare the stocha class; docs/guides/train.md says so.

Given a path they build the class that config.json's `architectures` names, which is the native one, since tools
without remote code go by it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import stocha_hf
from stocha_hf.conversion.convert import convert
from stocha_hf.modeling_stocha import stocha_mlps

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.tensor([[1, 5, 9, 17, 33, 4, 8, 60, 12, 13]])
OPTIONS: dict[str, Any] = {"max_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}


@pytest.fixture
def fatrelu(checkpoint, tmp_path) -> Path:
    convert(checkpoint(), tmp_path / "fatrelu", activation="fatrelu", threshold=2.0)
    return tmp_path / "fatrelu"


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_sft_of_a_model_trains_its_activation_and_saves_a_stocha_checkpoint(fatrelu, tmp_path):
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"text": "w5 w6 w9 w8"}] * 4)
    args = SFTConfig(output_dir=str(tmp_path / "out"), save_strategy="no", **OPTIONS)
    trainer = SFTTrainer(model=loaded(fatrelu), args=args, train_dataset=rows, processing_class=tiny_tokenizer())
    trainer.train()
    trainer.save_model()
    again = loaded(tmp_path / "out")
    assert type(again).__name__ == "StochaLlamaForCausalLM" and [mlp.threshold for mlp in stocha_mlps(again)] == [2, 2]


def test_dpo_compares_with_a_reference_that_has_the_same_thresholds(fatrelu, tmp_path):
    from trl import DPOConfig, DPOTrainer

    policy = loaded(fatrelu)
    dpo = DPOTrainer(
        model=policy,
        ref_model=loaded(fatrelu),
        args=DPOConfig(output_dir=str(tmp_path / "dpo"), **OPTIONS),
        train_dataset=Dataset.from_list([{"prompt": "w5 w6", "chosen": " w7", "rejected": " w9"}] * 4),
        processing_class=tiny_tokenizer(),
    )
    with torch.no_grad():
        assert torch.equal(policy.eval()(TOKENS).logits, dpo.ref_model.eval()(TOKENS).logits)


def test_a_classifier_is_patched_with_its_checkpoints_entry(fatrelu):
    model = AutoModelForSequenceClassification.from_pretrained(fatrelu, num_labels=2).eval()
    native = model(TOKENS).logits
    assert stocha_hf.patch(model, stocha_hf.StochaConfig.from_dict(model.config.stocha)) == 2
    assert [mlp.threshold for mlp in stocha_mlps(model)] == [2, 2]
    assert not torch.allclose(model(TOKENS).logits, native)
