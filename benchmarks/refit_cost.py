"""Measure time and memory of a refit at a given shape, on random weights: what a larger model will take.

A Llama of the shape is written with random bfloat16 weights and the tokenizer of MODEL, and refitted with
`convert(..., refit=DATA)` at the default number of tokens. The layers come one after the other, so that a few of them
say what the whole model takes.

    python benchmarks/refit_cost.py MODEL --data train.parquet --shape 2048,8192 --layers 2 --json out.jsonl
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from stocha_hf.conversion.convert import convert


def write_random(tokenizer_of: str, folder: Path, hidden: int, width: int, layers: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder with the tokenizer to use")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--shape", default="2048,8192", help="hidden_size,intermediate_size")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--target-sparsity", type=float)
    parser.add_argument("--tokens", type=int, help="default: the refit's own")
    parser.add_argument("--on-disk", action="store_true", help="streams in files")
    parser.add_argument("--json", type=Path, required=True, help="a line is added to this file")
    args = parser.parse_args()
    hidden, width = map(int, args.shape.split(","))
    with tempfile.TemporaryDirectory(prefix="stocha-refit-cost-") as work:
        write_random(args.model, Path(work) / "source", hidden, width, args.layers)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        start = time.monotonic()
        done = convert(
            Path(work) / "source",
            Path(work) / "output",
            refit=args.data,
            refit_tokens=args.tokens,
            target_sparsity=args.target_sparsity,
            refit_on_disk=args.on_disk,
        )
        seconds = time.monotonic() - start
    cuda = torch.cuda.is_available()
    record = {
        "shape": [hidden, width],
        "layers": args.layers,
        "target_sparsity": args.target_sparsity,
        "tokens": done.stocha["history"][0]["tokens"],
        "on_disk": args.on_disk,
        "device": "cuda" if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "peak_mb_before": before,  # writing the random model
        "peak_gpu_mb": torch.cuda.max_memory_allocated() / 1e6 if cuda else 0.0,
    }
    with args.json.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(record)


if __name__ == "__main__":
    main()
