"""Text that a model writes by itself, as a JSONL file with a column `text`: data for a refit or a distillation.

What a model says at temperature 1 is a mixture like that of its own training text, which is often not public. So it
can stand in for general text where there is none (Liu et al., LLM-QAT, arXiv 2305.17888); docs/refit.md and
docs/training.md say how far that goes.

    python benchmarks/own_text.py SmolLM2-135M-Instruct own.jsonl --tokens 130000

Each batch is added to the file as soon as it is there: a run that is killed leaves what it had.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import trange
from transformers import AutoTokenizer

from stocha_hf.loading import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder or Hub id")
    parser.add_argument("output", type=Path, help=".jsonl file")
    parser.add_argument("--tokens", type=int, default=130_000, help="at least so many, in whole batches")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sample")
    parser.add_argument("--batch", type=int, default=128, help="samples at a time")
    parser.add_argument("--start", default="<|endoftext|>", help="token that a sample begins with: one between texts")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.start not in tokenizer.get_vocab():
        parser.error(f"{args.model} has no token {args.start}: expected one of its own, such as {tokenizer.bos_token}")
    first = tokenizer.convert_tokens_to_ids(args.start)
    model = load_model(args.model, dtype=torch.bfloat16).eval().to(args.device)
    start = torch.full((args.batch, 1), first, device=args.device)
    options = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0, "eos_token_id": None}
    options |= {"attention_mask": torch.ones_like(start), "max_new_tokens": args.length - 1, "pad_token_id": 0}
    torch.manual_seed(args.seed)
    with args.output.open("w", encoding="utf-8") as file:
        for _ in trange(-(-args.tokens // (args.batch * args.length)), desc="Sampling", disable=None):
            with torch.inference_mode():
                ids = model.generate(start, **options)
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts(tokenizer, ids))
            file.flush()


def texts(tokenizer: Any, ids: torch.Tensor) -> list[str]:
    """Token ids [batch, seq] as texts, cut at special tokens, where the model began another text."""
    special, found = set(tokenizer.all_special_ids), []
    for sample in ids.tolist():
        for is_special, piece in itertools.groupby(sample, key=special.__contains__):
            if not is_special:
                found.append(tokenizer.decode(list(piece)))
    return found


if __name__ == "__main__":
    main()
