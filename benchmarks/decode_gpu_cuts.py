"""Time whole steps on a GPU that cut inputs against the dense step: replays of both graphs in turn, one token each.

Models are Llamas of random weights. Thresholds are quantiles of each projection's inputs on a random prompt, one for
each layer; what a step then keeps is counted on its own inputs. So `bytes` is the share of the decoder blocks' weights
that the steps which were timed need. Keys and values are the prompt's.

    python benchmarks/decode_gpu_cuts.py --random 8b 1b 0.5b --cut 0.4 0.5 0.6 --json cuts.jsonl
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gpu_records import check_gpu, report

from stocha_hf.cuts import PROJECTIONS
from stocha_hf.decoding.gpu_weights import CutWeights, LayerWeights, Weights
from stocha_hf.measurement.speed_models import SHAPES, VOCABULARIES, random_llama

if TYPE_CHECKING:
    from stocha_hf.decoding.gpu_step import GpuStep

STEPS = 32  # between two events
COUNTED = 4  # steps whose inputs are counted
ROUNDS = 9
SAMPLE = 2**20  # entries that a quantile is taken of
SHAPES["0.5b"], VOCABULARIES["0.5b"] = (896, 4864, 24, 14, 2), 151936  # Qwen2.5-0.5B's


def inputs_of(model: Any, tokens: torch.Tensor) -> tuple[list[dict[str, torch.Tensor]], Any]:
    """Sorted absolute inputs of each layer's projections on these tokens, and the cache that they leave."""
    found: list[dict[str, torch.Tensor]] = []
    handles = []
    for layer in model.model.layers:
        found.append({})
        for name, module in layer.named_modules():
            name = name.rpartition(".")[-1]
            if name in PROJECTIONS:

                def note(module: Any, args: Any, into: Any = found[-1], name: str = name) -> None:
                    flat = args[0].flatten().abs().float()
                    into[name] = flat[:: -(-len(flat) // SAMPLE)].sort().values

                handles.append(module.register_forward_pre_hook(note))
    cache = model(tokens, use_cache=True).past_key_values
    for handle in handles:
        handle.remove()
    return found, cache


def with_cuts(weights: Weights, turned: list[dict[str, torch.Tensor]], found: Any, share: float) -> Weights:
    """The same with each projection's input cut up to its quantile."""
    layers = []
    for layer, matrices, inputs in zip(weights.layers, turned, found, strict=True):
        limits = {name: inputs[name][int(share * len(inputs[name]))].item() for name in PROJECTIONS}
        layers.append(replace(layer, cuts={name: CutWeights(matrices[name], limits[name]) for name in PROJECTIONS}))
    return replace(weights, layers=layers)


def turned(layer: LayerWeights) -> dict[str, torch.Tensor]:
    """Its matrices, an input a row."""
    matrices = *layer.qkv, layer.o, layer.gate, layer.up, layer.down
    return {name: matrix.t().contiguous() for name, matrix in zip(PROJECTIONS, matrices, strict=True)}


def started(weights: Weights, cache: Any) -> GpuStep:
    """A step whose keys and values are a copy of these, with room."""
    from stocha_hf.decoding.gpu_step import GpuStep  # which needs Triton

    step = GpuStep(weights)
    step.record()
    parts = [
        [torch.nn.functional.pad(part[0], (0, 0, 0, 2 * STEPS)) for part in (layer.keys, layer.values)]
        for layer in cache.layers
    ]
    step.use(*zip(*parts, strict=True))
    step.held = parts  # type: ignore[attr-defined]
    return step


def restart(step: GpuStep, cache: Any, token: int) -> None:
    step.set(cache.get_seq_length(), cache.get_seq_length(), tokens=[token])


def replay_us(step: GpuStep, cache: Any, token: int) -> float:
    restart(step, cache, token)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(STEPS):
        step.replay()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / STEPS


def bytes_of_steps(step: GpuStep, cache: Any, token: int) -> float:
    """The share of the decoder blocks' weights that steps need, by their own inputs."""
    from stocha_hf.decoding.gpu_step import GpuStep  # which needs Triton

    needed: list[float] = []
    whole: list[float] = []
    attention, ffn, down = PROJECTIONS[:3], PROJECTIONS[4:6], PROJECTIONS[6:]

    def count(layer: LayerWeights, names: Sequence[str], x: torch.Tensor, norm: torch.Tensor | None = None) -> None:
        if norm is not None:
            scale = torch.rsqrt(x.float().square().mean() + step.weights.eps)
            x = (x.float() * scale).to(x.dtype) * norm
        for name in names:
            cut = layer.cuts[name]
            needed.append(cut.weight.nbytes * (x.abs() > cut.threshold).float().mean().item())
            whole.append(cut.weight.nbytes)

    class Counting(GpuStep):
        def _qkv(self, layer: LayerWeights) -> None:
            count(layer, attention, self.x, layer.input_norm)
            super()._qkv(layer)

        def _o(self, layer: LayerWeights) -> None:
            count(layer, ["o_proj"], self.attended)
            super()._o(layer)

        def _ffn(self, layer: LayerWeights, counts: torch.Tensor) -> None:
            count(layer, ffn, self.middle, layer.ffn_norm)
            super()._ffn(layer, counts)
            count(layer, down, self.hidden)

    restart(step, cache, token)
    kind, step.__class__ = step.__class__, Counting
    for _ in range(COUNTED):
        step.launch()
    step.__class__ = kind
    return sum(needed) / sum(whole)


def records(name: str, shares: Sequence[float], length: int) -> Iterator[dict[str, Any]]:
    from stocha_hf.decoding.gpu_plan import weights_of  # which needs Triton

    model = random_llama(name, torch.bfloat16, "cuda")
    tokens = torch.randint(32000, (1, length), device="cuda")
    found, cache = inputs_of(model, tokens)
    dense = weights_of(model)
    matrices = [turned(layer) for layer in dense.layers]
    steps = {0.0: started(dense, cache)}
    steps |= {share: started(with_cuts(dense, matrices, found, share), cache) for share in shares}
    token = int(tokens[0, -1])
    times: dict[float, list[float]] = {share: [] for share in steps}
    for _ in range(ROUNDS):
        for share, step in steps.items():
            times[share].append(replay_us(step, cache, token))
    for share in shares:
        ratios = [a / b for a, b in zip(times[0.0], times[share], strict=True)]
        yield {
            "model": f"random Llama {name}",
            "prompt": length,
            "cut": share,
            "bytes": bytes_of_steps(steps[share], cache, token),
            "dense_us": statistics.median(times[0.0]),
            "cut_us": statistics.median(times[share]),
            "cut_over_dense": statistics.median(ratios),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", nargs="+", choices=SHAPES, default=["8b"], help="Llama shapes")
    parser.add_argument("--cut", nargs="+", type=float, default=[0.4, 0.5, 0.6], help="shares of inputs")
    parser.add_argument("--length", type=int, default=512, help="tokens in the cache (default: 512)")
    parser.add_argument("--json", type=Path, help="lines are added to this file")
    args = parser.parse_args()
    check_gpu(parser, triton=True)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    for name in args.random:
        for record in records(name, args.cut, args.length):
            report(record, args.json)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
