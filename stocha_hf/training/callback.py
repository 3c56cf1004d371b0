"""What happens around a training step: before it the schedule's activation and thresholds, after it its sparsity.

StochaTrainer adds this callback to itself and gives it what it needs; the callback knows nothing of the trainer. It
owns the meter of the zeros and the target that steers them. training/schedule.py says what a schedule is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from statistics import mean
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from stocha_hf.measurement.sparsity import SparsityMeter
from stocha_hf.modeling_stocha import ACTIVATIONS
from stocha_hf.patching import set_activation
from stocha_hf.training.entry import change_entry, stocha_model
from stocha_hf.training.held_inputs import HeldInputs
from stocha_hf.training.learned_inputs import LearnedInputs
from stocha_hf.training.schedule import Schedule
from stocha_hf.training.sparsity_target import SparsityTarget
from stocha_hf.training.thresholds import apply_thresholds, moved_thresholds

UPDATES = 50  # of the thresholds in a run
STEERINGS = 200  # of the sparsity target's controller in a run, which may have the last fifth of it alone
UPDATE_ROWS = 8  # of training data, on which thresholds are moved
HOLDS = 20  # of input thresholds in a run: inputs drift slowly
TINY = 1e-30  # in the place of a learning rate of 0


class ScheduleCallback(TrainerCallback):
    """Sets the activation before each step, and measures what the logs and the sparsity target need.

    Args:
        model: a patched model, as it will be trained but without accelerate's wrappers.
        schedule: what it runs, step by step.
        accelerator: accelerate's, which averages the shares of zeros over ranks.
        batches: gives the first n rows of the training data as batches of the model's inputs.
        target: the share of zeros to steer to by L1, or None.
        held: the input thresholds to hold to their shares, or None.
        learned: the input thresholds to learn, or None.
    """

    def __init__(
        self,
        model: Any,
        schedule: Schedule,
        *,
        accelerator: Any,
        batches: Callable[[int], Sequence[dict[str, torch.Tensor]]],
        target: float | None = None,
        held: HeldInputs | None = None,
        learned: LearnedInputs | None = None,
    ) -> None:
        self.schedule, self.accelerator, self.batches = schedule, accelerator, batches
        self.meter = SparsityMeter(model)
        self.target = None if target is None else SparsityTarget(model, target)
        self.held, self.learned = held, learned
        self.phase = -1
        self._recording = ExitStack()
        self._measured: defaultdict[str, list[float]] = defaultdict(list)  # since the last log

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Every rank starts from the same seed and would draw the same noise; a resumed run restores its own state
        # later.
        torch.manual_seed(args.seed + self.accelerator.process_index)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        now = self.schedule.at(state.global_step / state.max_steps)
        set_activation(model, now.activation, now.p)
        if now.phase != self.phase:
            self.phase = now.phase
            change_entry(model, activation=now.activation, p=now.p, inference=None)
            if self.accelerator.is_main_process:
                print(f"step {state.global_step}/{state.max_steps}: {self.schedule.phases[now.phase]}", flush=True)
        if now.sparsity is not None and state.global_step % max(state.max_steps // UPDATES, 1) == 0:
            self._move_thresholds(model, now.sparsity)
        if self.held is not None and self.held.shares is None:
            with torch.compiler.set_stance("force_eager"):
                self.held.begin(model, self.batches(UPDATE_ROWS))
        every = [max(int(args.logging_steps), 1)]
        if self.target is not None:
            self.target.resting = ACTIVATIONS[now.activation].cut is None
            every.append(max(state.max_steps // STEERINGS, 1))
        if any((state.global_step + 1) % steps == 0 for steps in every):
            self._recording.enter_context(self.meter.record())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if self.learned is not None:
            self.learned.step(optimizer.param_groups[0]["lr"] / max(args.learning_rate, TINY))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.meter.recording:
            self._recording.close()
            self._measure(state)
        update = max(state.max_steps // HOLDS, 1)
        if self.held is not None and (state.global_step % update == 0 or state.global_step == state.max_steps):
            self._hold_inputs(model, self.held)  # what is saved or evaluated after this step has them

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.learned is not None:
            self.learned.check()

    def _move_thresholds(self, model: Any, sparsity: float) -> None:
        """Move FATReLU thresholds so that a share `sparsity` of the hidden vectors' entries is zero, here and now."""
        with torch.compiler.set_stance("force_eager"):  # what it hooks would compile every layer once more
            thresholds = moved_thresholds(model, self.batches(UPDATE_ROWS), sparsity)
        apply_thresholds(model, thresholds)

    def _hold_inputs(self, model: Any, held: HeldInputs) -> None:
        """Move input thresholds so that each projection cuts its share, here and now, on all ranks alike."""
        with torch.compiler.set_stance("force_eager"):
            found = held.thresholds(model, self.batches(UPDATE_ROWS))
        for module in model.modules():
            if hasattr(module, "reshard"):  # FSDP2 keeps some weights whole until a backward, which does not come
                module.reshard()
        thresholds, before = broadcast_object_list([found])[0]
        change_entry(model, inputs=stocha_model(model).config.stocha["inputs"] | {"thresholds": thresholds})
        self._measured["inputs_cut"].append(before)

    def _measure(self, state: Any) -> None:
        shares = torch.tensor(self.meter.read()["per_layer"], device=self.accelerator.device)
        shares = self.accelerator.reduce(shares, reduction="mean")
        sparsity = shares.mean().item()
        _, activation, p, _ = self.schedule.at(max(state.global_step - 1, 0) / state.max_steps)
        measured = {"sparsity": sparsity, f"activation/{activation}": 1.0}
        measured |= {f"sparsity/layer_{layer:02d}": share for layer, share in enumerate(shares.tolist())}
        if not ACTIVATIONS[activation].deterministic:
            measured["p"] = p
        if self.target is not None and not self.target.resting:
            self.target.update(state.global_step / state.max_steps, sparsity)
            measured["l1_coefficient"] = self.target.coefficient
        for key, value in measured.items():
            self._measured[key].append(value)

    def read(self) -> dict[str, float]:
        """What was measured since the last call, averaged: for a log."""
        read = {key: mean(values) for key, values in self._measured.items()}
        self._measured.clear()
        return read if self.learned is None else read | self.learned.read()

    def close(self) -> None:
        """Take everything off the model; a second call does nothing."""
        self._recording.close()
        self.meter.close()
        if self.target is not None:
            self.target.close()
        if self.learned is not None:
            self.learned.close()
