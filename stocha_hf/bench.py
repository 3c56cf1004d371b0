"""Dense against sparse decode, measured side by side in one run: one FFN, or a whole model.

Timings on shared machines drift by more than the differences that matter. So everything compared is run in turn,
round after round, a ratio is taken within each round, and medians are reported, also of the memory's read bandwidth,
which bounds every kernel here. FFN weights are cycled through so many copies that no cache holds them.

    for record in ffn_records((2048, 8192), torch.bfloat16, tokens=[1], sparsities=[0.9]): ...
    decode_record(lambda: load_native(folder), lambda: load_model(folder), prompt=64, new=64)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from stocha_hf.errors import StochaError
from stocha_hf.modeling_stocha import ACTIVATIONS, StochaConfig, patch, patch_mlps, stocha_mlps
from stocha_hf.sparse import ops
from stocha_hf.sparse.build import kernels
from stocha_hf.sparse.coarse import CoarseGate, candidates, predict_gates

BYTES = 2**28  # of FFN weights cycled through
COPIES = 256  # of the FFN at most
RECALL = 0.999  # of neurons at the threshold, of the faster prediction by a coarse gate
READ = 2**28  # bytes read for the bandwidth
ROUNDS = 15
SHAPES = {  # Llama shapes for random weights: hidden_size, intermediate_size, layers, heads, key heads
    "1b": (2048, 8192, 16, 32, 8),
    "3b": (3072, 8192, 28, 24, 8),
}
VOCABULARY = 128256
DENSE = -1e30  # a threshold that every gate is above


def timed(function: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for measured in range(rounds + 1):
        for name, function in functions.items():
            spent = timed(function)
            if measured:
                seconds[name].append(spent)
    return seconds


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """Median over rounds of one function's time over another's."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def read_memory() -> Callable[[], object]:
    """A function that reads READ bytes with all threads."""
    data, library = torch.zeros(READ, dtype=torch.uint8), kernels()
    if library is None:
        return data.view(torch.int64).sum
    return lambda: library.stocha_read(data.data_ptr(), READ, torch.get_num_threads())


def ffn_records(
    shape: tuple[int, int],
    dtype: torch.dtype,
    tokens: Sequence[int],
    sparsities: Sequence[float],
    rounds: int = ROUNDS,
) -> Iterator[dict[str, Any]]:
    """A record for each number of tokens and share of zeros of a gated FFN of random weights, shape (H, M).

    `dense_ms` is PyTorch, `own_dense_ms` the sparse kernel without skipping, `torch_sparse_ms` the fallback in
    PyTorch's operations, `exact_ms` and `recalled_ms` skip gate rows as well (stocha_hf/sparse/coarse.py);
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


def threshold_for(gates: torch.Tensor, share: float) -> float:
    """The threshold that zeroes this share of the gates."""
    count = round(share * gates.numel())
    return gates.flatten().float().kthvalue(count).values.item() if count else DENSE


def _predicted(
    name: str,
    coarse: list[CoarseGate],
    x: torch.Tensor,
    gates: list[torch.Tensor],
    cuts: list[float],
    seconds: dict[str, list[float]],
) -> dict[str, float]:
    """What the FFN gains by a coarse gate: time, share of gate rows still read, bytes, and active neurons found."""
    chosen = [candidates(gate, x, cut) for gate, cut in zip(coarse, cuts, strict=True)]
    active = [gate > cut for gate, cut in zip(gates, cuts, strict=True)]
    found = sum((c.any(0) & a).sum().item() for c, a in zip(chosen, active, strict=True))
    exact_rows = statistics.mean(c.any(0).float().mean().item() for c in chosen)
    needed = statistics.mean(a.any(0).float().mean().item() for a in active)
    element = x.element_size()
    return {
        f"{name}_ms": 1e3 * statistics.median(seconds[name]) / len(coarse),
        f"speedup_of_{name}": ratio(seconds, "dense", name),
        f"{name}_gate_rows": exact_rows,
        f"{name}_bytes_of_dense": (1 / element + exact_rows + 2 * needed) / 3,
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

    def predicting(coarse: list[CoarseGate]) -> Callable[[], object]:
        def run() -> None:
            for (gate, up, down_t), cut, copy in zip(weights, cuts, coarse, strict=True):
                ops.ffn(x, gate, up, down_t, "fatrelu", cut, copy)

        return run

    without_kernels = [_mlp(w[0], w[1], d, cut) for w, d, cut in zip(weights, down, cuts, strict=True)]
    exact, recalled = ([CoarseGate.of(gate, recall) for gate, _, _ in weights] for recall in (None, RECALL))
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
            "torch sparse": lambda: [mlp(x) for mlp in without_kernels],
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


def _mlp(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, cut: float) -> Any:
    """A StochaMLP of these matrices that decodes as it does without stocha_hf installed."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    width, size = gate.shape
    with torch.device("meta"):
        mlp: Any = LlamaMLP(
            LlamaConfig(hidden_size=size, intermediate_size=width, num_attention_heads=1, num_key_value_heads=1)
        )
    for linear, weight in zip((mlp.gate_proj, mlp.up_proj, mlp.down_proj), (gate, up, down), strict=True):
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    patch_mlps([mlp], StochaConfig(activation="fatrelu", threshold=cut, base="silu", inference="fatrelu"))
    mlp.kernels = None
    return mlp.eval()


def random_llama(name: str, dtype: torch.dtype) -> Any:
    """A native LlamaForCausalLM of a SHAPES row, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, width, layers, heads, key_heads = SHAPES[name]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=hidden // heads,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device="cpu")
    model.tie_weights()
    model.model.rotary_emb.__init__(config)  # its buffers are computed, not loaded
    for parameter in model.parameters():
        parameter.data.fill_(1.0) if parameter.dim() == 1 else parameter.data.normal_(0, 0.02)
    return model.eval()


@torch.no_grad()
def force_sparsity(model: Any, share: float, tokens: torch.Tensor) -> None:
    """Give a patched model FATReLU thresholds that zero this share of each layer's hidden vector on these tokens."""
    handles = []
    for mlp in stocha_mlps(model):
        mlp.activation = mlp.inference = "fatrelu"

        def choose(module: Any, args: Any, gates: torch.Tensor, mlp: Any = mlp) -> None:
            mlp.threshold = threshold_for(gates, share)

        handles.append(mlp.gate_proj.register_forward_hook(choose))
    model(tokens)
    for handle in handles:
        handle.remove()


def decode_seconds(model: Any, tokens: torch.Tensor, new: int) -> float:
    """Seconds a new token takes generate() once the prompt is read, greedily."""
    times: list[float] = []

    def note(*args: Any, **kwargs: Any) -> torch.Tensor:
        times.append(time.perf_counter())
        return torch.zeros(len(tokens), dtype=torch.bool)

    from transformers import StoppingCriteriaList

    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new + 1,
        min_new_tokens=new + 1,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([note]),
    )
    return (times[-1] - times[0]) / (len(times) - 1)


def decoding_in_turn(measures: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each measure returned in each round, and the seconds to read READ bytes; the first round is not counted."""
    read = read_memory()
    seconds: dict[str, list[float]] = {"read": [], **{name: [] for name in measures}}
    for measured in tqdm(range(rounds + 1), desc="Decoding", unit="round", disable=None):
        spent = {"read": timed(read), **{name: measure() for name, measure in measures.items()}}
        for name, value in spent.items():
            seconds[name] += [value] * (measured > 0)
    return seconds


def decode_record(
    name: str, dense: Any, sparse: Any, tokens: torch.Tensor, new: int, rounds: int = 5
) -> dict[str, Any]:
    """A native model and its stocha counterpart, decoding in turn; the zeros are those of the tokens generated."""
    from stocha_hf.sparsity import SparsityMeter

    seconds = decoding_in_turn(
        {"dense": lambda: decode_seconds(dense, tokens, new), "sparse": lambda: decode_seconds(sparse, tokens, new)},
        rounds,
    )
    meter = SparsityMeter(sparse)
    with meter.record(), torch.no_grad():
        sparse(sparse.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False))
    meter.close()
    return {
        "model": name,
        "dtype": str(dense.dtype).removeprefix("torch."),
        "sparsity": meter.read()["mean"],
        "prompt": tokens.shape[1],
        "new_tokens": new,
        "dense_ms": 1e3 * statistics.median(seconds["dense"]),
        "sparse_ms": 1e3 * statistics.median(seconds["sparse"]),
        "speedup": ratio(seconds, "dense", "sparse"),
        "tokens_per_second": 1 / statistics.median(seconds["sparse"]),
        "achieved_gbps": None,
        "read_gbps": READ / statistics.median(seconds["read"]) / 1e9,
        "threads": torch.get_num_threads(),
    }


def random_decode_record(
    shape: str, dtype: torch.dtype, share: float, prompt: int, new: int, recall: float | None = None
) -> dict[str, Any]:
    """decode_record of a random Llama under ReLU, the sparse one's FATReLU thresholds forced to a share of zeros."""
    tokens = torch.randint(VOCABULARY, (1, prompt))
    dense, sparse = (random_llama(shape, dtype) for _ in range(2))
    patch(sparse, StochaConfig(activation="relu"))
    force_sparsity(sparse, share, tokens)
    predict(sparse, recall)
    return decode_record(f"random Llama {shape}", dense, sparse, tokens, new) | {"forced_sparsity": share}


def predict(model: Any, recall: float | None) -> None:
    """Give the model coarse gates of this recall, 1 for exact ones; None for none."""
    if recall is not None:
        predict_gates(model, None if recall == 1 else recall)


def checkpoint_record(
    folder: str, dtype: torch.dtype, prompt: int, new: int, recall: float | None = None
) -> dict[str, Any]:
    """decode_record of a converted checkpoint and its native class. Raises StochaError for another one."""
    from stocha_hf.loading import load_config, load_model

    inference = (getattr(load_config(folder), "stocha", None) or {}).get("inference")
    if inference is None or ACTIVATIONS[inference].cut is None:
        raise StochaError(
            f"{folder} decodes with {inference or 'its native activation'}, which skips no neuron: expected a model "
            "converted with --activation relu, fatrelu, relu2, drelu or shifted_relu"
        )
    sparse = load_model(folder, dtype=dtype).eval()
    predict(sparse, recall)
    native: Any = next(base for base in type(sparse).__mro__ if f"Stocha{base.__name__}" == type(sparse).__name__)
    dense = native.from_pretrained(folder, dtype=dtype).eval()
    tokens = torch.randint(sparse.config.vocab_size, (1, prompt))
    return decode_record(folder, dense, sparse, tokens, new)
