"""Whole decode steps in one call of the kernels, and generate()'s loop: results are those of the modules."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from helpers import CONFIGS, first_is_fast, tiny_model
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from stocha_hf.decoding import generation, step
from stocha_hf.decoding.gate_prediction import predict_gates
from stocha_hf.decoding.loop import ending
from stocha_hf.errors import StochaError
from stocha_hf.modeling_stocha import ARCHITECTURES, StochaConfig
from stocha_hf.patching import patch
from stocha_hf.quantization_stocha import Quantization, exchange

PROMPT = torch.tensor([[5, 9, 13, 21, 34, 8, 55, 40, 11, 7]])
TOKENS = torch.randint(4, 64, (2, 20), generator=torch.Generator().manual_seed(1))
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
pytestmark = pytest.mark.usefixtures("one_thread")


def sliding(model_type: str) -> dict[str, Any]:
    """What gives a tiny model a sliding window, in one of two layers where its architecture can."""
    return {"llama": {}, "mistral": {"sliding_window": 6}}.get(model_type, SLIDING)


def model_of(model_type: str = "llama", activation: str = "relu", **overrides: Any) -> Any:
    if model_type.startswith("qwen") and overrides:
        overrides |= {"use_sliding_window": True, "max_window_layers": 1}
    model = tiny_model(model_type, max_position_embeddings=512, **overrides)
    base = ARCHITECTURES[model_type].act
    patch(model, StochaConfig(activation=base if activation == "base" else activation))
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that calls another one with neither whole steps nor the loop."""

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as patched:
            for name in ("call", "sample"):
                patched.setattr("stocha_hf.modeling_stocha.StochaMLP.runtime", _without(name, patched))
            return function(*args, **kwargs)

    return call


def _without(name: str, patched: Any) -> Any:
    from stocha_hf.modeling_stocha import StochaMLP

    return StochaMLP.runtime._replace(**{name: lambda *args, **kwargs: None})


class Steps:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, run = 0, step.run

        def counted(*args: Any, **kwargs: Any) -> Any:
            found = run(*args, **kwargs)
            self.count += found is not None
            return found

        monkeypatch.setattr(step, "run", counted)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


@pytest.mark.parametrize(
    ("model_type", "activation"),
    first_is_fast([*((name, "relu") for name in CONFIGS), ("llama", "base"), ("gemma2", "base")]),
)
def test_200_greedy_tokens_are_the_same(model_type: str, activation: str, steps: Steps, slowly: Any) -> None:
    model = model_of(model_type, activation, **sliding(model_type))
    options = {"max_new_tokens": 200, "do_sample": False}
    fast = model.generate(PROMPT, **options)
    assert steps.count == 199
    assert torch.equal(fast, slowly(model.generate, PROMPT, **options)) and steps.count == 199
    assert len(set(fast[0].tolist())) > 5, "a text that only repeats would prove little"


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "gemma3_text"])
@torch.no_grad()
def test_several_tokens_and_sequences_and_odd_sizes(model_type: str, steps: Steps) -> None:
    sizes = {"hidden_size": 36, "intermediate_size": 50, "head_dim": 6, "num_attention_heads": 6}
    model = model_of(model_type, **sizes, **sliding(model_type))
    expected = model(TOKENS).logits
    for tokens in (1, 2, 3, 4):
        cache = model(TOKENS[:, :8], use_cache=True).past_key_values
        found = [
            model(TOKENS[:, i : i + tokens], past_key_values=cache).logits for i in range(8, 20 - tokens + 1, tokens)
        ]
        logits = torch.cat(found, 1)
        torch.testing.assert_close(logits, expected[:, 8 : 8 + logits.shape[1]], rtol=1e-3, atol=2e-4)
    assert steps.count == 12 + 6 + 4 + 3


@torch.no_grad()
def test_the_cache_stays_transformers_own(steps: Steps, slowly: Any) -> None:
    model = model_of()
    cache = model(TOKENS[:, :8], use_cache=True).past_key_values
    for i in range(8, 14):
        model(TOKENS[:, i : i + 1], past_key_values=cache)
    own = slowly(model, TOKENS[:, :14], use_cache=True).past_key_values
    for layer, expected in zip(cache.layers, own.layers, strict=True):
        torch.testing.assert_close(layer.keys, expected.keys, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(layer.values, expected.values, rtol=1e-3, atol=1e-4)
    before, other = [layer.keys.clone() for layer in cache.layers], copy.deepcopy(cache)
    shown = [layer.keys for layer in cache.layers]
    cache.crop(-3)
    again = model(TOKENS[:, 11:14], past_key_values=cache).logits
    torch.testing.assert_close(again, model(TOKENS).logits[:, 11:14], rtol=1e-3, atol=1e-4)
    model(TOKENS[:, 3:4], past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = model(TOKENS[[1, 0], 14:15], past_key_values=other).logits
    assert swapped.shape == (2, 1, 64) and other.get_seq_length() == 15
    assert all(torch.equal(now, then) for now, then in zip(shown, before, strict=True)), "what was shown is unchanged"
    assert steps.count == 6 + 3


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
        {"do_sample": False, "eos_token_id": [17, 20, 41]},
        {"do_sample": True, "return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    ],
)
def test_the_loop_does_what_transformers_does(options: Any, steps: Steps, slowly: Any) -> None:
    model = model_of()
    results = []
    for run in (lambda call, *args, **kwargs: call(*args, **kwargs), slowly):
        torch.manual_seed(0)
        results.append(run(model.generate, TOKENS, max_new_tokens=30, pad_token_id=0, **options))
    assert steps.count > 0
    fast, slow = results
    if torch.is_tensor(fast):
        assert torch.equal(fast, slow)
    else:
        assert torch.equal(fast.sequences, slow.sequences)
        for name in ("scores", "logits"):
            torch.testing.assert_close(fast[name], slow[name], rtol=1e-3, atol=1e-4)
        assert fast.past_key_values.get_seq_length() == slow.past_key_values.get_seq_length() == 49


def test_padding_on_the_left(steps: Steps) -> None:
    model = model_of()
    alone = model.generate(PROMPT[:, 3:], max_new_tokens=20, do_sample=False)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), PROMPT[:, 3:]], 1)
    mask = torch.tensor([[1] * 10, [0] * 3 + [1] * 7])
    before = steps.count
    both = model.generate(torch.cat([PROMPT, padded]), attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert steps.count == before + 19 and torch.equal(both[1, 10:], alone[0, 7:])


class Recorder(LogitsProcessor):
    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.lengths.append(input_ids.shape[1])
        return scores.masked_fill(torch.arange(64) % 2 == 0, -torch.inf)


def test_processors_criteria_and_streamers_are_called(steps: Steps) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.put_tokens: list[int] = []
            self.ended = False

        def put(self, tokens: torch.Tensor) -> None:
            self.put_tokens += tokens.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    model, processor, streamer = model_of(), Recorder(), Streamer()
    stop = StoppingCriteriaList([lambda ids, scores, **kwargs: torch.tensor([ids.shape[1] >= 15])])
    found = model.generate(
        PROMPT, max_new_tokens=50, logits_processor=LogitsProcessorList([processor]), stopping_criteria=stop,
        streamer=streamer, do_sample=False,
    )  # fmt: skip
    assert processor.lengths == [10, 11, 12, 13, 14] and steps.count == 4
    assert streamer.put_tokens == found[0].tolist() and streamer.ended
    assert all(token % 2 for token in found[0, 10:].tolist())


def test_what_must_be_called_is_called(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    expected = model.generate(PROMPT, max_new_tokens=10, do_sample=False)
    steps.count, seen = 0, []
    handle = model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *args: seen.append(1))
    assert torch.equal(model.generate(PROMPT, max_new_tokens=10, do_sample=False), expected)
    assert len(seen) == 10 and steps.count == 0
    handle.remove()
    options: list[dict[str, Any]] = [
        {"output_attentions": True, "return_dict_in_generate": True},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"use_cache": False},
        {"num_beams": 2},
    ]
    model.set_attn_implementation("eager")
    for option in options:
        model.generate(PROMPT, max_new_tokens=4, do_sample=False, **option)
        assert (steps.count > 0) == ("num_beams" in option), option
    assert torch.equal(model.generate(PROMPT, max_new_tokens=10, do_sample=False), expected)


def test_assistants_and_prompts_of_earlier_calls(steps: Steps, slowly: Any) -> None:
    model, assistant = model_of(), model_of(activation="fatrelu")
    expected = slowly(model.generate, PROMPT, max_new_tokens=30, do_sample=False)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=30, do_sample=False, assistant_model=assistant), expected)
    assert steps.count > 10
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=64)):
        first = model.generate(PROMPT, max_new_tokens=10, do_sample=False, past_key_values=cache)
        second = model.generate(first, max_new_tokens=20, do_sample=False, past_key_values=cache)
        assert torch.equal(second, expected)


@torch.no_grad()
def test_a_static_cache_that_is_full_is_not_overrun() -> None:
    model = model_of("gemma3_text", **SLIDING)
    cache = StaticCache(config=model.config, max_cache_len=12)
    model(TOKENS[:, :10], past_key_values=cache)
    found = [model(TOKENS[:, i : i + 1], past_key_values=cache).logits for i in (10, 11)]
    torch.testing.assert_close(torch.cat(found, 1), model(TOKENS).logits[:, 10:12], rtol=1e-3, atol=1e-4)
    with pytest.raises(IndexError):
        model(TOKENS[:, 12:13], past_key_values=cache)


def test_a_loop_that_is_broken_off_leaves_a_whole_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def criterion(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if ids.shape[1] == 15:
            raise Stop
        return torch.tensor([False])

    model, cache = model_of(), DynamicCache()
    with pytest.raises(Stop):
        model.generate(
            PROMPT, max_new_tokens=50, do_sample=False, past_key_values=cache,
            stopping_criteria=StoppingCriteriaList([criterion]),
        )  # fmt: skip
    assert cache.get_seq_length() == 14 and cache.layers[1].keys.shape[2] == 14
    assert generation.takes(cache)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("model_type", CONFIGS)
@torch.no_grad()
def test_quantized_models_decode_as_their_modules_do(model_type: str, bits: int, steps: Steps, slowly: Any) -> None:
    model = model_of(model_type)
    exchange(model, Quantization(bits=bits), fill=True)
    cache = model(TOKENS[:, :9], use_cache=True).past_key_values
    fast = torch.cat([model(TOKENS[:, i : i + 1], past_key_values=cache).logits for i in range(9, 20)], 1)
    assert steps.count == 11
    cache = model(TOKENS[:, :9], use_cache=True).past_key_values
    slow = [slowly(model, TOKENS[:, i : i + 1], past_key_values=cache).logits for i in range(9, 20)]
    dense = model(TOKENS).logits[:, 9:]
    assert (fast - torch.cat(slow, 1)).norm() < 0.02 * dense.norm()
    assert (fast - dense).norm() < 0.05 * dense.norm()


@torch.no_grad()
def test_predicted_gates_of_quantized_models(slowly: Any) -> None:
    model = model_of("llama")
    exchange(model, Quantization(bits=4), fill=True)

    def decoded(call: Any = model) -> torch.Tensor:
        cache = model(TOKENS[:1, :9], use_cache=True).past_key_values
        return torch.cat([call(TOKENS[:1, i : i + 1], past_key_values=cache).logits for i in range(9, 20)], 1)

    full = decoded()
    for recall, same in ((0.999, True), (0.501, False)):
        assert predict_gates(model, recall) == 2
        fast, slow = decoded(), decoded(partial(slowly, model))
        assert bool((fast - full).norm() < 0.01 * full.norm()) is same
        assert (fast - slow).norm() < 0.02 * full.norm()
    model.model.layers[1].mlp.gate_proj.codes.mul_(1)
    model.model.layers[0].mlp.gate_proj.codes.mul_(1)
    assert torch.equal(decoded(), full)  # the weights may have changed, so copies of them are not used
    with pytest.raises(StochaError, match=r"recall is None: expected a recall, such as 0\.9"):
        predict_gates(model)
    model.model.layers[0].mlp.gate_proj.input_threshold = 0.1
    with pytest.raises(StochaError, match="a gate_proj cuts its inputs"):
        predict_gates(model, 0.9)


def test_usual_criteria_are_compared_as_numbers_and_one_that_may_warn_is_called() -> None:
    """Calling transformers' two for each token takes longer than all else between two steps of a small model."""
    usual = StoppingCriteriaList([MaxLengthCriteria(4, max_position_embeddings=8), EosTokenCriteria([3])])
    done = ending(usual, 1)
    assert [done(torch.tensor([ids]), None) for ids in ([1, 2], [1, 3], [1, 2, 1, 2])] == [False, True, True]
    long = StoppingCriteriaList([MaxLengthCriteria(10, max_position_embeddings=8)])
    assert ending(long, 1) is long and ending(usual, 2) is usual


def test_a_padded_window_that_becomes_full_in_the_loop_is_left_to_the_modules(slowly: Any) -> None:
    model = model_of("mistral", **sliding("mistral"))
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 1, 1, 1]])
    given = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
    found = model.generate(PROMPT[:, :4], **given)
    assert torch.equal(found, slowly(model.generate, PROMPT[:, :4], **given))
