"""Let a model answer prompts, as text to refit or train it on: its own kind of answers, with its chat template.

example:
  stocha-answers Qwen/Qwen2.5-Coder-0.5B-Instruct prompts.jsonl answers.jsonl
  stocha-answers smollm2-sparse HuggingFaceH4/ultrachat_200k answers.parquet --split train_sft --limit 20000 --new 384
  then: stocha-convert Qwen/Qwen2.5-Coder-0.5B-Instruct qwen-sparse --activation relu --refit answers.jsonl

PROMPTS is a text file with one prompt per line; or a jsonl, json, csv or parquet file, or a Hub data set, with a
column `prompt` (text, or messages) or `messages`. OUT gets a row for each answer: the whole text with all special
tokens, as stocha-train and --refit read it. Answers are added as they are finished. If
the command was killed, run it again: it continues. No answer is written twice, and only --samples answers a prompt
more than once.
"""

from __future__ import annotations

import argparse
from typing import Any

from stocha_hf.cli import (
    DTYPES,
    Parser,
    checked,
    dtype_name,
    number_from_0,
    path_or_id,
    run,
    show,
    whole_number,
)

top_p = checked(float, lambda share: 0 < share <= 1, "a share above 0, at most 1")


def parser() -> Parser:
    verb = Parser("stocha-answers", __doc__)
    verb.add_argument("model", type=path_or_id, metavar="MODEL", help="Hub id or checkpoint folder")
    verb.add_argument("prompts", type=path_or_id, metavar="PROMPTS", help="file, folder or Hub data set")
    verb.add_argument("output", type=path_or_id, metavar="OUT", help=".jsonl or .parquet file")
    verb.add_argument("--split", default="train", help="split of a Hub data set (default: train)")
    verb.add_argument("--column", help="column of prompts (default: prompt, else messages)")
    verb.add_argument("--plain", action="store_true", help="continue prompts as they are, without the chat template")
    verb.add_argument("--limit", type=whole_number(1), metavar="N", help="answer the first N prompts (default: all)")
    verb.add_argument("--samples", type=whole_number(1), default=1, help="answers per prompt (default: 1)")
    verb.add_argument("--new", type=whole_number(1), default=512, help="longest answer, in tokens (default: 512)")
    verb.add_argument(
        "--temperature", type=number_from_0, default=0.8, help="0 takes the most likely token (default: 0.8)"
    )
    verb.add_argument(
        "--top-p",
        type=top_p,
        default=1.0,
        help="draw from the most likely tokens that add up to this probability (default: 1)",
    )
    verb.add_argument(
        "--seed",
        type=whole_number(0, 2**63 - 1),
        default=0,
        help="decides what is drawn for a prompt, the same in any batch, up to rounding (default: 0)",
    )
    verb.add_argument(
        "--batch-size", type=whole_number(1), metavar="N", help="answers generated at once (default: by device)"
    )
    verb.add_argument("--dtype", type=dtype_name, default="bfloat16", help=f"{', '.join(DTYPES)} (default: bfloat16)")
    verb.add_argument("--json", action="store_true", help="print the figures as JSON")
    return verb


def main() -> None:
    run(parser(), answers)


def answers(args: argparse.Namespace) -> None:
    from stocha_hf.answers.answer_file import check_output

    check_output(args.output)
    import torch

    from stocha_hf.answers.prompts import read_prompts, rendered
    from stocha_hf.answers.writing import write_answers
    from stocha_hf.data import load_tokenizer
    from stocha_hf.measurement.provenance import circumstances, origin
    from stocha_hf.models import load_config, load_model, tokenizer_folder

    load_config(args.model)
    tokenizer = load_tokenizer(tokenizer_folder(args.model))
    prompts = read_prompts(args.prompts, split=args.split, column=args.column)[: args.limit]
    texts = rendered(tokenizer, prompts, chat=not args.plain)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(args.model, dtype=getattr(torch, args.dtype)).eval().to(device)
    source: dict[str, Any] = origin(args.model, model)
    settings = {"weights": source["weights"] or source["revision"] or args.model, "dtype": args.dtype}
    options = {key: getattr(args, key) for key in ("new", "samples", "temperature", "top_p", "batch_size", "seed")}
    written = write_answers(model, tokenizer, texts, args.output, settings=settings, **options)
    figures = written.to_dict()
    text = (
        f"{written.path}: {written.answers} answers, {written.new} of them new, with {written.new_tokens} tokens; "
        f"{written.tokens_per_second:,.0f} tokens a second; {written.finished:.0%} ended by themselves"
        + (f"; {written.too_long} prompts are too long" if written.too_long else "")
    )
    show(source | figures | circumstances(), text, args.json)


if __name__ == "__main__":
    main()
