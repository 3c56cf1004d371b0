"""Measure a model: perplexity, zeros of the FFNs' hidden vectors by layer, neurons that never fire or fire again.

example:
  stocha-eval smollm2-sparse --data text.parquet
  stocha-eval smollm2-sparse --data text.parquet --baseline HuggingFaceTB/SmolLM2-135M --plot zeros.png

MODEL is a Hub id or folder, converted or native. The text is cut into windows of --length tokens, one after the other;
each is read on its own. With --baseline, the same of a second model, and how far the first one's predictions are from
its.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from stocha_hf.cli import DTYPES, Parser, check_dtype, run, show
from stocha_hf.config import ACTIVATIONS
from stocha_hf.errors import StochaError


def parser() -> Parser:
    verb = Parser("stocha-eval", __doc__)
    verb.add_argument("model", metavar="MODEL", help="Hub id or checkpoint folder")
    verb.add_argument("--data", required=True, help="text: parquet, jsonl or txt file, folder or Hub data set")
    verb.add_argument("--baseline", metavar="MODEL2", help="measure this one too, and compare predictions")
    verb.add_argument("--mode", help=f"force an activation on MODEL: {', '.join(ACTIVATIONS)} (default: its own)")
    verb.add_argument("--length", type=int, default=1024, help="tokens of a window (default: 1024)")
    verb.add_argument("--windows", type=int, help="evenly spaced windows to measure on (default: all)")
    verb.add_argument("--dtype", default="bfloat16", help=f"{', '.join(DTYPES)} (default: bfloat16)")
    verb.add_argument("--json", action="store_true", help="print the figures as JSON")
    verb.add_argument("--plot", metavar="FILE", help="draw the zeros of each layer")
    return verb


def main() -> None:
    run(parser(), evaluate)


def evaluate(args: argparse.Namespace) -> None:
    _check(args)
    import torch

    from stocha_hf import evaluate
    from stocha_hf.data import text_windows
    from stocha_hf.loading import load_model, tokenizer_folder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    windows = text_windows(args.data, tokenizer_folder(args.model), args.length, args.windows)
    names = [name for name in (args.model, args.baseline) if name]
    models = [load_model(name, dtype=getattr(torch, args.dtype)).eval().to(device) for name in names]
    _check_mode(models[0], args.mode)
    figures = {"model": args.model, "data": args.data, "length": args.length, "dtype": args.dtype}
    with models[0].stocha_mode(args.mode) if args.mode else nullcontext():
        figures |= evaluate.evaluate(models[0], windows)
        if args.baseline:
            figures["baseline"] = {"model": args.baseline} | evaluate.evaluate(models[1], windows)
            figures |= evaluate.compare(models[0], models[1], windows)
    show(figures, _told(figures), args.json)
    if args.plot:
        _plot(figures, args.plot)


def _check_mode(model: Any, mode: str | None) -> None:
    from stocha_hf.modeling_stocha import StochaConfig, stocha_mlps

    try:
        if mode is not None:
            StochaConfig(activation=mode, k=stocha_mlps(model)[0].k)
    except ValueError as error:
        raise StochaError(f"--mode {mode} cannot run on this model: {error}") from None


def _check(args: argparse.Namespace) -> None:
    if args.length < 2:
        raise StochaError(f"--length is {args.length}: expected at least 2 tokens")
    if args.windows is not None and args.windows < 1:
        raise StochaError(f"--windows is {args.windows}: expected at least 1")
    check_dtype(args.dtype)
    if args.mode is not None and args.mode not in ACTIVATIONS:
        raise StochaError(f"--mode is {args.mode}: expected one of {', '.join(ACTIVATIONS)}")
    if args.plot:
        from stocha_hf.plots import check_plot

        check_plot(args.plot)


def _told(figures: dict[str, Any]) -> str:
    lines = []
    for row in (figures, figures.get("baseline")):
        if row:
            zeros = row["sparsity"]["per_layer"]
            lines.append(
                f"{row['model']} ({row['activation']}): perplexity {row['perplexity']:.3f} on {row['tokens']} tokens; "
                f"zeros {row['sparsity']['mean']:.1%}, by layer {min(zeros):.1%} to {max(zeros):.1%}; never active "
                f"{row['never_active']['mean']:.2%}; active at the token before as well {row['reuse']['mean']:.1%}"
            )
    if "kl" in figures:
        lines.append(
            f"from the second to the first: KL {figures['kl']:.4f}, same top token {figures['top1_agreement']:.1%}"
        )
    return "\n".join(lines)


def _plot(figures: dict[str, Any], path: str) -> None:
    from stocha_hf.plots import plot_lines

    rows = [row for row in (figures, figures.get("baseline")) if row]
    lines = {
        Path(row["model"]).name: [(i, 100 * zeros) for i, zeros in enumerate(row["sparsity"]["per_layer"])]
        for row in rows
    }
    plot_lines(path, {"Zeros in the FFN's hidden vector": lines}, x="layer", y="%")
