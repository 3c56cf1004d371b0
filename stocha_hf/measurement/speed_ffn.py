"""Dense against sparse decode of one FFN of random weights, side by side (bench.py).

The weights are cycled through so many copies that no cache holds them.

    for record in ffn_records((2048, 8192), torch.bfloat16, tokens=[1], sparsities=[0.9]): ...
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from stocha_hf.decoding import ops
from stocha_hf.decoding.ffn import gathered
from stocha_hf.decoding.gate_prediction import CoarseGate, candidates
from stocha_hf.decoding.thin_gate import ThinGate
from stocha_hf.measurement.speed import DENSE, READ, in_turn, ratio, read_memory, threshold_for
from stocha_hf.modeling_stocha import StochaConfig, patch_mlps

BYTES = 2**28  # of weights cycled through
COPIES = 256  # of the FFN at most
RECALL = 0.9  # of neurons at the threshold, of the faster prediction; of all active ones more are found
ROUNDS = 15


def ffn_records(
    shape: tuple[int, int],
    dtype: torch.dtype,
    tokens: Sequence[int],
    sparsities: Sequence[float],
    rounds: int = ROUNDS,
) -> Iterator[dict[str, Any]]:
    """A record for each number of tokens and share of zeros of a gated FFN of random weights, shape (H, M).

    `dense_ms` is PyTorch, `own_dense_ms` the sparse kernel without skipping, `torch_sparse_ms` the fallback in
    PyTorch's operations, `exact_ms` and `recalled_ms` skip gate rows as well (stocha_hf/decoding/gate_prediction.py);
    `achieved_gbps` counts the bytes that the sparse kernel must read, `read_gbps` is what the
    memory gave in the same rounds.
    """
    size, width = shape
    copies = min(max(BYTES // (3 * size * width * dtype.itemsize), 2), COPIES)
    weights = [[torch.randn(width, size).mul_(size**-0.5).to(dtype) for _ in range(3)] for _ in range(copies)]
    down = [w[2].t().contiguous() for w in weights]
    read = read_memory()
    for count in tokens:
        x = torch.randn(count, size).to(dtype)
        gates = [F.linear(x, gate) for gate, _, _ in weights]
        for share in sparsities:
            cuts = [threshold_for(gate, share) for gate in gates]
            yield _ffn_record(shape, share, x, weights, down, cuts, gates, read, rounds)


def _predicted(
    name: str,
    copies: Sequence[CoarseGate | ThinGate],
    x: torch.Tensor,
    gates: list[torch.Tensor],
    cuts: list[float],
    seconds: dict[str, list[float]],
) -> dict[str, float]:
    """What the FFN gains by copies of gates: time, share of gate rows still read, bytes, and active neurons found."""
    chosen = [candidates(gate, x, cut) for gate, cut in zip(copies, cuts, strict=True)]
    active = [gate > cut for gate, cut in zip(gates, cuts, strict=True)]
    found = sum((c.any(0) & a).sum().item() for c, a in zip(chosen, active, strict=True))
    exact_rows = statistics.mean(c.any(0).float().mean().item() for c in chosen)
    needed = statistics.mean(a.any(0).float().mean().item() for a in active)
    copied = copies[0].nbytes / (gates[0].shape[1] * x.shape[1] * x.element_size())
    return {
        f"{name}_ms": 1e3 * statistics.median(seconds[name]) / len(copies),
        f"speedup_of_{name}": ratio(seconds, "dense", name),
        f"{name}_gate_rows": exact_rows,
        f"{name}_bytes_of_dense": (copied + exact_rows + 2 * needed) / 3,
        f"{name}_recall": found / max(sum(a.sum().item() for a in active), 1),
    }


@torch.no_grad()
def _ffn_record(
    shape: tuple[int, int],
    share: float,
    x: torch.Tensor,
    weights: list[list[torch.Tensor]],
    down: list[torch.Tensor],
    cuts: list[float],
    gates: list[torch.Tensor],
    read: Callable[[], object],
    rounds: int,
) -> dict[str, Any]:
    def over_copies(function: Callable[..., object]) -> Callable[[], object]:
        def run() -> None:
            for (gate, up, down_t), dense_down, cut in zip(weights, down, cuts, strict=True):
                function(gate, up, down_t, dense_down, cut)

        return run

    def predicting(copies: Sequence[CoarseGate | ThinGate]) -> Callable[[], object]:
        def run() -> None:
            for (gate, up, down_t), cut, copy in zip(weights, cuts, copies, strict=True):
                ops.ffn(x, gate, up, down_t, "fatrelu", cut, copy)

        return run

    mlps = [_mlp(w[0], w[1], d, cut) for w, d, cut in zip(weights, down, cuts, strict=True)]
    exact = [CoarseGate.of(gate) for gate, _, _ in weights]
    recalled = [ThinGate.of(mlp.gate_proj, RECALL) for mlp in mlps]
    seconds = in_turn(
        {
            "read": read,
            "dense": over_copies(
                lambda g, u, t, d, cut: F.linear(F.threshold(F.linear(x, g), cut, 0.0) * F.linear(x, u), d)
            ),
            "sparse": over_copies(lambda g, u, t, d, cut: ops.ffn(x, g, u, t, "fatrelu", cut)),
            "exact": predicting(exact),
            "recalled": predicting(recalled),
            "own dense": over_copies(lambda g, u, t, d, cut: ops.ffn(x, g, u, t, "fatrelu", DENSE)),
            "torch sparse": lambda: [_in_pytorch(mlp, x) for mlp in mlps],
        },
        rounds,
    )
    active = statistics.mean((g > cut).any(0).float().mean().item() for g, cut in zip(gates, cuts, strict=True))
    size, width = shape
    read_bytes = len(weights) * size * width * x.element_size() * (1 + 2 * active)
    milliseconds = {name: 1e3 * statistics.median(times) / len(weights) for name, times in seconds.items()}
    return {
        "shape": [size, width],
        "dtype": str(x.dtype).removeprefix("torch."),
        "tokens": len(x),
        "sparsity": share,
        "active": active,
        "dense_ms": milliseconds["dense"],
        "sparse_ms": milliseconds["sparse"],
        "speedup": ratio(seconds, "dense", "sparse"),
        "own_dense_ms": milliseconds["own dense"],
        "speedup_over_own_dense": ratio(seconds, "own dense", "sparse"),
        **_predicted("exact", exact, x, gates, cuts, seconds),
        **_predicted("recalled", recalled, x, gates, cuts, seconds),
        "torch_sparse_ms": milliseconds["torch sparse"],
        "speedup_of_torch_sparse": ratio(seconds, "dense", "torch sparse"),
        "achieved_gbps": read_bytes / statistics.median(seconds["sparse"]) / 1e9,
        "read_gbps": READ / statistics.median(seconds["read"]) / 1e9,
        "share_of_read": read_bytes / READ * ratio(seconds, "read", "sparse"),
        "threads": torch.get_num_threads(),
    }


def _in_pytorch(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """What an MLP does where there is no compiler."""
    if len(x) == 1:
        return gathered(mlp, x)
    return mlp.down_proj(mlp.hidden(mlp.gate_proj(x), mlp.up_proj(x)))


def _mlp(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, cut: float) -> Any:
    """A StochaMLP of these matrices."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    width, size = gate.shape
    with torch.device("meta"):
        mlp: Any = LlamaMLP(
            LlamaConfig(hidden_size=size, intermediate_size=width, num_attention_heads=1, num_key_value_heads=1)
        )
    for linear, weight in zip((mlp.gate_proj, mlp.up_proj, mlp.down_proj), (gate, up, down), strict=True):
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    patch_mlps([mlp], StochaConfig(activation="fatrelu", base="silu", inference="fatrelu"))
    mlp.threshold = cut  # which a config cannot say: below 0 where few zeros are forced
    return mlp.eval()
