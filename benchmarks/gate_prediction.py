"""Measure gate prediction on a CPU: rows still read, active neurons found, the text, the time.

Text is read by the modules, whose gates are all computed; for each recall, copies of them say which rows a step would
read and which active neurons it would miss. Then the same text is read token by token by whole steps, for a
perplexity, greedy text is compared with that without prediction, and decoding is timed in turn. The exact bound is
what a row's greatest error times |x|_1 may add: how many rows would be read if nothing might be missed.

    python benchmarks/gate_prediction.py FOLDER --data DATA --bits 4 --json benchmarks/results/gate_prediction.jsonl
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from stocha_hf.data import text_windows
from stocha_hf.decoding.ffn import zero_up_to
from stocha_hf.decoding.gate_prediction import candidates, predict_gates
from stocha_hf.decoding.thin_gate import MIDDLE, ThinGate, float_rows
from stocha_hf.measurement.speed import ratio
from stocha_hf.measurement.speed_models import decode_seconds, decoding_in_turn
from stocha_hf.modeling_stocha import stocha_mlps
from stocha_hf.models import load_model
from stocha_hf.quantization_stocha import StochaQuantConfig

PROMPT = 8  # tokens of a window that are read at once


def sharing(model: Any) -> Any:
    """A copy of a model that has the same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


@torch.no_grad()
def rows_of(model: Any, windows: torch.Tensor) -> dict[str, float]:
    """Shares of gate rows: read again, active; and of the active ones' number and squares: found."""
    counts: Counter[str] = Counter()
    handles = []
    for mlp in stocha_mlps(model):

        def count(module: Any, args: Any, gates: torch.Tensor, mlp: Any = mlp) -> None:
            x, gates, cut = args[0].flatten(0, 1).float(), gates.flatten(0, 1).float(), zero_up_to(mlp)
            gate: ThinGate = mlp.decode_state.coarse
            chosen, active = candidates(gate, x, cut), gates > cut
            codes = gate.unpacked()[:, : x.shape[1]] - MIDDLE
            weights = torch.cat(list(float_rows(module)))
            bound = (weights - codes * gate.steps[:, None]).abs().amax(1) * x.abs().sum(1, keepdim=True)
            bounded = x @ codes.T * gate.steps + bound > cut
            squares = (gates - cut).square()
            found = {"all": torch.ones_like(active), "read": chosen, "active": active, "found": chosen & active}
            counts.update({name: int(which.sum()) for name, which in (found | {"bounded": bounded}).items()})
            counts.update(missed=float(squares[active & ~chosen].sum()), squares=float(squares[active].sum()))

        handles.append(mlp.gate_proj.register_forward_hook(count))
    for window in windows:
        model(window[None])
    for handle in handles:
        handle.remove()
    return {
        "gate_rows": counts["read"] / counts["all"],
        "gate_rows_by_the_bound": counts["bounded"] / counts["all"],
        "active": counts["active"] / counts["all"],
        "found": counts["found"] / counts["active"],
        "squares_missed": counts["missed"] / counts["squares"],
    }


@torch.inference_mode()
def perplexity(model: Any, windows: torch.Tensor) -> float:
    """Of text read token by token."""
    losses = []
    for window in windows:
        cache = model(window[None, :PROMPT], use_cache=True, logits_to_keep=1).past_key_values
        for i in range(PROMPT, len(window) - 1):
            logits = model(window[None, i : i + 1], past_key_values=cache).logits[0, -1].float()
            losses.append(F.cross_entropy(logits, window[i + 1]).item())
    return math.exp(statistics.fmean(losses))


def texts(model: Any, windows: torch.Tensor, new: int) -> list[list[int]]:
    """Greedy text after the first tokens of each window."""
    found = []
    for window in windows:
        ids = window[None, : len(window) // 4]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        found.append(out[0, ids.shape[1] :].tolist())
    return found


def agreeing(a: list[int], b: list[int]) -> int:
    """How many tokens two texts begin with in common."""
    return next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--bits", type=int, default=4, choices=[16, 8, 4], help="of the weights; 16: --dtype's floats")
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--recall", type=float, nargs="+", default=[0.9, 0.99, 0.999])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, required=True, help="a line is added to this file")
    args = parser.parse_args()
    quantized = {"quantization_config": StochaQuantConfig(bits=args.bits)} if args.bits < 16 else {}
    full = load_model(str(args.folder), dtype=getattr(torch, args.dtype), **quantized).eval()
    windows = text_windows(args.data, args.folder, args.length, args.windows)
    models = {"full": full} | {str(recall): sharing(full) for recall in args.recall}
    written, recalls = texts(full, windows, args.new), {}
    for recall in args.recall:
        model = models[str(recall)]
        predict_gates(model, recall)
        same = [agreeing(*pair) for pair in zip(written, texts(model, windows, args.new), strict=True)]
        recalls[str(recall)] = rows_of(model, windows) | {
            "perplexity": perplexity(model, windows),
            "same_greedy_tokens": same,
        }
    measures = {name: partial(decode_seconds, model, windows[:1], args.new) for name, model in models.items()}
    seconds = decoding_in_turn(measures, args.rounds)
    for name, found in recalls.items():
        found["full_over_predicted"] = ratio(seconds, "full", name)
    record = {
        "model": args.folder.name,
        "data": Path(args.data).name,
        "bits": args.bits,
        "dtype": args.dtype,
        "tokens": windows.numel(),
        "new": args.new,
        "perplexity": perplexity(full, windows),
        "ms": {name: 1e3 * statistics.median(found) for name, found in seconds.items()},
        "recalls": recalls,
        "threads": torch.get_num_threads(),
    }
    with args.json.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
