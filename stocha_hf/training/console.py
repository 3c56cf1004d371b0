"""What a run prints: one line at each log, with the mean of what the layers measured.

Sparsity layer by layer, and all else that is logged, goes to trackers and into trainer_state.json.
"""

from __future__ import annotations

from typing import Any

from transformers import PrinterCallback, ProgressCallback

SHOWN = {  # key of a log -> how the console says it
    "loss": "loss {:.3f}",
    "lm_loss": "next token {:.3f}",
    "kl": "KL {:.4f}",
    "hidden_error": "layers' error {:.4f}",
    "eval_loss": "evaluation loss {:.3f}",
    "sparsity": "zeros {:.1%}",
    "inputs_cut": "inputs cut {:.1%}",
    "p": "p {:.2f}",
    "learning_rate": "learning rate {:.1e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "peak_memory_gb": "{:.1f} GB",
    "train_loss": "mean loss {:.3f}",
    "train_runtime": "done in {:.0f} s",
}


def line(state: Any, logs: dict[str, Any]) -> str:
    """One log as one line: the step, then what SHOWN names."""
    shown = [text.format(logs[key]) for key, text in SHOWN.items() if key in logs]
    return ", ".join([f"step {state.global_step}/{state.max_steps}: {shown[0]}", *shown[1:]]) if shown else ""


class Lines(PrinterCallback):
    """Prints each log as a line on stdout, on the main process."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and (text := line(state, logs)):
            print(text, flush=True)


class Bar(ProgressCallback):
    """The same above a progress bar, for a terminal."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and (text := line(state, logs)):
            self.training_bar.write(text)
