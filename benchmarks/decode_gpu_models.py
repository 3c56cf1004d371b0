"""Time whole models on a GPU, batch 1: transformers, and the own step dense, sparse and with predicted gates.

All of them generate greedily after the same prompt, in turn, in one process, with a static cache. `transformers` is
the native class, whose step generate() compiles; the others are the patched model, whose steps are replays of a graph:
`dense` with the native activation, so that what the step gains and what zeros gain are told apart. A model of random
weights gets FATReLU thresholds that force the zeros, and a random prompt; a checkpoint gets this file as its prompt.
`same_text` is how many tokens agree with those of transformers' loop around the same sparse model, until the first
that differs; `same_text_dense` the same with the native activation.

    python benchmarks/decode_gpu_models.py --random 8b --json benchmarks/results/decode_gpu_models.jsonl
    python benchmarks/decode_gpu_models.py MODEL --prompt 512
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_records import check_gpu, report
from transformers import AutoTokenizer

from stocha_hf.decoding.gate_prediction import predict_gates
from stocha_hf.measurement.speed import measured_in_turn, ratio
from stocha_hf.measurement.speed_models import SHAPES, decode_seconds, force_sparsity, random_llama
from stocha_hf.modeling_stocha import StochaConfig, StochaMLP, stocha_mlps
from stocha_hf.models import load_model
from stocha_hf.patching import patch


def sharing(model: Any) -> Any:
    """A copy of a model that has the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def random_models(name: str, share: float, tokens: torch.Tensor, dtype: torch.dtype) -> tuple[Any, Any]:
    """A native model, and one that shares its weights, under FATReLU with forced zeros."""
    native = random_llama(name, dtype, "cuda")
    sparse = sharing(native)
    patch(sparse, StochaConfig(activation="relu"))
    force_sparsity(sparse.eval(), share, tokens)
    return native, sparse


def loaded_models(folder: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A converted checkpoint in its native class, and as it is."""
    sparse: Any = load_model(folder, dtype=dtype).to("cuda").eval()
    native: Any = next(base for base in type(sparse).__mro__ if f"Stocha{base.__name__}" == type(sparse).__name__)
    return native.from_pretrained(folder, dtype=dtype).to("cuda").eval(), sparse


def prompt_of(name: str, vocabulary: int, length: int) -> torch.Tensor:
    """Token ids [1, length]."""
    if not Path(name).is_dir():
        return torch.randint(min(vocabulary, 32000), (1, length), device="cuda")
    ids = AutoTokenizer.from_pretrained(name)(Path(__file__).read_text())["input_ids"]
    return torch.tensor([ids[:length]], device="cuda")


def told(model: Any, tokens: torch.Tensor, new: int) -> list[int]:
    """What it generates."""
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": model.config.vocab_size, "pad_token_id": 0}
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0, tokens.shape[1] :].tolist()


def same_text(model: Any, tokens: torch.Tensor, new: int) -> int:
    """How many tokens the own step and transformers' loop give alike before the first that differs."""
    ours = told(model, tokens, new)
    runtime, StochaMLP.runtime = StochaMLP.runtime, None
    try:
        theirs = told(model, tokens, new)
    finally:
        StochaMLP.runtime = runtime
    return next((place for place, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), new)


@torch.no_grad()
def zeros_of(model: Any, tokens: torch.Tensor, new: int) -> float:
    """The share of zeros of hidden vectors on the tokens generated."""
    from stocha_hf.measurement.sparsity import SparsityMeter

    meter = SparsityMeter(model)
    text = torch.tensor([told(model, tokens, new)], device=tokens.device)
    with meter.record():
        model(torch.cat([tokens, text], 1))
    found = meter.read()["mean"]
    meter.close()
    return found


def records(name: str, native: Any, sparse: Any, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    tokens = prompt_of(name, native.config.vocab_size, args.prompt)
    dense, predicted = sharing(sparse), sharing(sparse)
    for mlp in stocha_mlps(dense):
        mlp.inference = "silu"
    predict_gates(predicted, args.recall)
    models = {"transformers": native, "dense": dense, "sparse": sparse, "predicted": predicted}
    sides: dict[str, Callable[[], float]] = {
        side: partial(decode_seconds, model, tokens, args.new, cache_implementation="static")
        for side, model in models.items()
    }
    seconds = measured_in_turn(sides, args.rounds)
    yield {
        "model": name,
        "dtype": args.dtype,
        "prompt": tokens.shape[1],
        "new_tokens": args.new,
        "zeros": zeros_of(sparse, tokens, args.new),
        "recall": args.recall,
        "same_text": same_text(sparse, tokens, args.new),
        "same_text_dense": same_text(dense, tokens, args.new),
        **{f"{side}_ms": 1e3 * statistics.median(times) for side, times in seconds.items()},
        **{f"{side}_over_transformers": ratio(seconds, "transformers", side) for side in list(sides)[1:]},
        **{f"{side}_over_dense": ratio(seconds, "dense", side) for side in list(sides)[2:]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="converted checkpoint folders")
    parser.add_argument("--random", nargs="+", choices=SHAPES, default=[], help="Llama shapes of random weights")
    parser.add_argument("--sparsity", type=float, default=0.9, help="zeros forced on random weights (default: 0.9)")
    parser.add_argument("--recall", type=float, default=0.999, help="of predicted gates (default: 0.999)")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--json", type=Path, help="lines are added to this file")
    args = parser.parse_args()
    check_gpu(parser, triton=True)
    torch.manual_seed(0)
    tokens, dtype = torch.randint(32000, (1, args.prompt), device="cuda"), getattr(torch, args.dtype)
    makers: dict[str, Callable[[], tuple[Any, Any]]] = {
        f"random Llama {name}": lambda name=name: random_models(name, args.sparsity, tokens, dtype)
        for name in args.random
    }
    makers |= {folder: lambda folder=folder: loaded_models(folder, dtype) for folder in args.models}
    for name, make in makers.items():
        for record in records(name, *make(), args):
            report(record, args.json)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
