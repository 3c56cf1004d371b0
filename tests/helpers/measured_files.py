"""Files of measurements as the verbs print them, with figures that stand nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stocha_hf.checkpoints.hashing import weights_hash
from stocha_hf.measurement.provenance import circumstances


def evaluation(folder: Path, **changes: Any) -> dict[str, Any]:
    """What stocha-eval prints, with figures that stand nowhere else."""
    shares = {"mean": 0.8125, "per_layer": [0.75, 0.875]}
    found = {
        "model": str(folder), "weights": weights_hash(folder), "revision": None, "data": "texts/val.txt", "length": 32,
        "dtype": "float32", "perplexity": 17.375, "tokens": 4096, "activation": "relu", "sparsity": shares,
        "never_active": shares | {"mean": 0.0625}, "reuse": shares | {"mean": 0.4375},
        "aggregated_sparsity": {"tokens": [1, 2], "mean": [0.8, 0.7], "independent": [0.8, 0.6], "per_layer": []},
    }  # fmt: skip
    return found | circumstances() | changes


def bench(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    record = {
        "model": str(folder), "weights": weights_hash(folder), "dtype": "bfloat16", "batch": 1, "prompt": 64,
        "new_tokens": 64, "dense_ms": 40.0, "sparse_ms": 12.5, "speedup": 3.25, "read_gbps": 33.0,
    }  # fmt: skip
    return [record | circumstances() | changes]


def tasks(folder: Path, **changes: Any) -> dict[str, Any]:
    score = {"task": "humaneval", "metric": "pass@1", "score": 0.4375, "stderr": 0.0390625, "questions": 164}
    difference = {"difference": -0.0625, "stderr": 0.03125, "low": -0.125, "high": 0.0, "won": 3, "lost": 13}
    found = {
        "model": str(folder), "weights": weights_hash(folder), "dtype": "bfloat16", "limit": None, "tasks": [score],
        "baseline": {"model": "org/source", "tasks": [score | {"score": 0.5}]},
        "task_differences": [{key: score[key] for key in ("task", "metric", "questions")} | difference],
    }  # fmt: skip
    return found | circumstances() | changes


def generation(folder: Path) -> dict[str, Any]:
    runs = [
        {"decoding": "stocha", "p": 0.5, "log_likelihood": -1.375, "distinct_2": 0.625, "self_bleu": 31.5},
        {"decoding": "greedy", "log_likelihood": -0.875, "distinct_2": 0.125, "self_bleu": 100.0},
    ]
    told = {"weights": weights_hash(folder), "samples": 4, "new": 8, "dtype": "float32", "prompts": ["a", "b"]}
    return told | circumstances() | {"runs": runs}
