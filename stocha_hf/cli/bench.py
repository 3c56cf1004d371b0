"""Dense against sparse decode on this machine's CPU, side by side in one run: the FFN alone, or a model end to end.

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

from stocha_hf.cli import DTYPES, Parser, check_dtype, run, show
from stocha_hf.errors import StochaError
from stocha_hf.measurement.figures import plot_speedups


def parser() -> Parser:
    verb = Parser("stocha-bench", __doc__)
    verb.add_argument("model", nargs="?", metavar="MODEL", help="converted checkpoint: end to end, dense and sparse")
    verb.add_argument("--shape", action="append", help="H,M: an FFN of random weights; may be given several times")
    verb.add_argument("--random", action="append", help="1b or 3b: a Llama of random weights, end to end")
    verb.add_argument(
        "--sparsity", nargs="+", type=float, help="shares of zeros to force (default: 0 0.5 0.8 0.9 0.95 0.99)"
    )
    verb.add_argument("--tokens", nargs="+", type=int, default=[1], help="tokens of an FFN's step (default: 1)")
    verb.add_argument("--recall", type=float, help="end to end: skip gate rows as well, with this recall (1: exactly)")
    verb.add_argument("--batch", type=int, default=1, help="end to end: sequences decoded at once (default: 1)")
    verb.add_argument("--prompt", type=int, default=64, help="tokens before decoding (default: 64)")
    verb.add_argument("--new", type=int, default=64, help="tokens to decode (default: 64)")
    verb.add_argument("--dtype", default="bfloat16", help=f"{', '.join(DTYPES)} (default: bfloat16)")
    verb.add_argument("--json", action="store_true", help="print the records as JSON")
    verb.add_argument("--plot", metavar="FILE", help="draw the FFN's speedup against its zeros")
    return verb


def main() -> None:
    run(parser(), bench)


def bench(args: argparse.Namespace) -> None:
    shares = [0.0, 0.5, 0.8, 0.9, 0.95, 0.99] if args.sparsity is None else args.sparsity
    shapes = _checked(args, shares)
    import torch

    from stocha_hf.measurement import speed_ffn, speed_models
    from stocha_hf.measurement.provenance import circumstances

    dtype, records = getattr(torch, args.dtype), []
    torch.manual_seed(0)
    for shape in shapes:
        for record in speed_ffn.ffn_records(shape, dtype, args.tokens, shares):
            records.append(_told(record, args.json))
    for name in args.random or []:
        for share in shares:
            record = speed_models.random_decode_record(
                name, dtype, share, args.prompt, args.new, args.recall, args.batch
            )
            records.append(_told(record, args.json))
    if args.model:
        record = speed_models.checkpoint_record(args.model, dtype, args.prompt, args.new, args.recall, args.batch)
        records.append(_told(record, args.json))
    if args.json:
        show([record | circumstances() for record in records], "", True)
    if args.plot:
        plot_speedups(records, args.plot)


def _checked(args: argparse.Namespace, shares: list[float]) -> list[tuple[int, int]]:
    if not (args.model or args.shape or args.random):
        raise StochaError("nothing to measure: expected MODEL, --shape H,M or --random 1b; see stocha-bench --help")
    if wrong := [share for share in shares if not 0 <= share < 1]:
        raise StochaError(f"--sparsity is {wrong[0]}: expected a share of zeros from 0 to below 1")
    if wrong := [count for count in args.tokens if not 1 <= count <= 8]:
        raise StochaError(f"--tokens is {wrong[0]}: expected 1 to 8, a decode step's")
    if args.recall is not None and not 0.5 < args.recall <= 1:
        raise StochaError(f"--recall is {args.recall}: expected a share above 0.5, or 1 for exact results")
    check_dtype(args.dtype)
    if wrong := [name for name in args.random or [] if name not in ("1b", "3b")]:
        raise StochaError(f"--random is {wrong[0]}: expected 1b or 3b")
    if min(args.prompt, args.new, args.batch) < 1:
        raise StochaError(
            f"--prompt is {args.prompt}, --new {args.new} and --batch {args.batch}: expected at least 1 of each"
        )
    shapes = []
    for given in args.shape or []:
        try:
            size, width = map(int, given.split(","))
        except ValueError:
            size = width = 0
        if min(size, width) < 1:
            raise StochaError(f"--shape is {given}: expected hidden_size,intermediate_size as in 2048,8192")
        shapes.append((size, width))
    if args.plot:
        from stocha_hf.measurement.plots import check_plot

        check_plot(args.plot)
        if not shapes:
            raise StochaError("--plot draws FFNs and none is measured: expected --shape H,M")
    return shapes


def _told(record: dict[str, Any], quiet: bool) -> dict[str, Any]:
    if quiet:
        return record
    speed = f"dense {record['dense_ms']:.2f} ms, sparse {record['sparse_ms']:.2f} ms, {record['speedup']:.2f}x"
    if "model" in record:
        what = f"{record['model']} {record['dtype']}, a step of {record['batch']} at {record['sparsity']:.0%} zeros"
        rest = f"{record['tokens_per_second']:.1f} tokens/s; memory reads {record['read_gbps']:.0f} GB/s"
    else:
        what = f"FFN {record['shape'][0]}x{record['shape'][1]} {record['dtype']}, {record['tokens']} tokens, "
        what += f"{record['sparsity']:.0%} zeros"
        rest = f"{record['achieved_gbps']:.0f} of {record['read_gbps']:.0f} GB/s ({record['share_of_read']:.0%}); "
        rest += f"{record['speedup_over_own_dense']:.2f}x the same kernel run dense; "
        rest += f"with a coarse gate {record['speedup_of_exact']:.2f}x, of recall {record['recalled_recall']:.4f} "
        rest += f"{record['speedup_of_recalled']:.2f}x; "
        rest += f"PyTorch's operations {record['speedup_of_torch_sparse']:.2f}x"
    print(f"{what}: {speed}; {rest}", flush=True)
    return record
