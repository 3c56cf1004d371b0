"""Tasks that models trained from scratch can do: minimal pairs by likelihood, and choices of BIG-bench.

    python benchmarks/pretrain_tasks.py runs/relu-135m-5e-4 runs/silu-135m-5e-4 --task-data bigbench-1.0.0.tar.gz \
        --results runs/tasks.jsonl

A line a model and task: `score` is the share of questions that the model gets right, `right` has a digit for each, in
the same order for every model, so that two models can be compared question by question; the two pairs of a frame
stand side by side. Of a minimal pair (benchmarks/minimal_pairs.py) the right text must have the larger likelihood,
from its first token on; `margins` has the differences in nats: a preference for one alternative raises one of a
frame's two and lowers the other. BIG-bench is asked as stocha-eval asks it, but `--limit` evenly spaced questions of a
task: those that the models in benchmarks/results/ were asked. `chance` is the score of guessing. Started again, it
skips what `results` holds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_records import check_gpu
from lm_eval.evaluator import evaluate
from minimal_pairs import TASKS, pairs

from stocha_hf.data import load_tokenizer
from stocha_hf.models import load_model, tokenizer_folder
from stocha_hf.tasks import local_data
from stocha_hf.tasks.catalogue import load_tasks
from stocha_hf.tasks.evaluate import gathered
from stocha_hf.tasks.harness import HarnessModel
from stocha_hf.tasks.kept import Kept

BIGBENCH = (  # without hyperbaton: of 250 evenly spaced questions all have the answer "a"
    *("winowhy", "strategyqa", "social_iqa", "timedial", "date_understanding"),
    *("logical_deduction", "elementary_math_qa"),
)
Answers = tuple[list[bool], dict[str, Any]]  # of each question whether it is right; and what else a line says


def of_pairs(task: str, count: int, model: Any, tokenizer: Any) -> Answers:
    """Of each pair whether the right text is the more likely one."""
    lm = HarnessModel(model, tokenizer, Kept(), "")
    texts = [text for pair in pairs(task, count) for text in (pair.right, pair.wrong)]
    asked = [(None, [lm.prefix_token_id], lm.tok_encode(text, add_special_tokens=False)) for text in texts]
    found = [likelihood for likelihood, _ in lm._loglikelihood_tokens(asked)]
    margins = [right - wrong for right, wrong in zip(found[::2], found[1::2], strict=True)]
    told = {"chance": 0.5, "margins": [round(margin, 3) for margin in margins]}
    return [margin > 0 for margin in margins], told


def of_bigbench(task: str, limit: int, data: str | None, model: Any, tokenizer: Any) -> Answers:
    """Of each question whether the best choice is the most likely one."""
    name = f"bigbench:{task}"
    parts = load_tasks([name], False, data)[name]
    count = len(parts["tasks"][name].eval_docs)
    asked = [i * count // limit for i in range(limit)] if count > limit else list(range(count))
    lm = HarnessModel(model, tokenizer, Kept(), "")
    found = gathered(evaluate(lm, parts, samples={name: asked}, bootstrap_iters=0)).questions
    values = {number: value for (_, metric, number), value in sorted(found.items()) if metric == "acc"}
    rows = local_data.bigbench(task, data)
    chance = statistics.mean(rows[number]["scores"].count(1.0) / len(rows[number]["scores"]) for number in values)
    return [value == 1 for value in values.values()], {"chance": round(chance, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="checkpoint folders")
    parser.add_argument("--pairs", type=int, default=400, help="of each task of minimal pairs")
    parser.add_argument("--bigbench", nargs="*", default=BIGBENCH, help="its tasks; none without a name")
    parser.add_argument("--limit", type=int, default=250, help="questions of each task of BIG-bench")
    parser.add_argument("--task-data", help="BIG-bench: a folder or archive, as stocha-eval takes it")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, required=True, help="lines are added to this file")
    args = parser.parse_args()
    check_gpu(parser, args.device)
    lines = args.results.read_text().splitlines() if args.results.exists() else []
    held = {(row["model"], row["task"]) for row in map(json.loads, lines)}
    jobs: dict[str, Callable[[Any, Any], Answers]]
    jobs = {task: partial(of_pairs, task, args.pairs) for task in TASKS}
    jobs |= {f"bigbench:{task}": partial(of_bigbench, task, args.limit, args.task_data) for task in args.bigbench}
    for folder in args.models:
        missing = [task for task in jobs if (folder.name, task) not in held]
        if not missing:
            continue
        model = load_model(str(folder), dtype=getattr(torch, args.dtype)).eval().to(args.device)
        tokenizer = load_tokenizer(tokenizer_folder(str(folder)))
        for task in missing:
            begun = time.monotonic()
            right, more = jobs[task](model, tokenizer)
            score = sum(right) / len(right)
            row = {
                "model": folder.name,
                "task": task,
                "score": round(score, 4),
                "stderr": round(math.sqrt(score * (1 - score) / len(right)), 4),
                "questions": len(right),
                "right": "".join(str(int(value)) for value in right),
                **more,
                "dtype": args.dtype,
                "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device,
                "seconds": round(time.monotonic() - begun, 1),
            }
            with args.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print({key: value for key, value in row.items() if key not in ("right", "margins")}, flush=True)


if __name__ == "__main__":
    main()
