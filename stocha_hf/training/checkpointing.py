"""Checkpoints of a run: what they hold beside weights and trl's state, and which of them is the last whole one.

A checkpoint's sparsity_state.json has the model's `stocha` entry, for which an adapter's folder has no other place,
the sparsity target's controller, the shares that input thresholds are held to, and whether embeddings are trained.
Where thresholds are learned, learned_inputs.pt has what that needs, and the checkpoint's weights are folded
(learned_inputs.py).
CheckpointingTrainer writes both, and restores them when a run resumes or ends with its best checkpoint.
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from trl import SFTTrainer

from stocha_hf.checkpoints.metadata import source_metadata
from stocha_hf.errors import StochaError
from stocha_hf.publishing import card
from stocha_hf.training.callback import ScheduleCallback
from stocha_hf.training.entry import change_entry
from stocha_hf.training.heads import causal_lm

SPARSITY_STATE = "sparsity_state.json"  # in each checkpoint
LEARNED_INPUTS = "learned_inputs.pt"


def sparsity_state(model: Any, steering: ScheduleCallback) -> dict[str, Any]:
    """Return the state of a model, and of the callback that steers its run, as JSON holds it."""
    target, held = steering.target, steering.held
    return {
        "stocha": model.config.stocha,
        "target": target and target.state_dict(),
        "input_shares": held and held.shares,
        "learns_inputs": steering.learned is not None,
    }


def restore(model: Any, steering: ScheduleCallback, state: dict[str, Any]) -> None:
    """Give a model and its callback a checkpoint's state: its activation and thresholds, but this run's history.

    A resumed run's schedule sets what runs at its next step; a run that ends keeps what is restored here.
    """
    history = model.config.stocha.get("history")  # of this run
    change_entry(model, **state["stocha"] | {"history": history})
    if steering.target is not None and state["target"] is not None:  # it may begin with this start
        steering.target.load_state_dict(state["target"])
    if steering.held is not None:
        steering.held.shares = state["input_shares"]
    if steering.learned is not None:
        steering.learned.load_state_dict(state.get("learned_inputs"))


def read_sparsity_state(checkpoint: str) -> dict[str, Any]:
    """Return the state that a checkpoint's folder holds. Raises StochaError where there is none of this version."""
    try:
        state = json.loads((Path(checkpoint) / SPARSITY_STATE).read_text())
        found = {key: state[key] for key in ("stocha", "target", "input_shares")}
        older = {"learns_inputs": False, "train_embeddings": True}  # what versions without these keys did
        return found | {key: state.get(key, done) for key, done in older.items()}
    except (OSError, ValueError, KeyError, TypeError):
        raise StochaError(
            f"{checkpoint} has no {SPARSITY_STATE} of this version, so another program wrote it: expected a "
            "checkpoint of the same recipe; name another output_dir"
        ) from None


def _read_learned(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu")
    except (OSError, RuntimeError, EOFError, UnpicklingError):
        raise StochaError(
            f"{path} is missing or damaged: expected it as the run wrote it; remove {path.parent}, and the same "
            "command goes on from the checkpoint before it"
        ) from None


def last_checkpoint(output: str | Path) -> Path | None:
    """Return the newest checkpoint of a run that was written to its end, where trainer_state.json is the last file."""
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


class CheckpointingTrainer(SFTTrainer):
    """The part of StochaTrainer that writes folders and reads them back."""

    args: Any  # a StochaArguments; transformers types these as what any Trainer may hold
    model: Any
    steering: ScheduleCallback  # of the train() that is running

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, but a run that resumes where all its steps are done takes no other: Trainer would take one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            self.model.train()  # as a step leaves it
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint that could not be written to its end is removed: the one before it stays the last."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        learned = self.steering.learned
        try:
            with learned.folded() if learned is not None else nullcontext():
                if self.accelerator.is_main_process:
                    folder.mkdir(parents=True, exist_ok=True)
                    state = sparsity_state(self.model, self.steering)
                    state["train_embeddings"] = self.args.train_embeddings
                    (folder / SPARSITY_STATE).write_text(json.dumps(state))
                    if learned is not None:
                        torch.save(learned.state_dict(), folder / LEARNED_INPUTS)
                super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and "write" not in str(error):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            raise StochaError(
                f"{folder} could not be written ({str(error).splitlines()[0]}): free space and start again with the "
                f"same command; the last whole checkpoint is {last_checkpoint(self.args.output_dir) or 'none yet'}"
            ) from None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """A tied head once: FSDP gathers it as a tensor of its own, which save_pretrained cannot tell from another."""
        if state_dict is not None:
            tied = causal_lm(self.model).all_tied_weights_keys
            state_dict = {key: tensor for key, tensor in state_dict.items() if key not in tied}
        super()._save(output_dir, state_dict=state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state = read_sparsity_state(resume_from_checkpoint)
        if state["train_embeddings"] != self.args.train_embeddings:
            raise StochaError(
                f"train_embeddings is {str(self.args.train_embeddings).lower()}, which it was not where "
                f"{resume_from_checkpoint} was written: expected the same recipe; name another output_dir"
            )
        if state["learns_inputs"]:
            state["learned_inputs"] = _read_learned(Path(resume_from_checkpoint) / LEARNED_INPUTS)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        restore(self.model, self.steering, state)

    def _load_best_model(self) -> None:
        """The best checkpoint's weights, and with them its activation and thresholds."""
        state = read_sparsity_state(str(self.state.best_model_checkpoint))
        super()._load_best_model()
        restore(self.model, self.steering, state)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """This package's card instead of trl's."""
        if self.accelerator.is_main_process:
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            source = self.model.config._name_or_path  # nothing where training began with random weights
            inherited = source_metadata(Path(source)) if source else {}
            card.write_card(folder, config=self.model.config.to_dict(), metadata=inherited)
