"""LoRA: which runs an adapter can hold, and the full model of an adapter and its base.

An adapter's folder has weights beside those of its base and no entry of its own: users load the base as it is. So the
base must infer with the activation that training ends with, and thresholds must stay.

    check_adapter(args, schedule, model.config.stocha, "smollm2-relu")
    merge_adapter("adapter", "smollm2-relu", None, tokenizer, stocha)     # to adapter/merged
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stocha_hf.checkpoints.metadata import source_metadata
from stocha_hf.cuts import PROJECTIONS
from stocha_hf.errors import StochaError
from stocha_hf.models import load_model
from stocha_hf.publishing import card
from stocha_hf.training.entry import change_entry

LORA_MODULES = [*PROJECTIONS]  # where a recipe names none


def check_adapter(args: Any, schedule: Any, stocha: dict[str, Any], name: str) -> None:
    """Refuse a run whose adapter would not do with its base, `name`, what the run trained it for."""
    if args.threshold_shift or any(phase.sparsity is not None for phase in schedule.phases):
        raise StochaError(
            "use_peft is true with thresholds that training moves, which an adapter cannot hold: expected a schedule "
            "without sparsity and no threshold_shift, or use_peft: false"
        )
    last = schedule.phases[-1].activation
    if stocha["inference"] != last:
        raise StochaError(
            f"{name} infers with {stocha['inference']} but its adapter would be trained for {last}: expected a base "
            f"that infers with {last}; run stocha-convert {name} NEW_BASE --activation {last} and train on NEW_BASE"
        )


def merge_adapter(adapter: str, base: str, revision: str | None, tokenizer: Any, stocha: dict[str, Any]) -> None:
    """Write the full model of an adapter and its base to adapter/merged: an ordinary checkpoint with that entry."""
    from peft import PeftModel

    folder = Path(adapter) / "merged"
    merged = PeftModel.from_pretrained(load_model(base, revision=revision, dtype="auto"), adapter).merge_and_unload()
    change_entry(merged, **stocha)
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card.write_card(folder, metadata=source_metadata(Path(base)))
