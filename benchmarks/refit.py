"""Measure perplexity against sparsity without training: the refit, beside thresholds on the original SiLU model.

For each share of zeros in the FFN's hidden vectors:

- refit: `convert(..., refit=DATA, target_sparsity=share)`; share 0 stands for plain ReLU;
- CATS (Lee et al., arXiv 2404.08763): the original model, hidden vector zeroed where |SiLU(gate)| is small;
- magnitude, as TEAL (Liu et al., arXiv 2408.14690) cuts activations: zeroed where the hidden vector itself is small.

The thresholds of the last two are one a layer, quantiles on calibration windows of DATA. All are measured on the same
windows of each evaluation text, on the GPU where there is one, in bfloat16 autocast.

    python benchmarks/refit.py MODEL --data train.parquet --eval val.parquet other.parquet --json out.jsonl
    python benchmarks/refit.py --json out.jsonl --plot out.png          # draws what the file holds, measures nothing
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stocha_hf.conversion.convert import convert
from stocha_hf.data import calibration_windows, text_windows
from stocha_hf.measurement.evaluation import evaluate
from stocha_hf.measurement.plots import plot_lines
from stocha_hf.modeling_stocha import stocha_mlps
from stocha_hf.models import load_model

LENGTH = 1024
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAMPLE = 400_000  # magnitudes of a layer that its threshold is chosen on


@contextmanager
def thresholded(model: Any, method: str, share: float, calibration: torch.Tensor) -> Iterator[None]:
    """The original model with its hidden vectors' least entries zeroed, by CATS' or by TEAL's measure."""
    gates: dict[int, torch.Tensor] = {}
    thresholds: dict[int, float] = {}

    def size(layer: int, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(gates[layer]).abs() if method == "CATS" else hidden.abs()

    def cut(layer: int, hidden: torch.Tensor) -> tuple[torch.Tensor]:
        sizes = size(layer, hidden)
        if layer not in thresholds:
            flat = sizes.flatten()
            flat = flat[:: max(len(flat) // SAMPLE, 1)]
            thresholds[layer] = flat.kthvalue(round(share * len(flat))).values.item()
        return (torch.where(sizes > thresholds[layer], hidden, 0.0),)

    hooks = []
    for i, mlp in enumerate(stocha_mlps(model)):
        hooks.append(mlp.gate_proj.register_forward_hook(lambda m, a, out, i=i: gates.__setitem__(i, out)))
        hooks.append(mlp.down_proj.register_forward_pre_hook(lambda m, a, i=i: cut(i, a[0])))
    try:
        with torch.no_grad():
            model(calibration.to(model.device))  # chooses each layer's threshold under those of the layers before
        yield
    finally:
        for hook in hooks:
            hook.remove()


def figures(model: Any, texts: dict[str, torch.Tensor]) -> dict[str, Any]:
    with torch.autocast(model.device.type, torch.bfloat16):
        return {name: evaluate(model, windows).to_dict() for name, windows in texts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of the original model, native or converted")
    parser.add_argument("--data", help="calibration text")
    parser.add_argument("--eval", nargs="+", default=[], help="texts to measure on")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.0, 0.7, 0.8, 0.85, 0.9, 0.95])
    parser.add_argument("--methods", nargs="+", default=["refit", "CATS", "magnitude"])
    parser.add_argument("--tokens", type=int, help="calibration tokens of the refit")
    parser.add_argument("--windows", type=int, help=f"windows of {LENGTH} tokens of each text (default: all)")
    parser.add_argument("--json", type=Path, required=True, help="lines are added to this file")
    parser.add_argument("--plot", type=Path, help="draw the file's records here")
    args = parser.parse_args()
    if args.model:
        measure(args)
    if args.plot:
        draw(args.json, args.plot)


def measure(args: argparse.Namespace) -> None:
    folder = Path(args.model)
    texts = {Path(name).stem: text_windows(name, folder, LENGTH, args.windows) for name in args.eval}
    calibration = calibration_windows(args.data, folder, 4 * LENGTH, LENGTH, seed=0)
    original = load_model(str(folder), dtype=torch.float32).eval().to(DEVICE)
    add(args.json, {"method": "original", "share": 0.0, **figures(original, texts)})
    for method in args.methods:
        for share in args.shares:
            if method == "refit":
                add(args.json, {"method": method, "share": share, **refitted(folder, args, share, texts)})
            elif share > 0:
                with thresholded(original, method, share, calibration):
                    add(args.json, {"method": method, "share": share, **figures(original, texts)})


def refitted(folder: Path, args: argparse.Namespace, share: float, texts: dict[str, torch.Tensor]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="stocha-refit-") as output:
        start = time.monotonic()
        target = share or None
        done = convert(
            folder, output, overwrite=True, refit=args.data, refit_tokens=args.tokens, target_sparsity=target
        )
        seconds = time.monotonic() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # of the process until now
        found = figures(load_model(output, dtype=torch.float32).eval().to(DEVICE), texts)
    tokens = done.stocha["history"][0]["tokens"]
    return found | {"tokens": tokens, "seconds": seconds, "peak_mb": peak, "device": DEVICE}


def add(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    cells = "  ".join(
        f"{name}: perplexity {value['perplexity']:.2f} at {value['sparsity']['mean']:.1%} zeros"
        for name, value in record.items()
        if isinstance(value, dict)
    )
    print(f"{record['method']:10}{record['share']:6.0%}  {cells}", flush=True)


def draw(source: Path, target: Path) -> None:
    """Perplexity against the zeros found, a picture a text, a line a method (and number of calibration tokens)."""
    records = [json.loads(line) for line in source.read_text().splitlines()]
    texts = [name for name, value in records[0].items() if isinstance(value, dict)]
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {text: {} for text in texts}
    for record in records:
        name = f"refit, {record['tokens'] // 1024}k tokens" if "tokens" in record else record["method"]
        for text in texts:
            point = (100 * record[text]["sparsity"]["mean"], record[text]["perplexity"])
            lines[text].setdefault(name, []).append(point)
    plot_lines(target, lines, x="zeros in the FFN's hidden vector, %", y="perplexity", log=True)


if __name__ == "__main__":
    main()
