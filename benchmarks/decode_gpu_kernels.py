"""Where the time of a decode step on a GPU goes: microseconds, bytes and bandwidth of each of its kernels.

The step of a Llama of random weights, dense, with forced zeros, and with predicted gates, is profiled with kernels one
after another (`early` false), as durations of kernels that overlap say nothing. `step_us` is the time of a replay, by
events, with overlap as it is used and without. `gbps` counts weights, and keys and values, once.

    python benchmarks/decode_gpu_kernels.py --random 1b 8b --json kernels.jsonl
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gpu_records import check_gpu, report
from torch.profiler import ProfilerActivity, profile

from stocha_hf.decoding.gpu_weights import LayerWeights, Weights
from stocha_hf.decoding.packed_gate import PackedGate
from stocha_hf.measurement.speed_models import SHAPES, random_llama

if TYPE_CHECKING:
    from stocha_hf.decoding.gpu_step import GpuStep

STEPS = 64  # between two events
ROUNDS = 5
LISTED = 0.18  # of the gates are computed again at 90% zeros with recall 0.999, of normally distributed weights


def with_zeros(weights: Weights, share: float) -> Weights:
    """The same with FATReLU thresholds that zero this share of gates; entries of random weights are N(0, 0.02^2)."""
    cut = statistics.NormalDist().inv_cdf(share) * 0.02 * weights.embedding.shape[1] ** 0.5
    layers = [replace(w, activation="fatrelu", cut=cut, down_t=w.down.t().contiguous()) for w in weights.layers]
    return replace(weights, layers=layers)


def with_prediction(weights: Weights) -> Weights:
    return replace(weights, layers=[replace(w, coarse=PackedGate.of(w.gate, 0.999)) for w in weights.layers])


def started(step: GpuStep, length: int) -> GpuStep:
    """A step after so many tokens, of random keys and values."""
    weights = step.weights
    shape = weights.key_heads, length + 2 * STEPS, weights.head_dim
    parts = [[torch.randn(shape, device="cuda").to(torch.bfloat16) for _ in weights.layers] for _ in range(2)]
    step.record()
    step.use(*parts)
    step.held = parts  # type: ignore[attr-defined]
    return step


def replay_us(step: GpuStep, length: int) -> float:
    step.set(length, length)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(STEPS):
        step.replay()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / STEPS


def parts_of(layer: LayerWeights, weights: Weights, length: int, zeros: float) -> dict[str, float]:
    """Bytes of each kernel of a layer, in their order."""
    active = 1 - zeros if layer.down_t is not None else 1.0
    found = {
        "qkv": sum(part.nbytes for part in layer.qkv),
        "attention": 2 * length * weights.key_heads * weights.head_dim * 2,
        "o": layer.o.nbytes,
    }
    if layer.coarse is None:
        found["gate, up"] = layer.gate.nbytes * (1 + active)
    else:
        found["list"], found["listed gate, up"] = layer.coarse.nbytes, layer.gate.nbytes * (LISTED + active)
    return found | {"down": layer.down.nbytes * active}


def kernel_us(step: GpuStep, names: list[str]) -> dict[str, float]:
    """The median time of each kernel by name; a step's kernels have these names, in this order."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(ROUNDS):
            step.replay()
        torch.cuda.synchronize()
    events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA and "_kernel" in e.name]
    events.sort(key=lambda event: event.time_range.start)
    times: dict[str, list[float]] = {}
    for place, event in enumerate(events):
        times.setdefault(names[place % len(names)], []).append(event.time_range.end - event.time_range.start)
    return {name: statistics.median(each) for name, each in times.items()}


def records(name: str, zeros: float, length: int) -> Iterator[dict[str, Any]]:
    from stocha_hf.decoding.gpu_plan import weights_of  # which need Triton
    from stocha_hf.decoding.gpu_step import GpuStep

    dense = weights_of(random_llama(name, torch.bfloat16, "cuda"))
    sparse = with_zeros(dense, zeros)
    for side, weights in {"dense": dense, "sparse": sparse, "predicted": with_prediction(sparse)}.items():
        early, late = (started(GpuStep(weights, early=early), length) for early in (True, False))
        times = [(replay_us(early, length), replay_us(late, length)) for _ in range(ROUNDS)]
        parts = parts_of(weights.layers[0], weights, length, zeros)
        names = ["embedding", *list(parts) * len(weights.layers), "lm_head", "next token"]
        late.set(length, length)
        found = kernel_us(late, names)
        sizes = parts | {"lm_head": float(weights.head.nbytes)}
        whole = len(weights.layers) * sum(parts.values()) + weights.head.nbytes
        step_us = [statistics.median(column) for column in zip(*times, strict=True)]
        yield {
            "model": f"random Llama {name}",
            "side": side,
            "zeros": zeros if side != "dense" else 0.0,
            "length": length,
            "step_us": step_us[0],
            "step_us_without_overlap": step_us[1],
            "gigabytes": whole / 1e9,
            "gbps": whole / step_us[0] / 1e3,
            "kernels_us": found,
            "kernels_gbps": {part: size / found[part] / 1e3 for part, size in sizes.items()},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", nargs="+", choices=SHAPES, default=["1b", "8b"], help="Llama shapes")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--length", type=int, default=512, help="tokens in the cache (default: 512)")
    parser.add_argument("--json", type=Path, help="lines are added to this file")
    args = parser.parse_args()
    check_gpu(parser, triton=True)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    for name in args.random:
        for record in records(name, args.sparsity, args.length):
            report(record, args.json)


if __name__ == "__main__":
    main()
