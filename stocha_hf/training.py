"""StochaTrainer: trl's SFTTrainer under an activation schedule, with distillation and a sparsity target.

Data, packing, accumulation, DDP, FSDP and checkpoints are trl's and transformers'. What is added here: the schedule
sets the activation, and the thresholds, before each step; ranks draw different noise; logs show activation, p,
sparsity and tokens per second; no step waits for the GPU; a loss that is no number stops the run before it is saved; a
checkpoint that was not written to its end is never resumed from; torch_compile compiles a layer and not the model.
config.json of every checkpoint says what was trained, under `stocha.history`.

Run through recipes/continued_pretrain.py and recipes/relu_finetune.py; stocha_hf/cli/train.py reads their YAML, whose
keys stocha_hf/training_arguments.py adds to trl's.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from trl import SFTTrainer

from stocha_hf import report
from stocha_hf.compiled_layers import compile_layers, narrow_stream
from stocha_hf.errors import StochaError
from stocha_hf.hidden_states import HiddenError, layer_error
from stocha_hf.loss import open_head, token_losses, training_losses
from stocha_hf.modeling_stocha import stocha_mlps
from stocha_hf.schedule import Schedule
from stocha_hf.schedule_callback import ScheduleCallback
from stocha_hf.sparsity import SparsityMeter, SparsityTarget
from stocha_hf.thresholds import apply_thresholds, fatrelu_thresholds, moved_thresholds
from stocha_hf.training_arguments import StochaArguments

THRESHOLD_ROWS = 64  # rows of training data that the final thresholds are chosen on, the same ones on every rank
MODEL_INPUTS = {"input_ids", "attention_mask", "position_ids"}
UPDATE_ROWS = 8  # of these, on which thresholds are moved while training
SPARSITY_STATE = "sparsity_state.json"  # thresholds and the controller of the sparsity target, in each checkpoint


class StochaTrainer(SFTTrainer):
    """SFTTrainer whose model runs `schedule`; `teacher`, if given, is a frozen model with the same vocabulary.

    `args.target_sparsity` steers the share of zeros by progressive L1 (stocha_hf/sparsity.py). Raises StochaError when
    the loss is no finite number or the disk is full; the last whole checkpoint stays.
    """

    args: Any  # a StochaArguments; transformers types these three as what any Trainer may hold
    model: Any
    train_dataset: Any

    def __init__(self, model: Any, args: StochaArguments, *, schedule: Schedule, teacher: Any = None, **kwargs: Any):
        compiled, use_cache = args.torch_compile, model.config.use_cache
        options: dict[str, Any] = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
        # else accelerate compiles the whole model; it goes by the backend, Trainer by the flag
        args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
        super().__init__(model=model, args=args, **kwargs)
        self.model.config.use_cache = use_cache  # Trainer turns it off, also in what is saved
        for part in filter(None, (self.model, teacher)):
            narrow_stream(part)
            open_head(part)
            if compiled:
                compile_layers(part, **options)
        self.hidden_error = None
        if args.distill_hidden:
            error = torch.compile(layer_error, **options) if compiled else layer_error
            self.hidden_error = HiddenError(self.model, teacher, error)
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False).to(self.accelerator.device)
        self.loss_options: dict[str, Any] = {}
        if compiled:
            self.loss_options["token_losses"] = torch.compile(token_losses, **options)
        if teacher is not None:
            self.loss_options |= {"kl_weight": args.distill_weight, "temperature": args.distill_temperature}
        self.meter = SparsityMeter(self.model)
        self.target = None if args.target_sparsity is None else SparsityTarget(self.model, args.target_sparsity)
        self.finite = torch.ones((), dtype=torch.bool, device=self.accelerator.device)
        # since the last log, on the device, so that no step waits for one: nll, kl and hidden_error, times tokens;
        # tokens with a loss, all tokens
        self._sums = torch.zeros(3, device=self.accelerator.device)
        self._tokens = torch.zeros(2, dtype=torch.int64, device=self.accelerator.device)
        self._flops: int | None = None
        self._last_log = time.monotonic()
        self.add_callback(ScheduleCallback(self, schedule))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The LM loss, in training mixed with distill_weight x KL(teacher || student), plus distill_hidden x
        the error of the layers; a mean over all tokens.
        """
        # num_items_in_batch counts all ranks' tokens, and DDP and FSDP average the ranks' gradients
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        if self.target is not None and model.training:
            accumulated = inputs["labels"].numel() * self.current_gradient_accumulation_steps
            self.target.set_tokens(accumulated if num_items_in_batch is None else num_items_in_batch / ranks)
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        mask = inputs.get("attention_mask")
        seen = torch.ones_like(inputs["labels"]) if mask is None else mask  # no mask: packed rows
        recording = self.hidden_error.recording() if self.hidden_error else contextlib.nullcontext()
        with self.accelerator.autocast(), recording:  # accelerate wraps the student in autocast, but not the teacher
            losses = training_losses(model, self.teacher, inputs, **self.loss_options)
        loss, tokens, error = losses.loss, losses.tokens, torch.zeros_like(losses.nll)
        if self.hidden_error:
            error = self.hidden_error.mean(seen) * tokens
            loss = loss + self.args.distill_hidden * error
        self._sums += torch.stack([losses.nll, losses.kl, error.detach()])
        self._tokens += torch.stack([tokens, seen.sum()])
        return loss / (tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch / ranks)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.finite &= loss.isfinite()  # looked at only when something is logged or saved: a look waits for the GPU
        return loss

    def check_finite(self) -> None:
        """Raise StochaError on every rank where a loss since the start was no number on any of them."""
        if not self.accelerator.gather(self.finite.reshape(1)).all():
            raise StochaError(
                f"the loss is no number at step {self.state.global_step}: lower learning_rate or set max_grad_norm; "
                f"the last good checkpoint is {last_checkpoint(self.args.output_dir) or 'the model it began with'}"
            )

    def floating_point_ops(self, inputs: Any) -> int:
        """Trainer's, but the model's parameters are counted once and not at every step: a tenth of the host's work."""
        tokens = inputs["input_ids"].numel()
        if self._flops is None:
            self._flops = super().floating_point_ops(inputs) // tokens
        return self._flops * tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._read_sums()
        super().log(logs, start_time)

    def _read_sums(self) -> dict[str, float]:
        """What all ranks trained on since the last log: losses a token, tokens so far, tokens per second."""
        nll, kl, error = self.accelerator.reduce(self._sums, reduction="sum").tolist()
        tokens, seen = self.accelerator.reduce(self._tokens, reduction="sum").tolist()
        self._sums.zero_()
        self._tokens.zero_()
        self._total_train_tokens += seen
        before, self._last_log = self._last_log, time.monotonic()
        speed = round(seen / (self._last_log - before), 1)
        read = {"num_tokens": self._total_train_tokens, "tokens_per_second": speed}
        if self.teacher is not None:
            read |= {"lm_loss": nll / max(tokens, 1), "kl": kl / max(tokens, 1)}
        if self.hidden_error:
            read["hidden_error"] = error / max(tokens, 1)
        if torch.cuda.is_available():
            read["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        return read

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint that could not be written to its end is removed: the one before it stays the last."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            if self.accelerator.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / SPARSITY_STATE).write_text(json.dumps(self.sparsity_state()))
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and "write" not in str(error):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            raise StochaError(
                f"{folder} could not be written ({str(error).splitlines()[0]}): free space and start again with the "
                f"same command; the last whole checkpoint is {last_checkpoint(self.args.output_dir) or 'none yet'}"
            ) from None

    def move_thresholds(self, sparsity: float) -> None:
        """Move FATReLU thresholds so that a share `sparsity` of the hidden vectors' entries is zero, here and now."""
        with torch.compiler.set_stance("force_eager"):  # what it hooks would compile every layer once more
            thresholds = moved_thresholds(self.model, self.first_batches(UPDATE_ROWS), sparsity)
        apply_thresholds(self.model, thresholds)

    def shift_thresholds(self) -> None:
        """End a run with FATReLU thresholds that meet target_sparsity on the first rows of the training data."""
        batches = self.first_batches(THRESHOLD_ROWS)
        apply_thresholds(self.model, fatrelu_thresholds(self.model, batches, self.args.target_sparsity))

    @functools.cached_property
    def first_rows(self) -> list[Any]:
        """Of the training data; read once, since a stream would start over each time."""
        return list(itertools.islice(iter(self.train_dataset), THRESHOLD_ROWS))

    def first_batches(self, count: int) -> list[dict[str, torch.Tensor]]:
        """The first rows of the training data as batches of a model's inputs."""
        rows, size = self.first_rows[:count], self.args.per_device_train_batch_size
        batches = [self.data_collator(rows[start : start + size]) for start in range(0, len(rows), size)]
        device = self.accelerator.device
        return [{key: batch[key].to(device) for key in MODEL_INPUTS & set(batch)} for batch in batches]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        stored = Path(resume_from_checkpoint) / SPARSITY_STATE
        if not stored.exists():
            raise StochaError(
                f"{resume_from_checkpoint} has no {SPARSITY_STATE}, so another program wrote it: expected one "
                "of these recipes; name another output_dir"
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = json.loads(stored.read_text())
        if state["thresholds"] != self.sparsity_state()["thresholds"]:  # they were moved
            apply_thresholds(self.model, state["thresholds"])
        if self.target is not None:
            self.target.load_state_dict(state["target"])

    def sparsity_state(self) -> dict[str, Any]:
        thresholds = [mlp.threshold for mlp in stocha_mlps(self.model)]
        return {"thresholds": thresholds, "target": self.target and self.target.state_dict()}

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """This package's card instead of trl's."""
        if self.accelerator.is_main_process:
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            source = self.model.config._name_or_path  # nothing where training began with random weights
            inherited = report.source_metadata(Path(source)) if source else {}
            card = report.model_card(self.model.config.to_dict(), inherited)
            (folder / "README.md").write_text(card, encoding="utf-8")


def last_checkpoint(output: str | Path) -> Path | None:
    """The newest checkpoint of a run that was written to its end: trainer_state.json is the last file of each."""
    found = []
    for folder in Path(output).glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        try:
            state = json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        if step and state.get("global_step") == int(step[1]):
            found.append((int(step[1]), folder))
    return max(found)[1] if found else None
