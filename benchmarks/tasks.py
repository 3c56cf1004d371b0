"""Ask a model one task twice: by lm-evaluation-harness's own class for transformers, and as stocha-eval does.

The harness (HFLM) loads the folder natively and batches, pads, generates and stops in its own way; the questions and
how answers are judged are the same. So what differs is this package's batching, and for a sparse model its classes:

    python benchmarks/tasks.py SmolLM2-135M-Instruct --task bigbench:winowhy --task-data bigbench-1.0.0.tar.gz
    python benchmarks/tasks.py Qwen2.5-Coder-0.5B-Instruct --task humaneval --batch-size 64
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from stocha_hf.data import load_tokenizer
from stocha_hf.measurement.provenance import circumstances
from stocha_hf.models import load_model, tokenizer_folder
from stocha_hf.tasks.catalogue import CHATS, load_tasks
from stocha_hf.tasks.evaluate import choose, compare_tasks, evaluate_tasks, gathered


def harness(args: argparse.Namespace, tokenizer: Any, device: str) -> Any:
    """The harness's results, with its own class."""
    chat = bool(tokenizer.chat_template)
    parts = load_tasks([args.task], chat, args.task_data)[args.task]
    lm = HFLM(pretrained=args.model, dtype=args.dtype, device=device, batch_size=args.batch_size)
    return gathered(
        evaluate(
            lm,
            parts,
            samples=choose(parts["tasks"], args.limit) if args.limit else None,
            apply_chat_template=chat and args.task in CHATS,
            confirm_run_unsafe_code=True,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder or Hub id")
    parser.add_argument("--task", required=True)
    parser.add_argument("--task-data")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, help="a line is added to this file")
    args = parser.parse_args()
    tokenizer = load_tokenizer(tokenizer_folder(args.model))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    begun = time.monotonic()
    theirs = harness(args, tokenizer, device)
    between = time.monotonic()
    model = load_model(args.model, dtype=getattr(torch, args.dtype)).eval().to(device)
    ours = evaluate_tasks(model, tokenizer, [args.task], limit=args.limit, run_code=True, task_data=args.task_data)
    record = {
        "model": Path(args.model).name,
        "task": args.task,
        "dtype": args.dtype,
        "harness": theirs.to_dict(),
        "ours": ours.to_dict(),
        "difference": [found.to_dict() for found in compare_tasks(ours, theirs)],
        "seconds": {"harness": between - begun, "ours": time.monotonic() - between},
        **circumstances(),
    }
    print(json.dumps(record, indent=1))
    if args.json:
        with args.json.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
