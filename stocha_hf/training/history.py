"""What a run adds to the history of its model's entry: the data, the schedule and what else decided the weights.

record_run(model, data, args, model_args, schedule)
model.config.stocha["history"][-1]["learning_rate"]
"""

from __future__ import annotations

from typing import Any

from stocha_hf.checkpoints.entry import RANDOM_START, with_stage
from stocha_hf.checkpoints.names import public_name
from stocha_hf.spec import StochaConfig
from stocha_hf.training.entry import change_entry
from stocha_hf.training.held_inputs import trains_with_cuts

THRESHOLDS = {"held": "held to their shares", "learned": "learned with the weights"}


def record_run(model: Any, data: Any, args: Any, model_args: Any, schedule: Any) -> None:
    """Add this run to the history in the model's config."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    stage = {
        "start": None if args.model_config is None else RANDOM_START,
        "dataset": data.dataset and public_name(data.dataset),
        "datasets": data.datasets and {public_name(name): share for name, share in data.datasets.items()},
        "steps": args.max_steps if args.max_steps > 0 else None,
        "epochs": args.num_train_epochs if args.max_steps <= 0 else None,
        "tokens_per_step": rows * args.max_length if args.max_length else None,
        "seed": args.seed,
        "schedule": schedule.to_list(),
        "learning_rate": args.learning_rate,
        "method": "lora" if model_args.use_peft else "full",
        "teacher": args.teacher and public_name(args.teacher),
        "distill_weight": args.distill_weight if args.teacher else None,
        "distill_vocabulary": args.distill_vocabulary,
        "distill_hidden": args.distill_hidden or None,
        "distill_hidden_end": args.distill_hidden_end,
        "train_embeddings": None if args.train_embeddings else False,
        "target_sparsity": args.target_sparsity,
        "uncut_prompts": args.uncut_prompts or None,
        "uncut_rows": args.uncut_rows or None,
        "uncut_doubts": args.uncut_doubts or None,
        "input_thresholds": THRESHOLDS[args.input_thresholds]
        if trains_with_cuts(model) and not model_args.use_peft
        else None,
        "input_factor_rate": args.input_factor_rate or None,
    }
    change_entry(model, history=with_stage(StochaConfig.from_dict(model.config.stocha), stage).history)
