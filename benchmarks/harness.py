"""Run lm-evaluation-harness on stocha checkpoints, without any adapter, and put its figures beside evaluate()'s.

The task is local: a YAML and a jsonl of documents cut from DATA, each of --length tokens and shorter than the
model's context, so that the harness's rolling log-likelihood is one pass a document: each token given those before it,
the first given the tokenizer's BOS (or EOS) token. evaluate() reads the same tokens as windows. Each model is loaded
natively and with trust_remote_code, by the harness in an environment of its own that has no stocha_hf:

    python -m venv harness && harness/bin/pip install -c constraints.txt lm-eval torch transformers accelerate
    python benchmarks/harness.py MODEL ... --data val.parquet --python harness/bin/python \
        --json benchmarks/results/harness.jsonl

The command it runs is the harness's own, with no network:

    lm_eval run --model hf --model_args pretrained=MODEL,trust_remote_code=True --include_path TASKS --tasks local_text
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer

from stocha_hf.data import text_windows
from stocha_hf.measurement.evaluation import evaluate
from stocha_hf.models import load_model

TASK = "local_text"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def documents(folder: str, data: str, count: int, length: int) -> tuple[list[str], torch.Tensor]:
    """Texts that tokenize to `length` tokens each, and these after a first context token, [count, 1 + length].

    A window of tokens whose text tokenizes otherwise, as may happen at its edges, is passed over.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    texts, rows = [], []
    for window in text_windows(data, Path(folder), length).tolist():
        text = tokenizer.decode(window)
        if len(texts) < count and tokenizer(text, add_special_tokens=False)["input_ids"] == window:
            texts.append(text)
            rows.append([start, *window])
    return texts, torch.tensor(rows)


def write_task(folder: Path, texts: list[str]) -> None:
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    }
    (folder / f"{TASK}.yaml").write_text(yaml.safe_dump(task))


def harness(python: str, model: str, remote: bool, dtype: str, tasks: Path) -> dict[str, Any]:
    """The harness's results file for one way to load a model."""
    output, arguments = tasks / "results", f"pretrained={model},dtype={dtype}"
    environment = os.environ | OFFLINE | {"HF_HOME": str(tasks / "home")}
    environment.pop("PYTHONPATH", None)
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('stocha_hf') is not None)"
    subprocess.run([python, "-c", probe], env=environment, cwd=tasks, check=True)
    command = [python, "-m", "lm_eval", "run", "--model", "hf", "--tasks", TASK, "--include_path", str(tasks)]
    command += ["--model_args", arguments + (",trust_remote_code=True" if remote else ""), "--batch_size", "4"]
    subprocess.run([*command, "--output_path", str(output)], env=environment, cwd=tasks, check=True)
    newest = max(output.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(newest.read_text())


def ours(model: Any, remote: bool, windows: torch.Tensor) -> dict[str, Any]:
    """evaluate(), in the model's own activation or in the one that the native class knows."""
    with nullcontext() if remote else model.stocha_mode(model.config.hidden_act):
        return evaluate(model, windows).to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="converted checkpoint folders")
    parser.add_argument("--data", required=True)
    parser.add_argument("--python", required=True, help="of an environment with lm-eval and without stocha_hf")
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, required=True, help="lines are added to this file")
    args = parser.parse_args()
    for folder in map(os.path.abspath, args.models):
        texts, windows = documents(folder, args.data, args.documents, args.length)
        model = load_model(folder, dtype=getattr(torch, args.dtype)).eval()
        scale = sum(len(text.encode()) for text in texts) / (len(texts) * args.length)  # bytes a token
        for remote in (False, True):
            with tempfile.TemporaryDirectory(prefix="stocha-harness-") as tasks:
                write_task(Path(tasks), texts)
                told = harness(args.python, folder, remote, args.dtype, Path(tasks))
            bytewise, found = told["results"][TASK]["byte_perplexity,none"], ours(model, remote, windows)
            record = {
                "model": Path(folder).name,
                "load": "trust_remote_code, without stocha_hf" if remote else "native",
                "activation": found["activation"],
                "sparsity": found["sparsity"]["mean"],
                "documents": len(texts),
                "length": args.length,
                "dtype": args.dtype,
                "harness_byte_perplexity": bytewise,
                "harness_perplexity": math.exp(math.log(bytewise) * scale),
                "perplexity": found["perplexity"],
                "lm_eval": told["lm_eval_version"],
                "transformers": told["transformers_version"],
            }
            with args.json.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(record, flush=True)


if __name__ == "__main__":
    main()
