"""Time the sparse FFN against cuBLAS on a GPU, in CUDA graphs on both sides, and a whole model; random weights.

The dense FFN is SiLU's: three products by cuBLAS, the activation and a multiplication; `products` are the products
alone. An FFN's graph goes through so many copies of the weights that no cache holds them. Dense, sparse and reading
memory are measured in turn, ratios taken within a round, medians reported; `issued` is the module without a graph;
errors are ReLU's against float64, since FATReLU jumps. With several tokens, `zeros_of` says whether the share of zeros
is that of each token, drawn independently, so that the step needs many more neurons (`active`), or that of neurons
which no token of the step needs.

    python benchmarks/decode_gpu.py --json benchmarks/results/decode_gpu_h100.jsonl
    python benchmarks/decode_gpu.py --model 1b --json benchmarks/results/decode_gpu_h100.jsonl
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_records import check_gpu, report
from tqdm import tqdm
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from stocha_hf.decoding import triton_ffn
from stocha_hf.measurement.speed import measured_in_turn, ratio, threshold_for, timed
from stocha_hf.measurement.speed_models import SHAPES, decode_seconds, force_sparsity, random_llama
from stocha_hf.modeling_stocha import StochaConfig, patch_mlps
from stocha_hf.patching import patch

READ = 2**30  # bytes read for the bandwidth, and at least so many of weights that a graph goes through
REPLAYS = 5  # of a graph between two events
CALLS = 100  # without a graph


def recorded(function: Callable[[], object]) -> Callable[[], float]:
    """A function that replays a CUDA graph of this one; it returns the seconds a replay takes."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()

    def replay() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / REPLAYS

    return replay


def issued(function: Callable[[], object], calls: int) -> Callable[[], float]:
    """Without a graph: seconds until the GPU has done it, a call, over many calls."""

    def run() -> float:
        def all_calls() -> None:
            for _ in range(calls):
                function()
            torch.cuda.synchronize()

        torch.cuda.synchronize()
        return timed(all_calls) / calls

    return run


def module(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, cut: float | None) -> Any:
    """Llama's FFN; with a threshold its stocha counterpart."""
    width, size = gate.shape
    sizes = {"hidden_size": size, "intermediate_size": width, "num_attention_heads": 1, "num_key_value_heads": 1}
    with torch.device("meta"):
        mlp: Any = LlamaMLP(LlamaConfig(**sizes))
    for linear, weight in zip((mlp.gate_proj, mlp.up_proj, mlp.down_proj), (gate, up, down), strict=True):
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    if cut is not None:
        patch_mlps([mlp], StochaConfig(activation="fatrelu", threshold=cut, base="silu", inference="fatrelu"))
    return mlp.eval()


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def dense(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor] = F.silu,
) -> torch.Tensor:
    return F.linear(activation(F.linear(x, gate)) * F.linear(x, up), down)


def products(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The matrix products of the dense FFN, without what is between them."""
    F.linear(x, gate)
    return F.linear(F.linear(x, up), down)


def ffn_records(
    shape: tuple[int, int], dtype: torch.dtype, tokens: Sequence[int], shares: Sequence[float], rounds: int
) -> Iterator[dict[str, Any]]:
    """A record for each number of tokens and share of zeros of a gated FFN, shape (H, M); times are an FFN's."""
    size, width = shape
    copies = max(2, -(-READ // (3 * size * width * dtype.itemsize)))
    weights = [
        [torch.randn(width, size, device="cuda").mul_(size**-0.5).to(dtype) for _ in range(3)] for _ in range(copies)
    ]
    downs = [down_t.t().contiguous() for _, _, down_t in weights]
    memory = torch.ones(READ // 4, device="cuda")
    read = recorded(memory.sum)
    for count in tokens:
        x = torch.randn(count, size, device="cuda").to(dtype)
        gates = [F.linear(x, gate) for gate, _, _ in weights]
        for share in shares:
            for of in ("token", "step") if count > 1 and share > 0 else ("token",):
                cuts = [threshold_for(gate if of == "token" else gate.amax(0), share) for gate in gates]
                needed = [(gate > cut).any(0).float().mean() for gate, cut in zip(gates, cuts, strict=True)]
                active = torch.stack(needed).mean().item()
                told = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "tokens": count, "sparsity": share}
                yield told | {"zeros_of": of, "active": active} | _times(x, weights, downs, cuts, active, read, rounds)


def _times(
    x: torch.Tensor,
    weights: list[list[torch.Tensor]],
    downs: list[torch.Tensor],
    cuts: list[float],
    active: float,
    read: Callable[[], float],
    rounds: int,
) -> dict[str, Any]:
    def over_copies(function: Callable[..., object]) -> Callable[[], object]:
        return lambda: [function(x, *w, d, cut) for w, d, cut in zip(weights, downs, cuts, strict=True)]

    sides = {
        "dense": over_copies(lambda x, g, u, t, d, cut: dense(x, g, u, d)),
        "products": over_copies(lambda x, g, u, t, d, cut: products(x, g, u, d)),
        "sparse": over_copies(lambda x, g, u, t, d, cut: triton_ffn.ffn(x, g, u, t, "fatrelu", cut)),
    }
    graphs = {name: recorded(side) for name, side in sides.items()}
    natives = [module(w[0], w[1], d, None) for w, d in zip(weights, downs, strict=True)]
    stochas = [module(w[0], w[1], w[2].t(), cut) for w, cut in zip(weights, cuts, strict=True)]
    calls = {
        f"{name} issued": issued(lambda mlps=mlps: [mlp(x) for mlp in mlps], max(CALLS // len(weights), 1))
        for name, mlps in (("dense", natives), ("sparse", stochas))
    }
    seconds = measured_in_turn({"read": read, **graphs, **calls}, rounds)
    microseconds = {name: 1e6 * statistics.median(times) / len(weights) for name, times in seconds.items()}
    (gate, up, down_t), down = weights[0], downs[0]
    exact = dense(x.double(), gate.double(), up.double(), down.double(), F.relu)
    read_bytes = len(weights) * gate.nbytes * (1 + 2 * active)
    return {
        "dense_us": microseconds["dense"],
        "products_us": microseconds["products"],
        "sparse_us": microseconds["sparse"],
        "speedup": ratio(seconds, "dense", "sparse"),
        "speedup_over_products": ratio(seconds, "products", "sparse"),
        "dense_issued_us": microseconds["dense issued"],
        "sparse_issued_us": microseconds["sparse issued"],
        "dense_gbps": len(weights) * 3 * gate.nbytes / statistics.median(seconds["dense"]) / 1e9,
        "achieved_gbps": read_bytes / statistics.median(seconds["sparse"]) / 1e9,
        "read_gbps": READ / statistics.median(seconds["read"]) / 1e9,
        "dense_error": relative_error(dense(x, gate, up, down, F.relu), exact),
        "sparse_error": relative_error(triton_ffn.ffn(x, gate, up, down_t, "relu", 0.0), exact),
    }


def model_records(name: str, dtype: torch.dtype, share: float, rounds: int, new: int) -> Iterator[dict[str, Any]]:
    """A random Llama, as it is and under FATReLU with forced zeros, generating in turn: ms a token."""
    tokens = torch.randint(32000, (1, 64), device="cuda")
    dense_model, sparse_model = (random_llama(name, dtype, "cuda") for _ in range(2))
    patch(sparse_model, StochaConfig(activation="relu"))
    force_sparsity(sparse_model, share, tokens)
    for cache in (None, "static"):  # generate() compiles the step of a static cache, with CUDA graphs
        sides = {
            side: partial(decode_seconds, model, tokens, new, cache_implementation=cache)
            for side, model in (("dense", dense_model), ("sparse", sparse_model))
        }
        seconds = measured_in_turn(sides, rounds)
        yield {
            "model": f"random Llama {name}",
            "dtype": str(dtype).removeprefix("torch."),
            "forced_sparsity": share,
            "cache": cache or "dynamic",
            "new_tokens": new,
            "dense_ms": 1e3 * statistics.median(seconds["dense"]),
            "sparse_ms": 1e3 * statistics.median(seconds["sparse"]),
            "speedup": ratio(seconds, "dense", "sparse"),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="H,M; several times (default: 2048,8192 and 4096,14336)")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.0, 0.5, 0.8, 0.9, 0.95])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", choices=SHAPES, help="a whole model instead, with the largest --sparsity given")
    parser.add_argument("--new", type=int, default=64, help="tokens that a model decodes (default: 64)")
    parser.add_argument("--json", type=Path, help="lines are added to this file")
    args = parser.parse_args()
    check_gpu(parser, triton=True)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    dtype = getattr(torch, args.dtype)
    if args.model:
        records = model_records(args.model, dtype, max(args.sparsity), args.rounds, args.new)
    else:
        shapes = [tuple(map(int, shape.split(","))) for shape in args.shape or ["2048,8192", "4096,14336"]]
        records = (r for shape in shapes for r in ffn_records(shape, dtype, args.tokens, args.sparsity, args.rounds))
    for record in tqdm(records, unit="record", disable=None):
        report(record, args.json)


if __name__ == "__main__":
    main()
