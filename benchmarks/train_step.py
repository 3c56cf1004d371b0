"""Measure what StochA costs in training: a step of the native class (SiLU) against the patched class (StochA).

A step is forward, next-token loss, backward and AdamW, on random weights and tokens. The two models take turns, so
that whatever else the machine does falls on both; the figure is the median of the pairs' ratios, and `spread` half the
distance of their quartiles. `kept` is what a forward pass leaves for backward, SiLU / StochA: the storages autograd
keeps, each counted once and without the parameters; `peak`, on a GPU, what a step adds to weights and optimizer state.

    python benchmarks/train_step.py [--shapes 135m 1b] [--dtypes bf16 autocast fp32] [--compile] [--json]

tests/test_fused.py checks the values; on a machine with a GPU it runs there.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import statistics
import time
from typing import Any

import torch
from gpu_records import check_gpu
from transformers import LlamaConfig, LlamaForCausalLM

from stocha_hf.modeling_stocha import StochaConfig
from stocha_hf.patching import patch

# SmolLM2-135M, and two layers of a model of about a billion parameters.
SHAPES = {
    "135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 256,
    },
}  # fmt: skip
BATCH = {"cuda": (16, 1024), "cpu": (1, 256)}


class Trained:
    """A model with its optimizer, ready to take steps."""

    def __init__(self, model: LlamaForCausalLM, tokens: torch.Tensor, autocast: bool, compiled: bool) -> None:
        self.model, self.tokens, self.autocast = model.train(), tokens, autocast
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        if compiled:
            for layer in model.model.layers:  # as the recipes do
                layer.compile(fullgraph=True)

    def loss(self) -> torch.Tensor:
        cast = torch.autocast(self.tokens.device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext()
        with cast:
            return self.model(self.tokens, labels=self.tokens, use_cache=False).loss

    def step(self) -> float:
        """Seconds that a step takes."""
        synchronize(self.tokens.device)
        start = time.perf_counter()
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.tokens.device)
        return time.perf_counter() - start

    def kept_mb(self) -> float:
        parameters = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}  # alive, so that no address is used twice

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage
            return tensor.detach()  # the tensor itself would be a cycle where a node keeps its own output

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.loss()
        return sum(storage.nbytes() for storage in kept.values()) / 1e6

    def peak_mb(self) -> float | None:
        if self.tokens.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(shape: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    batch, length = args.batch or BATCH[args.device][0], args.length or BATCH[args.device][1]
    torch.manual_seed(0)
    tokens = torch.randint(SHAPES[shape]["vocab_size"], (batch, length), device=args.device)
    with torch.device(args.device):
        native = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], max_position_embeddings=length))
    native.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    patched = copy.deepcopy(native)
    patch(patched, StochaConfig(p=args.p, positive=args.positive))
    models = {
        name: Trained(model, tokens, dtype == "autocast", args.compile)
        for name, model in (("silu", native), ("stocha", patched))
    }
    for _ in range(3):
        for model in models.values():
            model.step()
    pairs = []
    for pair in range(args.pairs):
        order = list(models) if pair % 2 else list(models)[::-1]
        seconds = {name: models[name].step() for name in order}
        pairs.append((seconds["silu"], seconds["stocha"]))
    ratios = sorted(stocha / silu for silu, stocha in pairs)
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "shape": shape, "dtype": dtype, "mode": "compile" if args.compile else "eager", "tokens": batch * length,
        "silu_ms": 1e3 * statistics.median(silu for silu, _ in pairs),
        "stocha_ms": 1e3 * statistics.median(stocha for _, stocha in pairs),
        "ratio": statistics.median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
    }  # fmt: skip
    for name, model in models.items():
        record |= {f"{name}_kept_mb": model.kept_mb(), f"{name}_peak_mb": model.peak_mb()}
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["135m", "1b"])
    parser.add_argument("--dtypes", nargs="+", choices=["bf16", "autocast", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--p", type=float, default=0.3)
    parser.add_argument("--positive", choices=["silu", "relu", "drawn"], default="silu")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--batch", type=int, help="sequences in a step")
    parser.add_argument("--length", type=int, help="tokens in a sequence")
    parser.add_argument("--device", choices=list(BATCH), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="one JSON object a line in place of the table")
    args = parser.parse_args()
    check_gpu(parser, args.device)
    if not args.json:
        titles = ("shape", "dtype", "mode", "tokens", "SiLU ms", "StochA", "ratio", "spread", "kept MB", "peak MB")
        print(("{:6}{:9}{:8}" + 5 * "{:>9}" + 2 * "{:>15}").format(*titles), flush=True)
    for shape in args.shapes:
        for dtype in args.dtypes:
            torch._dynamo.reset()
            gc.collect()  # the pair before is a reference cycle of weights and optimizer state
            torch.cuda.empty_cache()
            row = measure(shape, dtype, args)
            print(json.dumps(row) if args.json else line(row), flush=True)


def line(row: dict[str, Any]) -> str:
    low, high = row["quartiles"]
    kept, peak = (
        "-" if row[f"silu_{key}"] is None else f"{row[f'silu_{key}']:.0f} / {row[f'stocha_{key}']:.0f}"
        for key in ("kept_mb", "peak_mb")
    )
    return (
        f"{row['shape']:6}{row['dtype']:9}{row['mode']:8}{row['tokens']:>9}{row['silu_ms']:>9.1f}{row['stocha_ms']:>9.1f}"
        f"{row['ratio']:>9.3f}{(high - low) / 2:>9.3f}{kept:>15}{peak:>15}"
    )


if __name__ == "__main__":
    main()
