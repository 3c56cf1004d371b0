"""Dense against sparse decode of whole models, side by side: a checkpoint, or a Llama of random weights.

benchmark("smollm2-sparse", prompt=64, new=64).speedup
benchmark_random("1b", torch.bfloat16, share=0.9)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stocha_hf.decoding.gate_prediction import predict_gates
from stocha_hf.errors import StochaError
from stocha_hf.measurement.provenance import origin
from stocha_hf.measurement.records import Benchmark
from stocha_hf.measurement.speed import READ, measured_in_turn, ratio, read_memory, threshold_for, timed
from stocha_hf.modeling_stocha import ACTIVATIONS, StochaConfig, stocha_mlps
from stocha_hf.patching import patch

SHAPES = {  # Llama shapes for random weights: hidden_size, intermediate_size, layers, heads, key heads
    "135m": (576, 1536, 30, 9, 3),
    "1b": (2048, 8192, 16, 32, 8),
    "3b": (3072, 8192, 28, 24, 8),
    "8b": (4096, 14336, 32, 32, 8),
}
VOCABULARIES = dict.fromkeys(SHAPES, 128256) | {"135m": 49152}


def random_llama(name: str, dtype: torch.dtype, device: str = "cpu") -> Any:
    """A native LlamaForCausalLM of a SHAPES row, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, width, layers, heads, key_heads = SHAPES[name]
    config = LlamaConfig(
        vocab_size=VOCABULARIES[name],
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
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    model.model.rotary_emb.__init__(config)  # its buffers are computed, not loaded
    model.model.rotary_emb.to(device)
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


class _Clock:
    """A streamer that notes when each token comes, on the CPU, also from a GPU; the first are the prompt's."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(self.now())

    def end(self) -> None:
        pass


def decode_seconds(
    model: Any, tokens: torch.Tensor, new: int, now: Callable[[], float] = time.perf_counter, **options: Any
) -> float:
    """Seconds, by the clock `now`, that a new token takes generate(**options) once the prompt is read, greedily."""
    clock = _Clock(now)
    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new + 1,
        eos_token_id=model.config.vocab_size,  # no token; a least length would search the vocabulary each time
        do_sample=False,
        pad_token_id=0,
        streamer=clock,
        **options,
    )
    return (clock.times[-1] - clock.times[1]) / (len(clock.times) - 2)


def decoding_in_turn(measures: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each measure returned in each round, and the seconds to read READ bytes; the first round is not counted."""
    return measured_in_turn({"read": partial(timed, read_memory()), **measures}, rounds)


def compare_decoding(name: str, dense: Any, sparse: Any, tokens: torch.Tensor, new: int, rounds: int = 5) -> Benchmark:
    """Time a native model and its stocha counterpart, decoding `new` tokens in turn after token ids [batch, length].

    The zeros are those of the tokens generated.
    """
    from stocha_hf.measurement.sparsity import SparsityMeter

    seconds = decoding_in_turn(
        {"dense": lambda: decode_seconds(dense, tokens, new), "sparse": lambda: decode_seconds(sparse, tokens, new)},
        rounds,
    )
    meter = SparsityMeter(sparse)
    with meter.record(), torch.no_grad():
        sparse(sparse.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False))
    zeros = meter.read()["mean"]
    meter.close()
    return Benchmark(
        model=name,
        dtype=str(dense.dtype).removeprefix("torch."),
        sparsity=zeros,
        batch=len(tokens),
        prompt=tokens.shape[1],
        new_tokens=new,
        dense_ms=1e3 * statistics.median(seconds["dense"]),
        sparse_ms=1e3 * statistics.median(seconds["sparse"]),
        speedup=ratio(seconds, "dense", "sparse"),
        tokens_per_second=len(tokens) / statistics.median(seconds["sparse"]),
        achieved_gbps=None,
        read_gbps=READ / statistics.median(seconds["read"]) / 1e9,
        threads=torch.get_num_threads(),
    )


def benchmark_random(
    shape: str,
    dtype: torch.dtype,
    share: float,
    *,
    prompt: int = 64,
    new: int = 64,
    recall: float | None = None,
    batch: int = 1,
) -> Benchmark:
    """Time a Llama of random weights, under ReLU against FATReLU thresholds that force a `share` of zeros.

    Args:
        shape: A row of SHAPES.
        dtype: Of the weights.
        share: Of zeros, from 0 to below 1.
        prompt: Tokens before decoding.
        new: Tokens to decode.
        recall: Skip gate rows as well, as in `benchmark`.
        batch: Sequences decoded at once.
    """
    tokens = torch.randint(VOCABULARIES[shape], (batch, prompt))
    dense, sparse = (random_llama(shape, dtype) for _ in range(2))
    patch(sparse, StochaConfig(activation="relu"))
    force_sparsity(sparse, share, tokens)
    _predict(sparse, recall)
    return replace(compare_decoding(f"random Llama {shape}", dense, sparse, tokens, new), forced_sparsity=share)


def _predict(model: Any, recall: float | None) -> None:
    """Predict the model's gates with this recall, 1 for exact results; None: not at all."""
    if recall is not None:
        predict_gates(model, None if recall == 1 else recall)


def benchmark(
    model: str | Path,
    *,
    dtype: str = "bfloat16",
    prompt: int = 64,
    new: int = 64,
    recall: float | None = None,
    batch: int = 1,
) -> Benchmark:
    """Time a converted checkpoint's decoding on this CPU against its native class, in turn.

    Args:
        model: Checkpoint folder or Hub id, converted for an activation that skips neurons.
        dtype: "bfloat16", "float16" or "float32".
        prompt: Tokens before decoding; they are drawn at random.
        new: Tokens to decode.
        recall: Skip gate rows as well, predicted with this recall, above 0.5; 1 gives exact results.
        batch: Sequences decoded at once.

    Returns:
        Milliseconds a step of both, and their ratio.

    Raises:
        StochaError: there is no such model, or its activation skips no neuron.
    """
    from stocha_hf.models import load_config, load_model

    name, precision = str(model), getattr(torch, dtype)
    inference = (getattr(load_config(name), "stocha", None) or {}).get("inference")
    if inference is None or ACTIVATIONS[inference].cut is None:
        raise StochaError(
            f"{name} decodes with {inference or 'its native activation'}, which skips no neuron: expected a model "
            "converted with --activation relu, fatrelu, relu2, drelu or shifted_relu"
        )
    sparse = load_model(name, dtype=precision).eval()
    _predict(sparse, recall)
    native: Any = next(base for base in type(sparse).__mro__ if f"Stocha{base.__name__}" == type(sparse).__name__)
    dense = native.from_pretrained(name, dtype=precision).eval()
    tokens = torch.randint(sparse.config.vocab_size, (batch, prompt))
    return replace(compare_decoding(name, dense, sparse, tokens, new), **origin(name, sparse))
