"""Noise of the activation against temperature, on a model that was trained with that noise to the end.

    python benchmarks/pretrain_noise.py runs/stocha70-again-1e-3-s1 --p 0.7 --judge runs/relu-again-1e-3-s1 \
        --prompts text/docs-test.parquet text/code-test.parquet --results benchmarks/results/pretrain_noise.jsonl

The prompts are the first 32 tokens of evenly spaced windows of held-out text. Without noise the model runs the mean of
StochA, under which its loss is least. A line a way of decoding: how likely its samples are, in nats a token, under
that and under a model that was trained apart (`judge`), which has no share in either noise; how diverse they are,
within each prompt (stocha_hf/measurement/diversity.py). Started again, it skips the ways that `results` holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from gpu_records import check_gpu
from transformers import AutoTokenizer

from stocha_hf.data import text_windows
from stocha_hf.measurement.diversity import check_sacrebleu, distinct, self_bleu
from stocha_hf.measurement.sampling import generate, log_likelihoods
from stocha_hf.models import load_model

LENGTH = 1024  # of the windows
WAYS: list[dict[str, float]] = [  # in an order that leaves both curves whole wherever it stops
    {},
    {"p": 0.7},
    {"temperature": 0.5},
    {"p": 0.9},
    {"temperature": 0.3},
    {"p": 0.5},
    {"temperature": 0.7},
    {"p": 0.97},
    {"temperature": 0.2},
    {"p": 0.3},
    {"temperature": 1.0},
]


def prompts(files: list[str], tokenizer: Path, each: int, length: int) -> list[list[int]]:
    found = []
    for name in files:
        windows = text_windows(name, tokenizer, LENGTH)
        found += windows[:: max(len(windows) // each, 1)][:each, :length].tolist()
    return found


def measured(model: Any, judge: Any, tokenizer: Any, given: list[list[int]], way: dict[str, float], args: Any) -> dict:
    rows = []
    for i, prompt in enumerate(given):
        with model.stocha_mode("mean", args.p):
            samples = generate(model, prompt, samples=args.samples, new=args.new, seed=args.seed + i, **way)
            own = log_likelihoods(model, prompt, samples)
        row = {"own": own, "judge": log_likelihoods(judge, prompt, samples)}
        row = {f"log_likelihood_{name}": statistics.mean(values) for name, values in row.items()}
        row |= {f"distinct_{n}": distinct(samples, n) for n in (1, 2, 3)}
        rows.append(row | {"self_bleu": self_bleu(tokenizer.batch_decode(samples, skip_special_tokens=True))})
    return {key: statistics.mean(row[key] for row in rows) for key in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--p", type=float, required=True, help="of the StochA that it was trained with")
    parser.add_argument("--judge", type=Path, required=True, help="checkpoint folder with the same tokenizer")
    parser.add_argument("--prompts", nargs="+", required=True, help="files of held-out text")
    parser.add_argument("--each", type=int, default=8, help="prompts of each file")
    parser.add_argument("--length", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new", type=int, default=48, help="tokens of a sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, required=True, help="lines are added to this file")
    args = parser.parse_args()
    check_gpu(parser, args.device)
    check_sacrebleu()
    model, judge = (load_model(str(f), dtype=torch.float32).eval().to(args.device) for f in (args.model, args.judge))
    given = prompts(args.prompts, args.model, args.each, args.length)
    told = {"model": args.model.name, "judge": args.judge.name, "trained_p": args.p, "prompts": len(given)}
    told |= {key: getattr(args, key) for key in ("length", "samples", "new", "seed", "device")}
    held = [json.loads(line)["way"] for line in args.results.read_text().splitlines()] if args.results.exists() else []
    for way in WAYS:
        if way in held:
            continue
        start = time.monotonic()
        figures = measured(model, judge, AutoTokenizer.from_pretrained(args.model), given, way, args)
        row = {"way": way, **figures, **told, "seconds": round(time.monotonic() - start, 1)}
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(way, {key: round(value, 3) for key, value in figures.items()}, flush=True)


if __name__ == "__main__":
    main()
