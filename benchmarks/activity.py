"""Measure predictivity and hardware affinity: of a sparse model's own zeros, and of the original under a selection.

The two measures of ReLU^2 Wins (arXiv 2402.03804) that trade-off against quality, which frontier.py shows, leaves out.
Predictors learn from --train and are judged on --eval; a selection is calibrated on --train. One line a measurement is
added to --json.

    python benchmarks/activity.py sparse-model --train train.jsonl --eval val.jsonl --json out.jsonl
    python benchmarks/activity.py original --train train.jsonl --eval val.jsonl --json out.jsonl \\
        --method magnitude --shares 0.8 0.9
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from stocha_hf.data import calibration_windows, text_windows
from stocha_hf.errors import StochaError
from stocha_hf.measurement.affinity import affinity
from stocha_hf.measurement.predictivity import predictivity
from stocha_hf.measurement.provenance import circumstances, origin
from stocha_hf.measurement.selection.calibration import Calibration
from stocha_hf.measurement.selection.methods import METHODS
from stocha_hf.models import load_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def measure(args: argparse.Namespace) -> None:
    folder = Path(args.model)
    train = calibration_windows(args.train, folder, args.tokens, args.length, args.seed)
    test = text_windows(args.eval, folder, args.length, args.windows)
    model: Any = load_model(args.model, dtype=getattr(torch, args.dtype)).eval().to(DEVICE)
    calibration = Calibration(model, train)
    for share in args.shares if args.method else [None]:
        selection = METHODS[args.method].select(calibration, share) if args.method else None
        found = affinity(model, test, selection=selection)
        foretold = predictivity(model, train, test, rank=args.rank, selection=selection, seed=args.seed)
        row = origin(args.model, model) | {"method": args.method, "share": share}
        row |= {"affinity": found.to_dict(), "predictivity": foretold.to_dict()} | circumstances()
        with args.json.open("a") as file:
            file.write(json.dumps(row) + "\n")
        reuse = ", ".join(f"{value.mean:.1%} of {span}" for span, value in zip(found.spans, found.reuse, strict=True))
        print(
            f"{args.method or 'own zeros'} {share or ''}: zeros {foretold.sparsity.mean:.1%}; reuse {reuse}; "
            f"co-activation gap {found.coactivation_gap.mean:.3f}; recall {foretold.recall.mean:.1%} at "
            f"{foretold.predicted_sparsity.mean:.1%} predicted zeros",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder, converted or native")
    parser.add_argument("--train", required=True, help="text that predictors and thresholds are made from")
    parser.add_argument("--eval", required=True, help="text that they are measured on")
    parser.add_argument("--json", type=Path, required=True, help="lines are added to this file")
    parser.add_argument("--method", choices=[*METHODS], metavar="METHOD", help="cut by it (default: own zeros)")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.8])
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=65_536, help="of training text")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    try:
        measure(parser.parse_args())
    except StochaError as error:
        raise SystemExit(f"activity.py: {error}") from None


if __name__ == "__main__":
    main()
