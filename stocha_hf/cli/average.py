"""Average the weights and thresholds of several training runs of one stocha checkpoint.

example:
  stocha-average runs/kl runs/kl-and-text averaged
  stocha-average runs/seed-0 runs/seed-1 runs/seed-2 averaged --shares 2 1 1

The mean is as sparse and as fast as the runs, and can do better than any of them on text that none of them saw:
measure it with stocha-eval. OUTPUT appears complete or not at all.
"""

from __future__ import annotations

import argparse

from stocha_hf.cli import Parser, path_or_id, positive_number, run, show


def parser() -> Parser:
    verb = Parser("stocha-average", __doc__)
    verb.add_argument(
        "sources", type=path_or_id, metavar="FOLDER", nargs="+", help="two or more stocha checkpoints, or Hub ids"
    )
    verb.add_argument("output", type=path_or_id, metavar="OUTPUT", help="folder to write")
    verb.add_argument(
        "--shares", type=positive_number, nargs="+", help="positive numbers, one per FOLDER (default: equal)"
    )
    verb.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it is a checkpoint folder")
    verb.add_argument("--json", action="store_true", help="print the result as JSON")
    return verb


def main() -> None:
    run(parser(), average)


def average(args: argparse.Namespace) -> None:
    from stocha_hf.conversion.averaging import average as average_folders

    done = average_folders(args.sources, args.output, shares=args.shares, overwrite=args.overwrite).to_dict()
    shares = " ".join(f"{share:.3g}" for share in done["shares"])
    show(done, f"{done['output']}: mean of {len(args.sources)} checkpoints, shares {shares}", args.json)


if __name__ == "__main__":
    main()
