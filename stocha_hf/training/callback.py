"""What happens around a training step: before it the schedule's activation and thresholds, after it its sparsity.

StochaTrainer adds this callback to itself; stocha_hf/training/schedule.py says what a schedule is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from stocha_hf.modeling_stocha import ACTIVATIONS, ARCHITECTURES, StochaConfig, set_activation
from stocha_hf.training.schedule import Schedule

if TYPE_CHECKING:
    from stocha_hf.training.trainer import StochaTrainer

UPDATES = 50  # of the thresholds, or of the sparsity target's controller, in a run


class ScheduleCallback(TrainerCallback):
    """Sets the activation before each step, and measures what the logs and the sparsity target need."""

    def __init__(self, trainer: StochaTrainer, schedule: Schedule) -> None:
        self.trainer, self.schedule, self.phase = trainer, schedule, -1
        self.recording: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Every rank starts from the same seed and would draw the same noise; a resumed run restores its own state
        # later.
        torch.manual_seed(args.seed + self.trainer.accelerator.process_index)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self.schedule.at(state.global_step / state.max_steps)
        set_activation(self.trainer.model, now.activation, now.p)
        if now.phase != self.phase:
            self.phase = now.phase
            record_activation(self.trainer.model.config, now.activation, now.p)
            if self.trainer.accelerator.is_main_process:
                print(f"step {state.global_step}/{state.max_steps}: {self.schedule.phases[now.phase]}", flush=True)
        update = max(state.max_steps // UPDATES, 1)
        if now.sparsity is not None and state.global_step % update == 0:
            self.trainer.move_thresholds(now.sparsity)
        every = [max(int(args.logging_steps), 1)] + [update] * (self.trainer.target is not None)
        if any((state.global_step + 1) % steps == 0 for steps in every):
            self.recording = self.trainer.meter.record()
            self.recording.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.recording is not None:
            self.recording.__exit__(None, None, None)
            self.recording = None
            self.report_sparsity(state)
        if control.should_log or control.should_save or control.should_evaluate:
            self.trainer.check_finite()

    def report_sparsity(self, state: Any) -> None:
        trainer, read = self.trainer, self.trainer.meter.read()
        shares = torch.tensor(read["per_layer"], device=trainer.accelerator.device)
        shares = trainer.accelerator.reduce(shares, reduction="mean")
        mean = shares.mean().item()
        _, activation, p, _ = self.schedule.at(max(state.global_step - 1, 0) / state.max_steps)
        metrics = trainer._metrics["train"]
        metrics["sparsity"].append(mean)
        for layer, share in enumerate(shares.tolist()):
            metrics[f"sparsity/layer_{layer:02d}"].append(share)
        metrics[f"activation/{activation}"].append(1.0)
        if not ACTIVATIONS[activation].deterministic:
            metrics["p"].append(p)
        if trainer.target is not None:
            trainer.target.update(state.global_step / state.max_steps, mean)
            metrics["l1_coefficient"].append(trainer.target.coefficient)


def record_activation(config: Any, activation: str, p: float) -> None:
    """Write the activation that training now uses into a model's config, so that whatever is saved says so."""
    row = ARCHITECTURES[config.model_type]
    entry = {key: value for key, value in config.stocha.items() if key != "inference"}
    stocha = StochaConfig.from_dict(entry | {"activation": activation, "p": p}).resolve(config.stocha["base"])
    config.stocha = stocha.to_dict()
    setattr(config, row.act_key, stocha.native_act)
