"""Training runs on a tiny model in this process: options, the run, and the losses it logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from stocha_hf.training.run import parse
from stocha_hf.training.run import run as run_training

STOCHA_FT = "[{activation: stocha, p: [0.5, 0.1], until: 0.5}, {activation: relu, until: 1.0}]"
RELU = "[{activation: relu, until: 1.0}]"
SILU = "[{activation: silu, until: 1.0}]"
TOKENS = torch.tensor([[1, 5, 9, 17, 33, 4, 8, 60]])


def arguments(base: Path, text: Path, output: Path, **changes: Any) -> list[str]:
    options = {
        "model_name_or_path": base,
        "dataset": text,
        "output_dir": output,
        "schedule": STOCHA_FT,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "max_length": 32,
        "packing": True,
        "packing_strategy": "wrapped",
        "learning_rate": 1e-3,
        "logging_steps": 2,
        "save_steps": 4,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return [word for key, value in (options | changes).items() for word in (f"--{key}", str(value))]


def run(base: Path, text: Path, output: Path, **changes: Any) -> list[dict[str, float]]:
    """Train in this process; returns the log history."""
    run_training(*parse(arguments(base, text, output, **changes), None))
    return json.loads((output / f"checkpoint-{changes.get('max_steps', 8)}" / "trainer_state.json").read_text())[
        "log_history"
    ]


def losses(history: list[dict[str, float]]) -> list[float]:
    return [entry["loss"] for entry in history if "loss" in entry]
