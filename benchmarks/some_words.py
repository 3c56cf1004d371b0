"""How near `distill_vocabulary` comes to the KL over all words: one JSON line for each number of frequent words.

A student and its teacher read windows of a text; words are counted in the others. For the hidden
states that the student's head sees, the KL over some words and its gradient stand beside those over all, a mean over
`--draws` steps, with a batch's own words among them and without. `cosine` is between the gradients of one draw and of
all words, a mean over draws.

    stocha-convert gemma-3-270m gemma-3-270m-cut --activation gelu_pytorch_tanh --inputs 0.457 --inputs-train \
        --calibrate train.jsonl --calibrate-tokens 2048
    python benchmarks/some_words.py gemma-3-270m-cut gemma-3-270m brown.parquet \
        --json benchmarks/results/some_words.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from stocha_hf.data import text_windows
from stocha_hf.measurement.provenance import circumstances
from stocha_hf.models import load_model
from stocha_hf.training.heads import final_hidden_states, open_head
from stocha_hf.training.losses import Losses, chunked_losses
from stocha_hf.training.some_words import SomeWords, Words


@torch.no_grad()
def hidden_states(model: Any, rows: torch.Tensor) -> torch.Tensor:
    close = open_head(model)
    found = torch.cat([final_hidden_states(model, {"input_ids": row[None]}) for row in rows])
    close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="folder that trains with input cuts, or any other")
    parser.add_argument("teacher")
    parser.add_argument("data")
    parser.add_argument("--frequent", type=int, nargs="+", default=[16384, 32768])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=504)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    teacher, student = load_model(args.teacher, dtype="float32").eval(), load_model(args.student, dtype="float32")
    windows = text_windows(args.data, Path(args.teacher), args.length)
    held_out = torch.zeros(len(windows), dtype=torch.bool)
    held_out[torch.linspace(0, len(windows) - 1, args.windows).long()] = True
    counted, rows = windows[~held_out], windows[held_out]
    counts = torch.bincount(counted.flatten(), minlength=teacher.config.vocab_size)
    taught, hidden = hidden_states(teacher, rows), hidden_states(student.train(), rows).requires_grad_()
    heads = [model.get_output_embeddings().requires_grad_(False) for model in (student, teacher)]

    def measured(words: Words | None) -> tuple[Losses, torch.Tensor]:
        chunk = 256 if words is None else 1024
        losses = chunked_losses(hidden, heads[0], taught, heads[1], rows, kl_weight=1.0, chunk=chunk, words=words)
        return losses, torch.autograd.grad(losses.loss, hidden)[0]

    whole, expected = measured(None)
    for frequent in args.frequent:
        chooser = SomeWords(counts, frequent, seed=0)
        row: dict[str, Any] = {
            "student": Path(args.student).name,
            "teacher": Path(args.teacher).name,
            "data": Path(args.data).name,
            "tokens": int(whole.tokens),
            "counted": counted.numel(),
            "vocabulary": len(counts),
            "frequent": frequent,
            "others": chooser.taken,
            "share": torch.isin(rows[:, 1:], chooser.frequent).double().mean().item(),
            "kl": (whole.kl / whole.tokens).item(),
            "draws": args.draws,
        }
        for name, labels in (("own words", rows), ("draws alone", torch.full((1,), -100))):
            found = [measured(chooser.of_step(step, labels)) for step in range(args.draws)]
            row[name] = {
                "kl": mean((losses.kl / losses.tokens).item() for losses, _ in found),
                "cosine": mean(torch.cosine_similarity(g.flatten(), expected.flatten(), 0).item() for _, g in found),
            }
        row |= circumstances()
        print(json.dumps(row), flush=True)
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
