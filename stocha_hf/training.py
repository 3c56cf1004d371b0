"""StochaTrainer: trl's SFTTrainer under an activation schedule, with distillation and a sparsity target.

Data, packing, the fused LM head, accumulation, DDP, FSDP and checkpoints are trl's and transformers'. What is added
here: the schedule sets the activation before each step; ranks draw different noise; logs show activation, p, sparsity
and tokens per second; a loss that is no number stops the run before it is saved; a checkpoint that was not written to
its end is never resumed from; torch_compile compiles a layer and not the model, so that another activation takes
seconds and not minutes. config.json of every checkpoint says what was trained, under `stocha.history`.

Run through recipes/continued_pretrain.py and recipes/relu_finetune.py; stocha_hf/cli/train.py reads their YAML.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from stocha_hf import report
from stocha_hf.errors import StochaError
from stocha_hf.loss import open_head, token_losses, training_losses
from stocha_hf.modeling_stocha import ACTIVATIONS, ARCHITECTURES, StochaConfig, set_activation, stocha_mlps
from stocha_hf.schedule import Schedule
from stocha_hf.sparsity import SparsityMeter, SparsityTarget
from stocha_hf.thresholds import apply_thresholds, fatrelu_thresholds, moved_thresholds, set_thresholds

THRESHOLD_ROWS = 64  # rows of training data that the final thresholds are chosen on, the same ones on every rank
MODEL_INPUTS = {"input_ids", "attention_mask", "position_ids"}
UPDATE_ROWS = 8  # of these, on which thresholds are moved while training
UPDATES = 50  # of the thresholds, or of the sparsity target's controller, in a run
SPARSITY_STATE = "sparsity_state.json"  # thresholds and the controller of the sparsity target, in each checkpoint


@dataclass
class StochaArguments(SFTConfig):
    """trl's SFTConfig and what this package adds to it. Raises StochaError for contradictions."""

    schedule: str | None = field(
        default=None, metadata={"help": "Phases {activation, p, anneal, until}; see stocha_hf/schedule.py."}
    )
    teacher: str | None = field(
        default=None, metadata={"help": "Model to distil from: Hub id or folder, run with its own activation."}
    )
    distill_weight: float = field(
        default=0.5, metadata={"help": "Share of the KL term in the loss; the rest is the LM loss."}
    )
    distill_temperature: float = field(default=1.0, metadata={"help": "Temperature of the KL term."})
    target_sparsity: float | None = field(
        default=None, metadata={"help": "Share of zeros in the FFN's hidden vector to steer to by progressive L1."}
    )
    threshold_shift: bool = field(
        default=False, metadata={"help": "End with FATReLU thresholds that meet target_sparsity exactly."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every parameter is used; looking for others costs time
        self.logging_nan_inf_filter = False  # it waits for the GPU twice a step; check_finite stops the run
        accelerator: Any = self.accelerator_config
        accelerator.non_blocking = self.dataloader_pin_memory  # else a batch's copy waits for the step before
        if self.use_liger_kernel:
            raise StochaError("use_liger_kernel is true: Liger's FFN computes SiLU only, so leave it out")
        for key in ("distill_weight", "target_sparsity"):
            value = getattr(self, key)
            if value is not None and not 0 <= value <= 1:
                raise StochaError(f"{key} is {value}: expected a number between 0 and 1")
        if self.distill_temperature <= 0:
            raise StochaError(f"distill_temperature is {self.distill_temperature}: expected a number above 0")
        if self.loss_type != "nll" or self.label_smoothing_factor:
            raise StochaError(
                f"loss_type is {self.loss_type!r} and label_smoothing_factor {self.label_smoothing_factor}: expected "
                "'nll' and 0, the next-token loss"
            )
        if self.threshold_shift and self.target_sparsity is None:
            raise StochaError("threshold_shift is true without target_sparsity: expected the share of zeros to meet")
        if self.fp16 and self.target_sparsity is not None:
            raise StochaError("fp16 scales gradients, which target_sparsity does not see: expected bf16 or float32")


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
        if compiled:
            for part in filter(None, (self.model, teacher)):
                compile_layers(part, **options)
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False).to(self.accelerator.device)
        for part in filter(None, (self.model, teacher)):
            open_head(part)
        self.loss_options: dict[str, Any] = {}
        if compiled:
            self.loss_options["token_losses"] = torch.compile(token_losses, **options)
        if teacher is not None:
            self.loss_options |= {"kl_weight": args.distill_weight, "temperature": args.distill_temperature}
        self.meter = SparsityMeter(self.model)
        self.target = None if args.target_sparsity is None else SparsityTarget(self.model, args.target_sparsity)
        self.finite = torch.ones((), dtype=torch.bool, device=self.accelerator.device)
        # since the last log, on the device, so that no step waits for one: nll and kl; tokens with a loss, all tokens
        self._nats = torch.zeros(2, device=self.accelerator.device)
        self._tokens = torch.zeros(2, dtype=torch.int64, device=self.accelerator.device)
        self._last_log = time.monotonic()
        self.add_callback(_ScheduleCallback(self, schedule))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The LM loss, in training mixed with distill_weight x KL(teacher || student); a mean over all tokens."""
        # num_items_in_batch counts all ranks' tokens, and DDP and FSDP average the ranks' gradients
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        if self.target is not None and model.training:
            accumulated = inputs["labels"].numel() * self.current_gradient_accumulation_steps
            self.target.set_tokens(accumulated if num_items_in_batch is None else num_items_in_batch / ranks)
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses = training_losses(model, self.teacher, inputs, **self.loss_options)
        tokens, labels = losses.tokens, inputs["labels"]
        self._nats += torch.stack([losses.nll, losses.kl])
        self._tokens += torch.stack([tokens, inputs.get("attention_mask", torch.ones_like(labels)).sum()])
        return losses.loss / (tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch / ranks)

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._read_sums()
        super().log(logs, start_time)

    def _read_sums(self) -> dict[str, float]:
        """What all ranks trained on since the last log: losses a token, tokens so far, tokens per second."""
        nll, kl = self.accelerator.reduce(self._nats, reduction="sum").tolist()
        tokens, seen = self.accelerator.reduce(self._tokens, reduction="sum").tolist()
        self._nats.zero_()
        self._tokens.zero_()
        self._total_train_tokens += seen
        before, self._last_log = self._last_log, time.monotonic()
        speed = round(seen / (self._last_log - before), 1)
        read = {"num_tokens": self._total_train_tokens, "tokens_per_second": speed}
        if self.teacher is not None:
            read |= {"lm_loss": nll / max(tokens, 1), "kl": kl / max(tokens, 1)}
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
            thresholds = moved_thresholds(self.model, self.first_rows(UPDATE_ROWS), sparsity)
        apply_thresholds(self.model, thresholds)

    def shift_thresholds(self) -> None:
        """End a run with FATReLU thresholds that meet target_sparsity on the first rows of the training data."""
        batches = self.first_rows(THRESHOLD_ROWS)
        apply_thresholds(self.model, fatrelu_thresholds(self.model, batches, self.args.target_sparsity))

    def first_rows(self, count: int) -> list[dict[str, torch.Tensor]]:
        """The first rows of the training data as batches of a model's inputs."""
        rows = list(itertools.islice(iter(self.train_dataset), count))
        size = self.args.per_device_train_batch_size
        batches = [self.data_collator(rows[start : start + size]) for start in range(0, len(rows), size)]
        return [
            {key: batch[key].to(self.accelerator.device) for key in MODEL_INPUTS & set(batch)} for batch in batches
        ]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = json.loads((Path(resume_from_checkpoint) / SPARSITY_STATE).read_text())
        set_thresholds(self.model, state["thresholds"])
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
            source = Path(str(self.model.config._name_or_path))
            card = report.model_card(self.model.config.to_dict(), report.source_metadata(source))
            (folder / "README.md").write_text(card, encoding="utf-8")


class _ScheduleCallback(TrainerCallback):
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


def narrow_stream(model: Any) -> None:
    """Under autocast, run a model's residual stream in autocast's dtype, as inference does, and not in the weights'.

    The float32 embeddings of a model with float32 master weights would make the stream float32: every norm and
    residual addition would move twice the bytes.
    """

    def narrow(module: Any, args: Any, embedded: torch.Tensor) -> torch.Tensor:
        kind = embedded.device.type
        return embedded.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else embedded

    model.get_input_embeddings().register_forward_hook(narrow)


def compile_layers(model: Any, **options: Any) -> None:
    """Compile the decoder layers of a patched model in place, as one function that all of them share.

    `options` are torch.compile's. An activation compiles once (once more where sparsity is recorded) however many
    layers there are: seconds for 30 layers on a GPU, where the whole model took minutes in every phase.
    """
    # one function serves all activations of a schedule, recorded or not, and the teacher
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    mlps = set(stocha_mlps(model))
    for layer in model.modules():
        if mlps & set(layer.children()):
            layer.compile(**options)


def record_activation(config: Any, activation: str, p: float) -> None:
    """Write the activation that training now uses into a model's config, so that whatever is saved says so."""
    row = ARCHITECTURES[config.model_type]
    entry = {key: value for key, value in config.stocha.items() if key != "inference"}
    stocha = StochaConfig.from_dict(entry | {"activation": activation, "p": p}).resolve(config.stocha["base"])
    config.stocha = stocha.to_dict()
    setattr(config, row.act_key, stocha.native_act)


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
