"""The keys that training has beside trl's: schedule, random weights, distillation, a sparsity target.

They stand in a recipe's YAML, or on its command line as --KEY VALUE, together with those of trl's SFTConfig.
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import SFTConfig

from stocha_hf.decoding.prompts import multiplies_bf16
from stocha_hf.errors import StochaError

LEAST = {  # of trl's and transformers' keys, which take any number and fail later
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_length": 2,
    "learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "logging_steps": 0,
    "max_grad_norm": 0,
    "seed": 0,
    "input_threshold_rate": 0,
    "input_factor_rate": 0,
    "distill_vocabulary": 1,
}
DTYPES = ("float32", "bfloat16", "float16", "auto")


@dataclass
class StochaArguments(SFTConfig):
    """trl's SFTConfig and the keys of this package. `bf16` is off by default on a CPU that is slow at it.

    Raises:
        StochaError: for a value out of its range, and for keys that contradict each other.
    """

    # not str | list: trl's parser takes the second type for the command line
    schedule: list[dict[str, Any]] | str | None = field(
        default=None,
        metadata={"help": "Phases {activation, p, sparsity, anneal, until}; see training/schedule.py."},
    )
    model_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "A config.json's keys, to begin with random weights; see training/fresh.py."}
    )
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "Tokenizer of model_config's model."})
    teacher: str | None = field(
        default=None, metadata={"help": "Model to distil from: Hub id or folder, run with its own activation."}
    )
    distill_weight: float = field(
        default=0.5, metadata={"help": "Share of the KL term in the loss; the rest is the LM loss."}
    )
    distill_temperature: float = field(default=1.0, metadata={"help": "Temperature of the KL term."})
    distill_hidden: float = field(
        default=0.0, metadata={"help": "Weight of the error of the residual stream, layer by layer, beside the KL."}
    )
    distill_hidden_end: float | None = field(
        default=None,
        metadata={"help": "That weight at the end, reached in a straight line (default: it stays)."},
    )
    distill_vocabulary: int | None = field(
        default=None,
        metadata={
            "help": "Take the KL over so many of the training text's most frequent words and some of the others, "
            "which are drawn anew each step and stand for all of them (default: over all words)."
        },
    )
    teacher_dtype: str | None = field(
        default=None,
        metadata={"help": "The teacher's dtype (default: bfloat16 with bf16 on a GPU, else the model's)."},
    )
    train_embeddings: bool = field(
        default=True, metadata={"help": "false: embeddings, and a head that is tied to them, stay as they are."}
    )
    uncut_prompts: float = field(
        default=0.0,
        metadata={
            "help": "With inputs cut in training: share of the rows that uncut_rows leaves, with a prompt that is not "
            "cut and has no loss."
        },
    )
    uncut_rows: float = field(
        default=0.0,
        metadata={"help": "With inputs cut in training: share of all rows, that is not cut at all and has a loss."},
    )
    uncut_doubts: float = field(
        default=0.0,
        metadata={
            "help": "With inputs cut in training and a fallback: share of the rows that uncut_rows leaves, not cut "
            "where the teacher's likeliest token has less than the fallback's probability, with a loss there."
        },
    )
    input_thresholds: str = field(
        default="held",
        metadata={
            "help": "With inputs cut in training: `held` to the share that each projection cut at first, or `learned` "
            "with the weights, one for each input, at as many bytes read."
        },
    )
    input_threshold_rate: float = field(
        default=0.01, metadata={"help": "Adam's highest rate on the logarithms of learned input thresholds."}
    )
    input_factor_rate: float = field(
        default=0.0,
        metadata={
            "help": "With learned input thresholds: Adam's highest rate on factors of them that each token gets by "
            "its inputs, so that easy ones read less. 0: a model gets none, and those of a folder stay as they are."
        },
    )
    target_sparsity: float | None = field(
        default=None, metadata={"help": "Share of zeros in the FFN's hidden vector to steer to by progressive L1."}
    )
    threshold_shift: bool = field(
        default=False, metadata={"help": "End with FATReLU thresholds that meet target_sparsity exactly."}
    )

    def __post_init__(self) -> None:
        if getattr(self, "activation_checkpointing", False) is None:
            # one is the other's new name, of transformers 5.22 and later; said here, trl's default makes no warning
            self.activation_checkpointing = self.gradient_checkpointing
        if (self.use_cpu or not torch.accelerator.is_available()) and not multiplies_bf16():
            if self.bf16:
                warnings.warn(
                    "bf16 is true, and float32 is many times faster on this CPU: set bf16: false", stacklevel=3
                )
            elif self.bf16 is None:
                self.bf16 = False  # trl's default is true
        super().__post_init__()
        self._check_numbers()
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every parameter is used; looking for others costs time
        self.logging_nan_inf_filter = False  # it waits for the GPU twice a step; check_finite stops the run
        accelerator: Any = self.accelerator_config
        accelerator.non_blocking = self.dataloader_pin_memory  # else a batch's copy waits for the step before
        self._check_keys()

    def _check_keys(self) -> None:
        """Raise StochaError for a key that a run does not take, or not beside another one."""
        if self.resume_from_checkpoint is not None:
            raise StochaError(
                f"resume_from_checkpoint is {self.resume_from_checkpoint}: expected no such key, since a run goes on "
                "from the last whole checkpoint in output_dir"
            )
        if self.use_liger_kernel:
            raise StochaError("use_liger_kernel is true: Liger's FFN computes SiLU only, so leave it out")
        if not self.distill_temperature > 0:
            raise StochaError(f"distill_temperature is {self.distill_temperature}: expected a number above 0")
        if not self.distill_hidden >= 0 or (self.distill_hidden and self.teacher is None):
            raise StochaError(
                f"distill_hidden is {self.distill_hidden} and teacher {self.teacher}: expected a weight of 0 or more, "
                "and a teacher with it"
            )
        if self.distill_hidden_end is not None and not (self.distill_hidden_end >= 0 and self.distill_hidden):
            raise StochaError(
                f"distill_hidden_end is {self.distill_hidden_end} and distill_hidden {self.distill_hidden}: expected "
                "a weight of 0 or more, and one above 0 that it begins with"
            )
        if self.distill_vocabulary is not None and (self.teacher is None or self.distill_weight != 1):
            raise StochaError(
                f"distill_vocabulary is {self.distill_vocabulary}, teacher {self.teacher} and distill_weight "
                f"{self.distill_weight}: expected a teacher and distill_weight: 1.0, since the next-token loss needs "
                "all words"
            )
        if not self.train_embeddings and self.model_config is not None:
            raise StochaError(
                "train_embeddings is false beside model_config, whose embeddings are random and would stay so: "
                "expected no train_embeddings, or a pretrained model"
            )
        if self.teacher_dtype not in (None, *DTYPES):
            raise StochaError(f"teacher_dtype is {self.teacher_dtype!r}: expected one of {', '.join(DTYPES)}")
        if self.loss_type != "nll" or self.label_smoothing_factor:
            raise StochaError(
                f"loss_type is {self.loss_type!r} and label_smoothing_factor {self.label_smoothing_factor}: expected "
                "'nll' and 0, the next-token loss"
            )
        if self.threshold_shift and (self.target_sparsity is None or self.target_sparsity == 1):
            raise StochaError(
                f"threshold_shift is true and target_sparsity {self.target_sparsity}: expected the share of zeros to "
                "meet, below 1"
            )
        if self.input_thresholds not in ("held", "learned"):
            raise StochaError(f"input_thresholds is {self.input_thresholds!r}: expected 'held' or 'learned'")
        if self.input_factor_rate and self.input_thresholds != "learned":
            raise StochaError(
                f"input_factor_rate is {self.input_factor_rate} and input_thresholds {self.input_thresholds}: "
                "expected input_thresholds: learned, which tokens' factors are learned with"
            )
        if self.input_thresholds == "learned" and self._shards():
            raise StochaError(
                "input_thresholds is learned with FSDP or DeepSpeed, which shard the weights that thresholds are "
                "folded into: expected one process or DDP, or input_thresholds: held"
            )
        if self.fp16 and self.target_sparsity is not None:
            raise StochaError("fp16 scales gradients, which target_sparsity does not see: expected bf16 or float32")

    def _shards(self) -> bool:
        """Whether a launcher or a key asks for FSDP or DeepSpeed."""
        launched = any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("FSDP", "DEEPSPEED"))
        return launched or bool(self.fsdp or self.deepspeed)

    def _check_numbers(self) -> None:
        for key, least in LEAST.items():
            value = getattr(self, key)
            if value is not None and not least <= value < math.inf:
                raise StochaError(f"{key} is {value}: expected a number of at least {least}")
        if self.max_steps < 1 and (self.max_steps != -1 or not self.num_train_epochs > 0):
            raise StochaError(
                f"max_steps is {self.max_steps} and num_train_epochs {self.num_train_epochs}: expected at least one "
                "step, or max_steps: -1 and epochs above 0"
            )
        for key in ("distill_weight", "target_sparsity", "uncut_prompts", "uncut_rows", "uncut_doubts"):
            value = getattr(self, key)
            if value is not None and not 0 <= value <= 1:
                raise StochaError(f"{key} is {value}: expected a number between 0 and 1")

    def hidden_weight(self, step: int, last: int) -> float:
        """Return the weight of the layers' error after `step` of `last` steps."""
        end = self.distill_hidden if self.distill_hidden_end is None else self.distill_hidden_end
        return self.distill_hidden + (end - self.distill_hidden) * step / last

    @property
    def loads_teacher_in(self) -> str | None:
        """The teacher's dtype; None for the model's. Under bf16 a GPU multiplies in bfloat16 whatever it holds."""
        on_gpu = self.bf16 and not self.use_cpu and torch.cuda.is_available()
        return self.teacher_dtype or ("bfloat16" if on_gpu else None)

    @property
    def n_gpu(self) -> int:
        """One: a process that nothing launched would split its batches over all GPUs (DataParallel)."""
        return min(super().n_gpu, 1)
