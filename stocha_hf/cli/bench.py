"""Compare dense and sparse decoding on this machine's CPU, side by side in one run: the FFN alone, or a whole model.

example:
  stocha-bench --shape 2048,8192 --sparsity 0 0.5 0.9 --tokens 1 4
  stocha-bench smollm2-sparse
  stocha-bench --random 1b --sparsity 0.9 --json > decode.json

MODEL is a converted checkpoint, measured as it is against its native class. --random builds a Llama of that size from
random numbers and forces the shares of zeros by thresholds.
"""

from __future__ import annotations

import argparse
from typing import Any

from stocha_hf.cli import (
    DTYPES,
    Parser,
    checked,
    dtype_name,
    one_of,
    path_or_id,
    run,
    share_below_1,
    show,
    whole_number,
)
from stocha_hf.errors import StochaError
from stocha_hf.measurement.figures import plot_speedups

SHAPES = ("135m", "1b", "3b", "8b")  # of stocha_hf.measurement.speed_models, which imports torch


def _sizes(text: str) -> tuple[int, int]:
    size, width = map(int, text.split(","))
    return size, width


shape = checked(_sizes, lambda sizes: min(sizes) >= 1, "hidden_size,intermediate_size as in 2048,8192")
recall = checked(float, lambda share: 0.5 < share <= 1, "a share above 0.5, or 1 for exact results")


def parser() -> Parser:
    verb = Parser("stocha-bench", __doc__)
    verb.add_argument(
        "model", type=path_or_id, nargs="?", metavar="MODEL", help="converted checkpoint: end to end, dense and sparse"
    )
    verb.add_argument(
        "--shape", type=shape, action="append", help="H,M: an FFN with random weights; may be given several times"
    )
    verb.add_argument(
        "--random",
        type=one_of(SHAPES),
        action="append",
        help=f"a Llama with random weights, end to end: {', '.join(SHAPES)}",
    )
    verb.add_argument(
        "--sparsity", nargs="+", type=share_below_1, help="shares of zeros to force (default: 0 0.5 0.8 0.9 0.95 0.99)"
    )
    verb.add_argument(
        "--tokens", nargs="+", type=whole_number(1, 8), default=[1], help="tokens in a step of the FFN (default: 1)"
    )
    verb.add_argument(
        "--recall", type=recall, help="end to end: skip gate rows as well, with this recall (1: exactly)"
    )
    verb.add_argument(
        "--batch", type=whole_number(1), default=1, help="end to end: sequences decoded at once (default: 1)"
    )
    verb.add_argument("--prompt", type=whole_number(1), default=64, help="tokens before decoding (default: 64)")
    verb.add_argument("--new", type=whole_number(1), default=64, help="tokens to decode (default: 64)")
    verb.add_argument("--dtype", type=dtype_name, default="bfloat16", help=f"{', '.join(DTYPES)} (default: bfloat16)")
    verb.add_argument("--json", action="store_true", help="print the records as JSON")
    verb.add_argument("--plot", type=path_or_id, metavar="FILE", help="plot the FFN's speedup against its zeros")
    return verb


def main() -> None:
    run(parser(), bench)


def bench(args: argparse.Namespace) -> None:
    _check(args)
    import torch

    from stocha_hf.measurement import speed_ffn, speed_models
    from stocha_hf.measurement.provenance import circumstances

    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    shares = [0.0, 0.5, 0.8, 0.9, 0.95, 0.99] if args.sparsity is None else args.sparsity
    steps = {"prompt": args.prompt, "new": args.new, "recall": args.recall, "batch": args.batch}
    records: list[dict[str, Any]] = []

    def add(record: dict[str, Any]) -> None:
        records.append(record)
        if not args.json:
            print(_as_text(record), flush=True)  # each as soon as it is measured

    for shape in args.shape or []:
        for record in speed_ffn.ffn_records(shape, dtype, args.tokens, shares):
            add(record)
    for name in args.random or []:
        for share in shares:
            add(speed_models.benchmark_random(name, dtype, share, **steps).to_dict())
    if args.model:
        add(speed_models.benchmark(args.model, dtype=args.dtype, **steps).to_dict())
    if args.json:
        show([record | circumstances() for record in records], "", True)
    if args.plot:
        plot_speedups(records, args.plot)


def _check(args: argparse.Namespace) -> None:
    """What no option's type can see."""
    if not (args.model or args.shape or args.random):
        raise StochaError("nothing to measure: expected MODEL, --shape H,M or --random 1b; see stocha-bench --help")
    if args.plot:
        from stocha_hf.measurement.plots import check_plot

        check_plot(args.plot)
        if not args.shape:
            raise StochaError("--plot draws FFNs and none is measured: expected --shape H,M")


def _as_text(record: dict[str, Any]) -> str:
    speed = f"dense {record['dense_ms']:.2f} ms, sparse {record['sparse_ms']:.2f} ms, {record['speedup']:.2f}x"
    if "model" in record:
        what = f"{record['model']} {record['dtype']}, a step of {record['batch']} at {record['sparsity']:.0%} zeros"
        rest = f"{record['tokens_per_second']:.1f} tokens/s; memory reads {record['read_gbps']:.0f} GB/s"
    else:
        what = f"FFN {record['shape'][0]}x{record['shape'][1]} {record['dtype']}, {record['tokens']} tokens, "
        what += f"{record['sparsity']:.0%} zeros"
        rest = f"{record['achieved_gbps']:.0f} of {record['read_gbps']:.0f} GB/s ({record['share_of_read']:.0%}); "
        rest += f"{record['speedup_over_own_dense']:.2f}x the same kernel run dense; "
        rest += f"with gates predicted exactly {record['speedup_of_exact']:.2f}x, "
        rest += f"with a recall of {record['recalled_recall']:.4f} "
        rest += f"{record['speedup_of_recalled']:.2f}x; "
        rest += f"PyTorch's operations {record['speedup_of_torch_sparse']:.2f}x"
    return f"{what}: {speed}; {rest}"


if __name__ == "__main__":
    main()
