"""Steps in doubt are computed again without cuts, in every way to decode, and counted."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_refused, call_command, tiny_model, tiny_tokenizer
from transformers import DynamicCache

import stocha_hf
from stocha_hf import modeling_stocha
from stocha_hf.answers.batches import continue_prompts
from stocha_hf.cuts import PROJECTIONS
from stocha_hf.errors import StochaError
from stocha_hf.measurement.evaluation import compare, evaluate
from stocha_hf.modeling_stocha import InputCuts, StochaConfig, StochaMLP
from stocha_hf.patching import patch, unpatch
from stocha_hf.spec import ARCHITECTURES

PROMPTS = torch.tensor([[0, 0, 5, 9, 13, 21], [7, 8, 5, 9, 13, 21], [0, 9, 33, 40, 2, 1]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
NEW = 16
LAYERS = ["sliding_attention", "full_attention"]
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "disable_compile": True}
pytestmark = pytest.mark.usefixtures("one_thread")


def cut_model(
    fallback: float | None = 0.3, model_type: str = "qwen2", tokens: int | None = None, **overrides: Any
) -> Any:
    torch.manual_seed(0)
    model = tiny_model(model_type, **overrides)
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)  # some steps are in doubt, and some are not
    cuts = InputCuts({name: [0.5, 0.5] for name in PROJECTIONS}, fallback=fallback, fallback_tokens=tokens)
    patch(model, StochaConfig(activation=ARCHITECTURES[model_type].act, inputs=cuts))
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.fixture(params=["kernels", "transformers"])
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "transformers":
        monkeypatch.setattr(StochaMLP, "runtime", None)
    return request.param


def by_hand(model: Any, ids: list[int], below: float, new: int = NEW - 1) -> tuple[list[int], int]:
    """Greedy tokens after ids, the last of which is the first step's; and how many steps were in doubt.

    Each step reads the whole text anew, whose tokens are cut but for the prompt's and those of steps in doubt. That is
    what a cache holds: what is computed again is always all from some token on.
    """
    ids, prompt, repeated = list(ids), len(ids), 0
    kept = [False] * (prompt - 1)  # of each token whether it is cut
    window = getattr(model.config, "sliding_window", None) or NEW + prompt
    for _ in range(new):
        count = model.cutting.tokens if len(kept) < window else 1  # a full window has left tokens behind
        for where in ([*kept, True], [*[*kept, True][:-count], *[False] * count][-len(ids) :]):
            model.cutting.cut_at = torch.tensor([where])
            with model.cut_inputs("always"):
                logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            if logits.softmax(-1).max() >= below:
                break
            repeated += where[-1]
        model.cutting.cut_at, kept = None, where
        ids.append(int(logits.argmax()))
    return ids[prompt:], repeated


SLIDING = {"layer_types": LAYERS}


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "below", "tokens", "overrides"),
    [
        ("qwen2", 0.3, 1, {}),
        ("qwen2", 0.3, 3, {}),
        ("gemma2", 0.64, 1, {"sliding_window": 6, **SLIDING}),
        ("gemma2", 0.64, 8, {"sliding_window": 14, **SLIDING}),
    ],
)
@pytest.mark.parametrize("cache", [None, "static"])
def test_steps_in_doubt_are_those_of_the_model_without_cuts(
    cache: Any, model_type: str, below: float, tokens: int, overrides: Any, way: str
) -> None:
    model = cut_model(below, model_type, tokens, **overrides)
    first = int(model(PROMPTS[1:2]).logits[0, -1].argmax())
    expected, repeated = by_hand(model, [*PROMPTS[1].tolist(), first], below)
    assert 0 < repeated < NEW - 1
    found = model.generate(PROMPTS[1:2], cache_implementation=cache, **OPTIONS)
    assert found[0, 6:].tolist() == [first, *expected]
    assert (model.cutting.steps, model.cutting.repeated) == (NEW - 1, repeated)


@pytest.mark.parametrize("tokens", [1, 8])
def test_a_row_does_not_depend_on_its_batch(tokens: int, way: str) -> None:
    model = cut_model(tokens=tokens)
    batch = model.generate(PROMPTS, attention_mask=MASK, **OPTIONS)[:, 6:]
    counts = model.cutting.steps, model.cutting.repeated
    model.cutting.steps = model.cutting.repeated = 0
    for prompt, mask, row in zip(PROMPTS, MASK, batch, strict=True):
        alone = model.generate(prompt[None, mask == 1], **OPTIONS)[0, -NEW:]
        assert torch.equal(alone, row)
    assert (model.cutting.steps, model.cutting.repeated) == counts
    sampled = [_sampled(model) for _ in range(2)]
    assert torch.equal(*sampled)


def _sampled(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    return model.generate(PROMPTS, attention_mask=MASK, **OPTIONS | {"do_sample": True, "num_beams": 2})


def test_near_1_is_the_model_without_cuts_and_0_the_one_with_them(way: str) -> None:
    model, plain = cut_model(0.9999), cut_model(None)
    given: dict[str, Any] = {"attention_mask": MASK, **OPTIONS}
    with plain.cut_inputs("never"):
        uncut = plain.generate(PROMPTS, **given)
    cut = plain.generate(PROMPTS, **given)
    assert not torch.equal(cut, uncut) and plain.cutting.steps == 0
    assert torch.equal(model.generate(PROMPTS, **given), uncut)
    assert model.cutting.repeated == model.cutting.steps == 3 * (NEW - 1)
    with model.cut_inputs("decode", fallback=0):
        assert torch.equal(model.generate(PROMPTS, **given), cut)
    with plain.cut_inputs("decode", fallback=0.9999):
        assert torch.equal(plain.generate(PROMPTS, **given), uncut)
    assert plain.cutting.fallback == 0


@torch.no_grad()
def test_a_call_keeps_what_the_cache_holds_and_a_cache_that_cannot_forget_warns(way: str) -> None:
    model = cut_model(0.9999)
    first, second = (model(PROMPTS[1:2, :5], use_cache=True).past_key_values for _ in range(2))
    with model.cut_inputs("never"):
        expected = model(PROMPTS[1:2, 5:], past_key_values=second).logits
    assert torch.equal(model(PROMPTS[1:2, 5:], past_key_values=first).logits, expected)
    for layer, other in zip(first.layers, second.layers, strict=True):
        assert torch.equal(layer.keys, other.keys) and layer.get_seq_length() == 6

    class Other(DynamicCache):
        pass

    cache = Other(config=model.config)
    model(PROMPTS[1:2, :5], past_key_values=cache)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(PROMPTS[1:2, 5:], past_key_values=cache)
    assert [str(each.message) for each in caught] == [
        "the cache is a Other, which cannot forget a token: expected a DynamicCache or a StaticCache without "
        "offloading; steps in doubt are not computed again without cuts"
    ]


@torch.no_grad()
def test_embedded_steps_are_repeated_and_those_of_a_base_model_are_not(way: str) -> None:
    model = cut_model(0.9999)
    cache = model(PROMPTS[1:2, :5]).past_key_values
    with model.cut_inputs("never"):
        expected = model(PROMPTS[1:2]).logits[:, -1:]
    embedded = model.get_input_embeddings()(PROMPTS[1:2, 5:])
    found = model(inputs_embeds=embedded, past_key_values=cache).logits
    assert torch.allclose(found, expected, atol=1e-5) and model.cutting.repeated == model.cutting.steps == 1
    base = modeling_stocha.StochaQwen2Model(model.config).eval()  # type: ignore[attr-defined]
    base.load_state_dict(model.model.state_dict())
    with model.cut_inputs("decode", fallback=0):
        cache = model(PROMPTS[1:2, :5]).past_key_values
        expected = model.model(PROMPTS[1:2, 5:], past_key_values=cache).last_hidden_state
    cache = base(PROMPTS[1:2, :5]).past_key_values
    found = base(PROMPTS[1:2, 5:], past_key_values=cache).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-5) and base.cutting.fallback and base.cutting.steps == 0


def test_a_step_on_a_gpu_is_left_to_the_forward_where_it_could_not_be_repeated(monkeypatch: Any) -> None:
    pytest.importorskip("triton", reason="no Triton on this platform")
    from stocha_hf.decoding import gpu_call

    model, asked = cut_model(), []

    def step(tokens: int, cuts: bool | None = None) -> Any:
        asked.append(cuts)
        return None if cuts is False else SimpleNamespace(count=1)

    def prepare(*args: Any) -> None:
        pytest.fail("the step was begun")

    monkeypatch.setattr(gpu_call, "rows_of", lambda plan, cache: SimpleNamespace(prepare=prepare))
    given = {"input_ids": PROMPTS[:1, :1], "past_key_values": DynamicCache()}
    assert gpu_call._logits(SimpleNamespace(step=step), given, model.cutting) is None  # type: ignore[arg-type]
    assert False in asked


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 3])
def test_text_that_is_read_is_counted_as_its_steps_would_be(tokens: int) -> None:
    model = cut_model(0.3, tokens=tokens)
    windows = torch.randint(3, 64, (6, 16), generator=torch.Generator().manual_seed(0))
    found = evaluate(model, windows)
    with model.cut_inputs("decode", fallback=0):
        without = evaluate(model, windows)
    assert found.fallback is not None and found.bytes_read is not None and without.bytes_read is not None
    assert without.fallback is None and "fallback" not in without.to_dict()
    with model.cut_inputs("always", fallback=0):
        first = model(windows).logits
        where = first.softmax(-1).amax(-1) < 0.3
    assert (found.fallback.steps, found.fallback.repeated) == (96, int(where.sum())) and 0 < found.fallback.share < 1
    assert found.fallback.cut_share == without.bytes_read.share
    assert found.bytes_read.share == pytest.approx(without.bytes_read.share + found.fallback.share)
    again = torch.stack([where[:, i : i + tokens].any(1) for i in range(16)], 1)
    model.cutting.cut_at = ~again
    with model.cut_inputs("always", fallback=0):
        second = model(windows).logits
    model.cutting.cut_at = None
    assert torch.equal(again, where) == (tokens == 1)
    logits = torch.where((again & ~where)[..., None], first, second)[:, :-1]  # those before: with cuts
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert found.perplexity == pytest.approx(loss.exp().item()) and found.perplexity != without.perplexity
    native = cut_model(None)
    unpatch(native)
    patch(native, StochaConfig(activation="silu"))
    kl = compare(model, native, windows).kl
    with model.cut_inputs("decode", fallback=0):
        assert 0 < kl < compare(model, native, windows).kl
    with model.cut_inputs("decode", fallback=0.9999):
        assert compare(model, native, windows).kl < 1e-6


@torch.no_grad()
def test_tokens_before_a_doubt_are_renewed_and_other_rows_keep_theirs(way: str) -> None:
    model = cut_model(tokens=8)
    ids = torch.cat([PROMPTS, torch.tensor([[11], [3], [60]])], 1)  # 7 tokens, all of which a doubt renews

    def stepped(renewed: bool) -> Any:
        cache = model(ids[:, :4], attention_mask=MASK[:, :4], use_cache=True).past_key_values
        for length in (5, 6, 7):
            mask = torch.cat([MASK, torch.ones(3, 1, dtype=torch.int64)], 1)[:, :length]
            step = ids[:, length - 1 : length].clone()
            if renewed and length == 7:
                model.cutting.tell(step, ids, mask)
            fallback = below if renewed and length == 7 else 0
            with model.cut_inputs("decode", fallback=fallback):
                positions = mask.cumsum(1)[:, -1:] - 1
                shown = [layer.keys for layer in cache.layers], [layer.keys.clone() for layer in cache.layers]
                out = model(step, attention_mask=mask, position_ids=positions, past_key_values=cache)
            assert all(map(torch.equal, *shown)), "what a cache has shown is written again"
        return out.logits[:, 0], cache

    below = 0.0
    logits, cut = stepped(False)
    chances = logits.softmax(-1).amax(-1)
    below = float(chances.sort().values[1]) + 1e-4  # two rows are in doubt
    found, cache = stepped(True)
    doubted = chances < below
    assert doubted.sum() == 2 and torch.equal(found[~doubted], logits[~doubted])
    real = torch.cat([MASK, torch.ones(3, 1, dtype=torch.int64)], 1)
    with model.cut_inputs("never"):
        positions = (real.cumsum(1) - 1).clamp(min=0)
        whole = model(ids, attention_mask=real, position_ids=positions, use_cache=True)
    assert torch.allclose(found[doubted], whole.logits[doubted, -1], atol=1e-5)
    for layer, with_cuts, full in zip(cache.layers, cut.layers, whole.past_key_values.layers, strict=True):
        for name in ("keys", "values"):
            parts = [getattr(some, name).transpose(1, 2) for some in (layer, with_cuts, full)]
            assert torch.equal(parts[0][~doubted], parts[1][~doubted])
            mine, theirs = (part[doubted][real[doubted] == 1] for part in parts[::2])
            assert torch.allclose(mine, theirs, atol=1e-5) and not parts[0].isnan().any()


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_renews_the_same_by_kernels_and_without_them(beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = cut_model(tokens=5), []
    for runtime in (StochaMLP.runtime, None):
        monkeypatch.setattr(StochaMLP, "runtime", runtime)
        given = OPTIONS | {"num_beams": beams, "attention_mask": MASK}
        texts.append(model.generate(PROMPTS, **given))
        with model.cut_inputs("decode", fallback_tokens=1):
            assert not torch.equal(model.generate(PROMPTS, **given), texts[0])
    assert torch.equal(*texts)


@pytest.mark.parametrize(("model_type", "overrides"), [("qwen2", {}), ("gemma2", {"sliding_window": 99, **SLIDING})])
def test_answers_are_what_steps_write_whatever_stands_beside_them(model_type: str, overrides: Any) -> None:
    model = cut_model(0.3, model_type, 6, **overrides)
    prompts = [PROMPTS[1].tolist(), [9, 4, 17]]  # one of which has fewer tokens than a step renews
    expected = [by_hand(model, prompt, 0.3, 10) for prompt in prompts]
    for rows in (1, 2):
        repeated: dict[int, int] = {}
        found = dict(continue_prompts(model, prompts, new=10, ends=set(), rows=rows, repeated=repeated))
        assert [(found[i], repeated[i]) for i in range(2)] == expected


def test_a_prompt_of_two_tokens_is_read_whole_as_beside_longer_ones() -> None:
    model = cut_model(None)
    short, long = [[first, 9] for first in range(4, 12)], [[5, 17, 30, 8, 22]] * 8
    alone, beside = (dict(continue_prompts(model, some, new=8, ends=set(), rows=16)) for some in (short, short + long))
    assert alone == {i: beside[i] for i in range(len(short))}


def test_a_model_of_a_file_of_before_there_were_more_tokens_is_measured_and_answers() -> None:
    model, windows = cut_model(0.3), PROMPTS[:, 2:]

    def figures() -> Any:
        return evaluate(model, windows), dict(continue_prompts(model, windows.tolist(), new=3, ends=set(), rows=3))

    expected = figures()
    del model.cutting.tokens
    assert figures() == expected


def test_steps_of_answers_are_counted_to_their_ends() -> None:
    model = cut_model(0.3)
    prompts = [row[mask == 1].tolist() for row, mask in zip(PROMPTS, MASK, strict=True)]
    counts: list[dict[int, int]] = [{}, {}]
    for rows, repeated in zip((1, 3), counts, strict=True):
        found = dict(continue_prompts(model, prompts, new=11, ends={57, 2}, rows=rows, repeated=repeated))
    expected = {}
    for i, prompt in enumerate(prompts):
        model.cutting.steps = model.cutting.repeated = 0
        cache = model(torch.tensor([prompt[:-1]]), use_cache=True).past_key_values
        ids = torch.tensor([[prompt[-1]]])
        for token in found[i]:
            ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            assert int(ids) == token
        expected[i] = model.cutting.repeated
    assert counts[0] == counts[1] == expected and 0 < sum(expected.values()) < sum(map(len, found.values()))


def test_a_task_tells_what_its_steps_read(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra tasks is not installed")
    from lm_eval.api.instance import Instance

    from stocha_hf.tasks.harness import HarnessModel
    from stocha_hf.tasks.kept import Kept

    requests = [Instance("generate_until", {}, (f"w5 w{i}", {"max_gen_toks": 9}), 0, ("t", i, 1)) for i in (7, 8, 9)]
    for model, kept in [(cut_model(0.3), "a"), (cut_model(0.3), "a"), (cut_model(None), "b")]:
        lm = HarnessModel(model, tiny_tokenizer(), Kept(tmp_path / kept), kept)
        lm.generate_until(requests)
        found = lm.reading("t")
        assert found is not None and found.steps == sum(row["steps"] for row in lm.kept.about.values()) <= 27
        assert found.texts == 3 and lm.reading("t") is None
        if kept == "b":
            assert found.fallback is None and 0.2 < found.bytes_read.share < 0.9
        else:  # the second time as the first, whose responses were kept
            share = sum(row["repeated"] for row in lm.kept.about.values()) / found.steps
            assert found.fallback is not None and found.fallback.share == share > 0
            rounding = 1 / found.bytes_read.dense_blocks  # bytes are whole
            assert found.bytes_read.share == pytest.approx(found.fallback.cut_share + share, abs=rounding)


def test_folders_say_it_and_conversion_changes_that_alone(checkpoint: Any, text: Path, tmp_path: Path) -> None:
    model = cut_model(None, "llama")
    model.save_pretrained(tmp_path / "cut")
    tiny_tokenizer().save_pretrained(tmp_path / "cut")
    done = call_command("stocha-convert", tmp_path / "cut", tmp_path / "b", "--inputs-fallback", 0.5)
    assert done.returncode == 0 and "probability below 0.5 is computed again without cuts" in done.stdout, done.stderr
    before, after = (json.loads((tmp_path / name / "config.json").read_text())["stocha"] for name in ("cut", "b"))
    assert after["inputs"] == before["inputs"] | {"fallback": 0.5} and "fallback" not in before["inputs"]
    assert stocha_hf.load_model(str(tmp_path / "b")).cutting.fallback == 0.5
    done = call_command(
        "stocha-eval", tmp_path / "b", "--data", text, "--length", 32, "--windows", 4, "--dtype", "float32"
    )
    assert "of 128 steps, whose most likely token had a probability below 0.5, were computed again" in done.stdout
    both: dict[str, Any] = {"inputs_fallback": 0.6, "inputs_fallback_tokens": 8}
    some = stocha_hf.convert(checkpoint(), tmp_path / "d", inputs=0.4, calibrate=text, calibrate_tokens=64, **both)
    assert (some.stocha["inputs"]["fallback"], some.stocha["inputs"]["fallback_tokens"]) == (0.6, 8)
    eight = stocha_hf.convert(tmp_path / "b", tmp_path / "c", inputs_fallback_tokens=8)
    assert eight.stocha["inputs"] == after["inputs"] | {"fallback_tokens": 8}
    loaded = stocha_hf.load_model(str(tmp_path / "c"))
    assert (loaded.cutting.fallback, loaded.cutting.tokens) == (0.5, 8)
    one = stocha_hf.convert(tmp_path / "c", tmp_path / "f", inputs_fallback_tokens=1)
    off = stocha_hf.convert(tmp_path / "c", tmp_path / "g", inputs_fallback=0)
    assert (one.stocha["inputs"], off.stocha["inputs"]) == (after["inputs"], before["inputs"])
    assert_refused(
        call_command("stocha-convert", tmp_path / "source", tmp_path / "e", "--inputs-fallback", 0.5),
        "cuts no inputs",
        "expected a folder that does",
    )
    with pytest.raises(StochaError, match="takes cuts off: expected one of them"):
        stocha_hf.convert(tmp_path / "b", tmp_path / "e", inputs=0, inputs_fallback=0.5)


@pytest.mark.parametrize("wrong", [1, -0.1, "0.5", True])
def test_what_is_no_probability_is_refused(wrong: Any, tmp_path: Path) -> None:
    said = "expected a probability from 0 to below 1"
    with pytest.raises(ValueError, match=f"inputs.fallback is .*: {said}"):
        InputCuts({"q_proj": [0.1, 0.1]}, fallback=wrong)
    with pytest.raises(ValueError, match=f"fallback is .*: {said}"):
        cut_model().cut_inputs("decode", fallback=wrong).__enter__()
    with pytest.raises(StochaError, match=f"inputs_fallback is .*: {said}"):
        stocha_hf.convert(tmp_path, tmp_path / "out", inputs_fallback=wrong)


@pytest.mark.parametrize("wrong", [0, 9, 2.0, True])
def test_what_is_no_number_of_tokens_is_refused(wrong: Any, tmp_path: Path) -> None:
    said = "expected a whole number from 1 to 8"
    with pytest.raises(ValueError, match=f"inputs.fallback_tokens is .*: {said}"):
        InputCuts({"q_proj": [0.1, 0.1]}, fallback=0.5, fallback_tokens=wrong)
    with pytest.raises(ValueError, match="fallback_tokens is 8: expected none where there is no fallback"):
        InputCuts({"q_proj": [0.1, 0.1]}, fallback_tokens=8)
    with pytest.raises(ValueError, match=f"fallback_tokens is .*: {said}"):
        cut_model().cut_inputs("decode", fallback_tokens=wrong).__enter__()
    with pytest.raises(StochaError, match=f"inputs_fallback_tokens is .*: {said}"):
        stocha_hf.convert(tmp_path, tmp_path / "out", inputs_fallback_tokens=wrong)
