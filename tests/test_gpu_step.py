"""A GPU's whole decode step and generate() with it, against transformers' own way.

They need a GPU with Triton. On a CPU with Triton installed, TRITON_INTERPRET=1 runs the kernels there, in the same
loop, with launches in the place of a graph's replays. Elsewhere only what needs no kernel is tested.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import tiny_model
from transformers import DynamicCache, StaticCache

from stocha_hf.cuts import PROJECTIONS, InputCuts
from stocha_hf.cuts_stocha import cut_inputs
from stocha_hf.decoding import calls, generation, lossless, rounds, triton_ffn
from stocha_hf.decoding.copies import Copies
from stocha_hf.decoding.gate_prediction import predict_gates
from stocha_hf.decoding.packed_gate import PackedGate
from stocha_hf.errors import StochaError
from stocha_hf.modeling_stocha import StochaConfig, StochaMLP, stocha_mlps
from stocha_hf.patching import patch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not CUDA
needs_triton = pytest.mark.skipif(
    triton_ffn.triton is None or not (CUDA or INTERPRETED), reason="no GPU with Triton, and no TRITON_INTERPRET=1"
)
FEW = {"ROWS": 16, "SPLITS": 2, "TILE": 16}  # programs are what takes the interpreter's time
PROMPT = torch.tensor([[5, 9, 13, 21, 34, 8, 55, 40]], device=DEVICE)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each step: tokens in the cache before it. Without a GPU its stand-ins are the interpreter's."""
    from stocha_hf.decoding import gpu_tiles
    from stocha_hf.decoding.gpu_step import GpuStep

    made: list[int] = []
    replay = GpuStep.launch if INTERPRETED else GpuStep.replay

    def counted(step: Any) -> None:
        made.append(int(step.state[1]))
        replay(step)

    monkeypatch.setattr(GpuStep, "replay", counted)
    if INTERPRETED:
        for kind in ("TILES", "SMALL", "FOUR", "EIGHT", "SIXTEEN"):
            tiles = getattr(gpu_tiles, kind).items()
            few = {name: {key: FEW.get(key, value) for key, value in tile.items()} for name, tile in tiles}
            monkeypatch.setattr(gpu_tiles, kind, few)
        monkeypatch.setattr(GpuStep, "record", lambda step: setattr(step, "graph", "launches"))
        monkeypatch.setitem(generation.LOOPS, "cpu", generation._on_gpu)
        monkeypatch.setitem(calls.CALLS, "cpu", calls._on_gpu)
        monkeypatch.setitem(lossless.LOOPS, "cpu", lossless._on_gpu)
    return made


def model_of(
    model_type: str = "llama", activation: str = "relu", inputs: InputCuts | None = None, **overrides: Any
) -> Any:
    torch.manual_seed(0)
    model = tiny_model(model_type, **overrides)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    patch(model, StochaConfig(activation="relu", inputs=inputs))
    model.eval().to(DEVICE)
    if activation != "relu":
        model.stocha_mode(activation).__enter__()
    return model


def slowly(monkeypatch: pytest.MonkeyPatch, function: Any, *args: Any, **kwargs: Any) -> Any:
    """A call without this package's kernels and loops."""
    with monkeypatch.context() as patched:
        patched.setattr(StochaMLP, "runtime", None)
        return function(*args, **kwargs)


def greedy(new: int, **options: Any) -> dict[str, Any]:
    mask = torch.ones_like(PROMPT)
    known = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1_000}
    return known | {"max_new_tokens": new} | options


@needs_triton
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_steps_give_transformers_logits(
    model_type: str, activation: str, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(model_type, activation)
    new = 4 if INTERPRETED else 40
    options = greedy(new, return_dict_in_generate=True, output_logits=True)
    found = model.generate(PROMPT, **options)
    assert steps == list(range(PROMPT.shape[1], PROMPT.shape[1] + new - 1))
    expected = slowly(monkeypatch, model.generate, PROMPT, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for logits, others in zip(found.logits, expected.logits, strict=True):
        assert (logits - others).norm() <= 1e-5 * others.norm()
    for layer, other in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert layer.keys.shape == other.keys.shape and torch.allclose(layer.keys, other.keys, atol=1e-5)
        assert torch.allclose(layer.values, other.values, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("cache", [None, "static"])
def test_the_gpu_chooses_greedy_tokens(cache: str | None, steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from stocha_hf.decoding.gpu_loop import AHEAD

    model, new = model_of(), 5 if INTERPRETED else 60
    options = greedy(new, disable_compile=True, cache_implementation=cache)
    expected = slowly(monkeypatch, model.generate, PROMPT, **options)
    assert torch.equal(model.generate(PROMPT, **options), expected)
    assert len(steps) == new - 1
    steps.clear()
    end = int(expected[0, PROMPT.shape[1] + 2])
    given: list[int] = []
    streamer = SimpleNamespace(
        put=lambda tokens: given.extend(tokens.flatten().tolist()), end=lambda: given.append(-1)
    )
    found = model.generate(PROMPT, **options | {"eos_token_id": end}, streamer=streamer)
    assert [*found[0].tolist(), -1] == given
    assert torch.equal(found, expected[:, : found.shape[1]]) and int(found[0, -1]) == end
    assert len(steps) < found.shape[1] - PROMPT.shape[1] + AHEAD - 1, "few steps after the end"


@needs_triton
def test_sampling_padding_and_a_cache_of_an_earlier_call(steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, new = model_of(), 4 if INTERPRETED else 20

    def sampled(**options: Any) -> Any:
        torch.manual_seed(1)
        return model.generate(PROMPT, **greedy(new, do_sample=True, top_k=5, temperature=0.8) | options)

    padded = {"attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]], device=DEVICE)}
    for options in ({}, padded):
        found = sampled(**options)
        assert len(steps) == new - 1
        assert torch.equal(found, slowly(monkeypatch, sampled, **options))
        steps.clear()
    options = greedy(2 * new) | {"attention_mask": None}
    whole = slowly(monkeypatch, model.generate, PROMPT, **options)
    with torch.no_grad():
        cache = model(PROMPT[:, :5], use_cache=True).past_key_values
    half = model.generate(PROMPT, past_key_values=cache, **options | {"max_new_tokens": new})
    assert torch.equal(model.generate(half, past_key_values=cache, **options | {"max_new_tokens": new}), whole)
    assert len(steps) == 2 * new - 2


@needs_triton
def test_a_batch_is_left_to_transformers(steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    ids = torch.cat([PROMPT, PROMPT.flip(1)])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = greedy(3, attention_mask=mask)
    expected = slowly(monkeypatch, model.generate, ids, **options)
    assert torch.equal(model.generate(ids, **options), expected) and not steps


@needs_triton
def test_what_must_be_called_is_called(steps: list[int]) -> None:
    model = model_of()
    calls: list[int] = []
    handle = model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *args: calls.append(1))
    model.generate(PROMPT, **greedy(3))
    assert len(calls) == 3 and not steps
    handle.remove()
    model.generate(PROMPT, **greedy(3))
    assert len(steps) == 2
    model.model.layers[0].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight.data.clone()
    before = model.__dict__["gpu_plan"]
    model.generate(PROMPT, **greedy(3))
    assert model.__dict__["gpu_plan"] is not before and len(steps) == 4


@needs_triton
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_calls_of_a_few_tokens_give_transformers_logits(cache: str, steps: list[int]) -> None:
    model = model_of("mistral", sliding_window=6)
    ids = torch.cat([PROMPT, PROMPT.flip(1)], 1)
    with torch.enable_grad():
        expected = model(ids).logits.detach()
    kept = StaticCache(model.config, max_cache_len=24) if cache == "static" else DynamicCache(config=model.config)
    place = 3 if cache == "static" else 6  # its window of 6 tokens is not full before
    model(ids[:, :place], past_key_values=kept)
    for tokens in (1, 2) if cache == "static" else (1, 4, 5):
        found = model(ids[:, place : place + tokens], past_key_values=kept).logits
        exact = expected[:, place : place + tokens]
        assert (found - exact).norm() <= 1e-5 * exact.norm()
        place += tokens
    assert len(steps) == (2 if cache == "static" else 3)
    assert kept.get_seq_length() == place


def cuts_of(names: Iterable[str], **fields: Any) -> InputCuts:
    return InputCuts({name: [0.05, 0.1] if name == "down_proj" else [0.4, 0.5] for name in names}, **fields)


LISTED = {  # tiles of products that read the rows of kept inputs only, as those of large models do
    f"cut {name}": {"SPLITS": 3, "DEPTH": 2, "BLOCK": 16, "num_warps": 1} for name in ("qkv", "o", "hidden", "down")
}


@needs_triton
@pytest.mark.parametrize(
    ("model_type", "activation", "names", "tiles"),
    [
        ("qwen2", "silu", PROJECTIONS, LISTED),
        ("qwen2", "silu", PROJECTIONS, {}),
        ("llama", "relu", PROJECTIONS, LISTED),
        ("llama", "silu", ("o_proj", "down_proj"), {}),
    ],
)
def test_inputs_are_cut_in_steps_of_one_token(
    model_type: str,
    activation: str,
    names: tuple[str, ...],
    tiles: dict[str, dict[str, int]],
    steps: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from stocha_hf.decoding import gpu_tiles

    monkeypatch.setattr(gpu_tiles, "SMALL", gpu_tiles.SMALL | tiles)
    model = model_of(model_type, activation, cuts_of(names))
    new = 4 if INTERPRETED else 40
    options = greedy(new, return_dict_in_generate=True, output_logits=True)
    found = model.generate(PROMPT, **options)
    assert len(steps) == new - 1
    expected = slowly(monkeypatch, model.generate, PROMPT, **options)
    with cut_inputs(model, "never"):
        full = slowly(monkeypatch, model.generate, PROMPT, **options)
    for logits, others in zip(found.logits, expected.logits, strict=True):
        assert (logits - others).norm() <= 1e-5 * others.norm()
    assert (found.logits[1] - full.logits[1]).norm() > 1e-2 * full.logits[1].norm(), "a cut that changes something"
    with torch.no_grad():
        pair = model(PROMPT[:, :2], past_key_values=found.past_key_values).logits
        other = slowly(monkeypatch, model, PROMPT[:, :2], past_key_values=expected.past_key_values).logits
    assert len(steps) == new and (pair - other).norm() <= 1e-5 * other.norm(), "two tokens are not cut"


@needs_triton
@pytest.mark.parametrize(
    ("options", "doubt"),
    [
        ({}, 0.0),
        ({"repetition_penalty": 1.3}, 0.0),
        ({"cache_implementation": "static", "disable_compile": True}, 1.1),
    ],
)
def test_lossless_text_is_that_without_cuts(
    options: dict[str, Any], doubt: float, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "DOUBT", doubt)
    model, new = model_of("qwen2", "silu", cuts_of(PROJECTIONS)), 7 if INTERPRETED else 60
    with cut_inputs(model, "never"):
        expected = slowly(monkeypatch, model.generate, PROMPT, **greedy(new) | options)
    end = int(expected[0, -2])
    given: list[int] = []
    streamer = SimpleNamespace(
        put=lambda tokens: given.extend(tokens.flatten().tolist()), end=lambda: given.append(-1)
    )
    ending = greedy(new, eos_token_id=end, custom_generate=lossless.lossless, streamer=streamer) | options
    found = model.generate(PROMPT, **ending)
    assert [*found[0].tolist(), -1] == given
    assert torch.equal(found, expected[:, : found.shape[1]]) and int(found[0, -1]) == end
    assert len(steps) > len(set(steps)), "a verification begins where its draft began"
    from stocha_hf.decoding import gpu_plan  # which needs Triton

    plan = model.gpu_plan
    assert plan.drafting is not None, "a prompt of 8 tokens, and a cache without room, leave the plan and its graphs"
    with plan.in_use, cut_inputs(model, "never"):
        assert gpu_plan.of(model) is None and model.gpu_plan is plan, "as does a call while a loop has the plan"


@needs_triton
@pytest.mark.parametrize("cuts", [True, False])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}])
def test_what_stood_in_the_text_before_is_verified_without_drafts(
    options: dict[str, Any], cuts: bool, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, new = model_of("qwen2", "silu", cuts_of(PROJECTIONS) if cuts else None), 6 if INTERPRETED else 60
    options = greedy(new) | options
    with cut_inputs(model, "never") if cuts else nullcontext():
        expected = slowly(monkeypatch, model.generate, PROMPT, **options)
    told = expected[0].tolist()
    wrong = PROMPT.shape[1] + 3
    told[wrong] = (told[wrong] + 1) % model.config.vocab_size
    monkeypatch.setattr(Copies, "drafts", lambda self, most: told[len(self.text) : len(self.text) + most])
    monkeypatch.setattr(rounds.Pace, "drafts", lambda self: self.most)  # whatever it takes
    with rounds.counting() as counts:
        found = model.generate(PROMPT, custom_generate=lossless.lossless, **options)
    assert torch.equal(found, expected)
    assert steps[:2] == [PROMPT.shape[1], wrong], "what follows a wrong token is written again"
    assert counts.copied > counts.accepted == new - 1 - len(steps) and counts.drafted == 0
    assert counts.verifications == len(steps) == (2 if INTERPRETED else 5)


@needs_triton
@pytest.mark.parametrize(("tokens", "each"), [(1, 1), (7, 3)])  # 7 are steps of 1, 2 and 4 tokens
def test_steps_in_doubt_are_computed_again_without_cuts(
    tokens: int, each: int, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, new = model_of("qwen2", "silu", cuts_of(PROJECTIONS)), 6 if INTERPRETED else 40
    options = greedy(new, return_dict_in_generate=True, output_logits=True)
    without = slowly(monkeypatch, model.generate, PROMPT, **options)
    below = torch.cat(without.logits)[1:].softmax(-1).amax(-1).median().item() + 1e-4

    def counted(call: Any, *args: Any, **kwargs: Any) -> Any:
        model.cutting.steps = model.cutting.repeated = 0
        return call(*args, **kwargs), model.cutting.steps, model.cutting.repeated

    with cut_inputs(model, "decode", fallback=below, fallback_tokens=tokens):
        found, count, repeated = counted(model.generate, PROMPT, **options)
        assert count == new - 1 and 0 < repeated < count and len(steps) == count + repeated * each
        expected, *counts = counted(slowly, monkeypatch, model.generate, PROMPT, **options)
    assert counts == [count, repeated]
    for logits, others in zip(found.logits, expected.logits, strict=True):
        assert (logits - others).norm() <= 1e-5 * others.norm()
    for layer, other in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert torch.allclose(layer.keys, other.keys, atol=1e-5)
    with torch.no_grad(), cut_inputs(model, "decode", fallback=0.999, fallback_tokens=tokens):
        model.cutting.tell(last := found.sequences[:, -1:].clone(), found.sequences, None)
        shown = [layer.keys for layer in found.past_key_values.layers]
        before = [keys.clone() for keys in shown]
        step = model(last, past_key_values=found.past_key_values).logits
        other = slowly(monkeypatch, model, last, past_key_values=expected.past_key_values).logits
    assert (step - other).norm() <= 1e-5 * other.norm() and len(steps) == count + 1 + (repeated + 1) * each
    for layer, other in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert torch.allclose(layer.keys, other.keys, atol=1e-5)
    assert all(map(torch.equal, shown, before)), "what a cache has shown is written again"


@needs_triton
def test_an_assistants_drafts_are_checked_in_steps(steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, assistant = model_of(), model_of("llama", "silu")
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    options = greedy(4 if INTERPRETED else 20)
    expected = slowly(monkeypatch, model.generate, PROMPT, **options)
    assert torch.equal(model.generate(PROMPT, assistant_model=assistant, **options), expected)
    assert steps


@needs_triton
def test_predicted_gates_change_no_token(steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    options = greedy(4 if INTERPRETED else 40)
    expected = model.generate(PROMPT, **options)
    for mlp in stocha_mlps(model):
        mlp.decode_state.coarse = PackedGate.of(mlp.gate_proj.weight, recall=0.999)
    assert torch.equal(model.generate(PROMPT, **options), expected)
    counts = model.__dict__["gpu_plan"].step(1).counts[:, 0]
    assert 0 < int(counts.min()) <= int(counts.max()) < mlp.gate_proj.weight.shape[0], "some neurons are not listed"


def test_four_bits_are_off_by_what_they_say() -> None:
    torch.manual_seed(0)
    gate, x = torch.randn(3000, 256), torch.randn(256)
    gate[:, :3] *= 5
    packed = PackedGate.of(gate, recall=0.95)
    eighths = [((packed.codes >> 4 * place) & 15) - 8 for place in range(8)]
    about = torch.cat(eighths, 1) * packed.steps[:, None] @ x
    beyond = (gate @ x > about + packed.slack * x.norm()).float().mean().item()
    assert 0.03 < beyond < 0.07, "a share of 1 - recall"
    assert packed.nbytes < gate.nbytes / 7


@pytest.mark.skipif(not CUDA, reason="no GPU")
def test_a_gpu_predicts_with_a_recall() -> None:
    model = model_of()
    assert predict_gates(model, recall=0.999) == len(stocha_mlps(model))
    with pytest.raises(StochaError, match="expected a recall"):
        predict_gates(model)


def test_what_a_gpu_step_does_not_know_is_refused() -> None:
    if triton_ffn.triton is None:
        pytest.skip("no Triton")
    from stocha_hf.decoding import gpu_plan

    assert gpu_plan.of(model_of("gemma2")) is None
    assert gpu_plan.of(model_of(inputs=cuts_of(["q_proj"]))) is None, "one kernel multiplies q, k and v"
    model = model_of()
    assert gpu_plan.of(model) is gpu_plan.of(model)
    model.model.layers[0].mlp.up_proj = torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    assert gpu_plan.of(model) is None


def weights_of_no_content(dtype: torch.dtype, coarse: bool, sparse: bool = True, cut: bool = False) -> Any:
    from stocha_hf.decoding.gpu_weights import CutWeights, LayerWeights, Weights

    size, width = 576, 1536

    def of(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    packed = PackedGate(torch.empty(width, size // 8, dtype=torch.int32), *torch.empty(2, width), (0, 0))
    qkv = of(576, size), of(192, size), of(192, size)
    rows = (576, 192, 192, size, width, width, size)
    cuts = {
        name: CutWeights(of(width if name == "down_proj" else size, count), 0.5)
        for name, count in zip(PROJECTIONS, rows, strict=True)
    }
    layer = LayerWeights(
        of(size), qkv, (of(576), of(192), of(192)), (of(64), of(64)), of(size, 576), None, of(size), of(width, size),
        of(width, size), of(size, width), of(width, size) if sparse else None, "relu" if sparse else "silu", 0.0,
        packed if coarse else None, 0.125, 0, cuts if cut else {},
    )  # fmt: skip
    return Weights(of(999, size), [layer], of(size), of(999, size), None, torch.empty(32), 1.0, 1e-5, 9, 3, 64)


@pytest.mark.slow
@pytest.mark.skipif(triton_ffn.triton is None or INTERPRETED or CUDA, reason="no Triton, interpreted, or a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("kind", "tokens"),
    [("dense", 1), ("sparse", 1), ("predicted", 1), ("cut", 1), ("cut, listed", 1), ("dense", 4), ("sparse", 8)],
)
def test_the_kernels_compile_for_an_h100_that_is_not_there(
    kind: str, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helpers.triton import compiling

    from stocha_hf.decoding import gpu_cuts, gpu_products, gpu_step
    from stocha_hf.decoding.gpu_tiles import LARGE

    monkeypatch.setattr(gpu_step, "_can_start_early", lambda like: True)
    monkeypatch.setattr(gpu_products, "_has_dp4a", lambda like: True)
    compiled = compiling([gpu_step, gpu_products, gpu_cuts], monkeypatch)
    weights = weights_of_no_content(dtype, kind == "predicted", kind in ("sparse", "predicted"), "cut" in kind)
    tiles = {name: LARGE[name] for name in LARGE if "cut" in name} if "listed" in kind else {}
    gpu_step.GpuStep(weights, tokens, tiles).launch()
    assert len(compiled) == (9 if kind == "predicted" else 8) - (tokens > 1)
    assert all(kernel.metadata.shared <= 227 * 2**10 for kernel in compiled), "what a program of an H100 has"
