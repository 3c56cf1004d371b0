"""StochaTrainer: trl's SFTTrainer under an activation schedule, with distillation and a sparsity target.

Data, packing, accumulation, DDP, FSDP and checkpoints are trl's and transformers'. What is added here: the schedule
sets the activation, and the thresholds, before each step; ranks draw different noise; logs show activation, p,
sparsity and tokens per second; none of it makes a step wait for the GPU; a loss that is not finite stops the run
before it is saved; a checkpoint that was not written to its end is never resumed from; torch_compile compiles a layer
and not the model. config.json of every checkpoint says what was trained, under `stocha.history`.

run.py reads a recipe's YAML, whose keys arguments.py adds to trl's.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback

from stocha_hf.cuts_stocha import Cutting
from stocha_hf.errors import StochaError
from stocha_hf.models import cutting_everywhere
from stocha_hf.training.answer_tokens import answer_tokens
from stocha_hf.training.arguments import StochaArguments
from stocha_hf.training.callback import ScheduleCallback
from stocha_hf.training.checkpointing import CheckpointingTrainer, last_checkpoint
from stocha_hf.training.compiled_layers import compile_layers, narrow_stream, set_forward
from stocha_hf.training.console import Bar, Lines
from stocha_hf.training.doubts import check_doubts, in_doubt, likeliest
from stocha_hf.training.first_rows import FirstRows
from stocha_hf.training.frozen_embeddings import check_frozen, freeze_embeddings
from stocha_hf.training.heads import causal_lm, open_head
from stocha_hf.training.held_inputs import HeldInputs, check_held, trains_with_cuts
from stocha_hf.training.hidden_error import HiddenError, layer_error
from stocha_hf.training.learned_cut import check_learned
from stocha_hf.training.learned_inputs import LearnedInputs
from stocha_hf.training.losses import IGNORED, token_losses, training_losses
from stocha_hf.training.padding import SEEN, UnmaskedCollator
from stocha_hf.training.schedule import Schedule
from stocha_hf.training.shards import clip_shards, end_forward, steps_on_shards
from stocha_hf.training.some_words import SomeWords, check_some_words, some_words
from stocha_hf.training.thresholds import apply_thresholds, fatrelu_thresholds
from stocha_hf.training.totals import Totals
from stocha_hf.training.uncut_prompts import CUT_AT, WITH_DOUBTS, PromptCollator, check_uncut, prompts_uncut


class StochaTrainer(CheckpointingTrainer):
    """trl's SFTTrainer for a patched model that trains under an activation schedule.

    What it puts on the model and the teacher (hooks, compiled forwards, an open head) stays for the time of train()
    and evaluate() only; the model can be copied, pickled and trained again afterwards. It works on a copy of `args`.

    Args:
        model: a patched model: of load_model, of `stocha_hf.patch`, or loaded with trust_remote_code.
        args: a StochaArguments.
        schedule: which activation runs at which step.
        teacher: a frozen model with the same vocabulary to distil from, or None; it is moved to the trainer's device
            and set to eval mode.
        **kwargs: SFTTrainer's: train_dataset, eval_dataset, processing_class, peft_config, callbacks, ...

    Raises:
        StochaError: from train(), when the loss is not finite or a checkpoint cannot be written; the last whole
            checkpoint stays.
    """

    train_dataset: Any

    def __init__(self, model: Any, args: StochaArguments, *, schedule: Schedule, teacher: Any = None, **kwargs: Any):
        args, use_cache = copy.deepcopy(args), model.config.use_cache
        adapter = model is not causal_lm(model) or kwargs.get("peft_config") is not None
        check_uncut(args, model)
        if args.input_thresholds == "learned":
            check_learned(model, args, adapter)
        elif not adapter:
            check_held(model)
        if not args.train_embeddings:
            check_frozen(adapter)
        if args.distill_vocabulary is not None:
            check_some_words(args.distill_vocabulary, model, *filter(None, [teacher]))
        self.fallback = check_doubts(args.uncut_doubts, model, teacher is not None) if args.uncut_doubts else 0.0
        self.compiled = args.torch_compile
        self.compile_options: dict[str, Any] = {
            "backend": args.torch_compile_backend,
            "mode": args.torch_compile_mode,
        }
        # else accelerate compiles the whole model; it goes by the backend, Trainer by the flag
        args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
        inner = causal_lm(model)
        own_forward = inner.__dict__.get("forward")
        super().__init__(model=model, args=args, **kwargs)
        self.model.config.use_cache = use_cache  # Trainer turns it off, also in what is saved
        self._evaluating_forward = inner.__dict__["forward"]  # trl's; on the model while this trainer runs
        set_forward(inner, own_forward)
        self._fitted = False
        self._cutting = Cutting(0.0)
        self.schedule = schedule
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False).to(self.accelerator.device)
        if args.distill_vocabulary is not None:
            check_some_words(args.distill_vocabulary, self.model)  # once more, with its adapter
        self.words: SomeWords | None = None
        self.hidden_error: HiddenError | None = None
        self.loss_options: dict[str, Any] = {}
        self.likeliest: Any = likeliest
        if self.compiled:
            self.loss_options["token_losses"] = torch.compile(token_losses, **self.compile_options)
            self.likeliest = torch.compile(likeliest, **self.compile_options)
        if teacher is not None:
            self.loss_options |= {"kl_weight": args.distill_weight, "temperature": args.distill_temperature}
        self.finite = torch.ones((), dtype=torch.bool, device=self.accelerator.device)
        self._totals = Totals(self.accelerator.device)
        self.first_batches = FirstRows(
            self.train_dataset, self.data_collator, args.per_device_train_batch_size, self.accelerator.device
        )
        self._flops: int | None = None
        if self.pop_callback(PrinterCallback) or self.pop_callback(ProgressCallback):
            self.add_callback(Bar() if sys.stderr.isatty() and not args.disable_tqdm else Lines())

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting: Any, name: str
    ) -> Any:
        """Trl's, but a model's own answers become the tokens that it wrote."""
        with args.main_process_first():
            dataset = answer_tokens(dataset, processing_class, args.dataset_num_proc)
        dataset = super()._prepare_dataset(dataset, processing_class, args, packing, formatting, name)
        if not any(label != IGNORED for row in dataset for label in row.get("labels", [0])):  # ends at the first one
            raise StochaError(
                f"no row of the {name} data has a token to learn within max_length {args.max_length}: expected "
                "prompts that leave room for their answers; give a greater max_length"
            )
        return dataset

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as Trainer.train does; afterwards the model is as it came, but for its weights and its config."""
        with self._fitted_out(), self._steered(), prompts_uncut(self.model) as self._cutting, ExitStack() as undo:
            if not self.args.train_embeddings:
                undo.callback(freeze_embeddings(self.model))
            if (frequent := self.args.distill_vocabulary) is not None:
                vocabulary = causal_lm(self.model).config.get_text_config().vocab_size
                self.words = some_words(self.train_dataset, frequent, vocabulary, self.args.seed, self.accelerator)
            return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Trainer's, without masks that only hide padding on the right; batches say where inputs are cut, if any."""
        collate = inner = self.data_collator
        if trains_with_cuts(self.model):
            shares = {"whole": self.args.uncut_rows, "doubts": self.args.uncut_doubts}
            inner = PromptCollator(collate, self.args.uncut_prompts, self.args.seed, **shares)
        self.data_collator = UnmaskedCollator(inner)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self._fitted_out(), cutting_everywhere(self.model):
            result = super().evaluation_loop(*args, **kwargs)
        if self.accelerator.is_fsdp2:
            end_forward(self.model)
        return result

    @contextmanager
    def _fitted_out(self) -> Iterator[None]:
        """What speeds a run up and opens the heads, on the model and the teacher while inside; may be nested."""
        if self._fitted:
            yield
            return
        with ExitStack() as undo:
            undo.enter_context(self._unwrapped_at_the_end())
            causal_lm(self.model).forward = self._evaluating_forward
            for part in filter(None, (self.model, self.teacher)):
                undo.callback(narrow_stream(part))
                undo.callback(open_head(part))
                if self.compiled:
                    undo.callback(compile_layers(part, **self.compile_options))
            if self.args.distill_hidden:
                error = torch.compile(layer_error, **self.compile_options) if self.compiled else layer_error
                self.hidden_error = HiddenError(self.model, self.teacher, error)
                undo.callback(self.hidden_error.close)
            self._fitted = True
            try:
                yield
            finally:
                self._fitted = False

    @contextmanager
    def _unwrapped_at_the_end(self) -> Iterator[None]:
        """Take accelerate's autocast, and DDP, off the model at the end; a sharded model stays sharded."""
        parts = {causal_lm(self.model), self.model}
        forwards = [(part, part.__dict__.get("forward")) for part in parts]
        try:
            yield
        finally:
            for part, forward in forwards:
                set_forward(part, forward)
                part.__dict__.pop("_original_forward", None)
            if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                self.model.__dict__.pop("_is_accelerate_prepared", None)
                self.model_wrapped = self.model

    @contextmanager
    def _steered(self) -> Iterator[None]:
        """The schedule's callback, before all others: they see the activation that the step runs."""
        learns = self.args.input_thresholds == "learned"
        self.steering = ScheduleCallback(
            self.model,
            self.schedule,
            accelerator=self.accelerator,
            batches=self.first_batches,
            target=self.args.target_sparsity,
            held=HeldInputs() if self.holds_inputs and not learns else None,
            learned=self._learned_inputs() if learns else None,
        )
        self.callback_handler.callbacks.insert(0, self.steering)
        try:
            yield
        finally:
            self.remove_callback(self.steering)
            self.steering.close()

    def _learned_inputs(self) -> LearnedInputs:
        rates = self.args.input_threshold_rate, self.args.input_factor_rate
        return LearnedInputs(self.model, rates[0], self.accelerator, factor_rate=rates[1])

    @property
    def holds_inputs(self) -> bool:
        """Whether thresholds of inputs follow them: not beside an adapter, whose folder has no place for them."""
        return self.model is causal_lm(self.model) and trains_with_cuts(self.model)

    @property
    def keeps_gathered(self) -> bool:
        """Whether FSDP2 leaves weights whole from a forward to its backward: then also to the step's next one."""
        return self.accelerator.is_fsdp2 and self.accelerator.state.fsdp_plugin.reshard_after_forward is False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The LM loss, in training mixed with distill_weight x KL(teacher || student), plus the error of
        the layers by its weight at this step; a mean over all tokens.
        """
        # num_items_in_batch counts all ranks' tokens, and DDP and FSDP average the ranks' gradients
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        if not model.training:
            with self.accelerator.autocast():
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if num_items_in_batch is not None:  # none where prompts fill all rows: their loss is 0
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        if self.steering.target is not None:
            accumulated = inputs["labels"].numel() * self.current_gradient_accumulation_steps
            self.steering.target.set_tokens(accumulated if num_items_in_batch is None else num_items_in_batch / ranks)
        self._cutting.cut_at, with_doubts = inputs.pop(CUT_AT, None), inputs.pop(WITH_DOUBTS, None)
        seen = inputs.pop(SEEN, inputs.get("attention_mask"))
        seen = torch.ones_like(inputs["labels"]) if seen is None else seen  # none: packed rows
        recording = self.hidden_error.recording() if self.hidden_error else nullcontext()
        options = dict(self.loss_options)
        if self.words is not None:
            options["words"] = self.words.of_step(self.state.global_step, inputs["labels"])
        if with_doubts is not None:
            options["after_teacher"] = functools.partial(self._uncut_doubts, with_doubts, options.get("words"))
        with self.accelerator.autocast(), recording:  # accelerate wraps the student in autocast, but not the teacher
            losses = training_losses(model, self.teacher, inputs, **options)
        cut_at = self._cutting.cut_at
        if self.steering.learned is not None:
            self.steering.learned.count(cut_at if self._cutting.paid_at is None else self._cutting.paid_at)
        loss, tokens, error = losses.loss, losses.tokens, torch.zeros_like(losses.nll)
        if self.hidden_error:
            error = self.hidden_error.mean(seen if cut_at is None else seen * cut_at) * tokens
            loss = loss + self.args.hidden_weight(self.state.global_step, self.state.max_steps) * error
        self._totals.add(losses, error, seen.sum())
        return loss / (tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch / ranks)

    def _uncut_doubts(self, at: torch.Tensor, words: Any, hidden: torch.Tensor, head: Any) -> None:
        """Cut nothing where the teacher is in doubt, at these positions of the batch."""
        softcap = getattr(causal_lm(self.model).config.get_text_config(), "final_logit_softcapping", None)
        doubts = in_doubt(hidden, head, self.fallback, softcap=softcap, words=words, likeliest=self.likeliest)
        cut_at: Any = self._cutting.cut_at
        self._cutting.paid_at = cut_at  # a step in doubt reads before it is known to be one
        self._cutting.cut_at = cut_at & ~(doubts & at)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        made = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.accelerator.is_fsdp2 and self.accelerator.scaler is None and not made:
            steps_on_shards(optimizer)
        return optimizer

    def _clip_grad_norm(self, model: Any) -> Any:
        sharded = self.accelerator.is_fsdp2 and self.accelerator.scaler is None
        norm = clip_shards(model.parameters(), self.args.max_grad_norm) if sharded else None
        return super()._clip_grad_norm(model) if norm is None else norm

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.keeps_gathered and self.args.gradient_accumulation_steps > 1:
            model.set_reshard_after_backward(self.accelerator.sync_gradients)
        try:
            loss = super().training_step(model, *args, **kwargs)
        finally:
            self._cutting.cut_at = self._cutting.paid_at = None  # not before: a checkpointed layer runs again
        self.finite &= loss.isfinite()  # looked at only when something is logged or saved: a look waits for the GPU
        return loss

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_save and self.args.logging_strategy != "no":
            self.control.should_log = True  # what is counted up to here, a resumed run knows from the log alone
        if self.control.should_log or self.control.should_save or self.control.should_evaluate:
            self.check_finite()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def check_finite(self) -> None:
        """Raise StochaError on every rank if a loss since the start was not finite on any of them."""
        if not self.accelerator.gather(self.finite.reshape(1)).all():
            raise StochaError(
                f"the loss is not finite at step {self.state.global_step}: lower learning_rate or set max_grad_norm; "
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
            logs |= self._read_totals() | self.steering.read()
        super().log(logs, start_time)

    def _read_totals(self) -> dict[str, float]:
        """What all ranks trained on since the last log: losses a token, tokens so far, tokens per second."""
        found = self._totals.read(self.accelerator)
        before = next((row["num_tokens"] for row in reversed(self.state.log_history) if "num_tokens" in row), 0)
        self._total_train_tokens = before + found["seen"]  # trl's, which its evaluations log
        read = {"num_tokens": self._total_train_tokens, "tokens_per_second": found["tokens_per_second"]}
        if self.teacher is not None:
            read |= {"lm_loss": found["lm_loss"], "kl": found["kl"]}
        if self.hidden_error:
            read["hidden_error"] = found["hidden_error"]
        if torch.cuda.is_available():
            read["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        return read

    def shift_thresholds(self) -> None:
        """End a run with FATReLU thresholds that meet target_sparsity on the first rows of the training data."""
        with self.accelerator.autocast():
            thresholds = fatrelu_thresholds(self.model, self.first_batches(), self.args.target_sparsity)
        apply_thresholds(self.model, thresholds)
