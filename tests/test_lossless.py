"""Lossless decoding: the text is that of the model without cuts, whatever is drafted."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from transformers import DynamicCache, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from stocha_hf import InputCuts, StochaConfig
from stocha_hf.cuts import PROJECTIONS
from stocha_hf.decoding import rounds, step
from stocha_hf.decoding.copies import Copies
from stocha_hf.decoding.lossless import lossless
from stocha_hf.decoding.pace import PATIENCE, Pace, Times
from stocha_hf.errors import StochaError
from stocha_hf.patching import patch
from stocha_hf.quantization_stocha import Quantization, exchange
from stocha_hf.spec import ARCHITECTURES

PROMPT = torch.tensor([[5, 9, 13, 21, 34, 8, 55, 40, 11, 7]])
OPTIONS: dict[str, Any] = {"max_new_tokens": 60, "do_sample": False}
pytestmark = pytest.mark.usefixtures("one_thread")


def cut_model(model_type: str = "qwen2", bits: int | None = None, limit: float = 0.2, **overrides: Any) -> Any:
    model = tiny_model(model_type, max_position_embeddings=512, **overrides)
    cuts = InputCuts({name: [limit / 5 if name == "down_proj" else limit] * 2 for name in PROJECTIONS})
    patch(model, StochaConfig(activation=ARCHITECTURES[model_type].act, inputs=cuts))
    if bits:
        exchange(model, Quantization(bits=bits, transposed=PROJECTIONS), fill=True)
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of steps, negative where they cut. Drafts doubt nothing, for a tiny model is never sure."""
    monkeypatch.setattr(rounds, "DOUBT", 0.0)
    taken, run = [], step.run

    def counted(rows: Any, ids: torch.Tensor, *args: Any, cuts: bool | None = None, **kwargs: Any) -> Any:
        taken.append(-ids.shape[1] if cuts else ids.shape[1])
        return run(rows, ids, *args, cuts=cuts, **kwargs)

    monkeypatch.setattr(step, "run", counted)
    return taken


SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("model_type", "overrides"), [("qwen2", {}), ("gemma2", SLIDING), ("mistral", {"sliding_window": 6})]
)
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_the_text_is_that_without_cuts(model_type: str, overrides: Any, bits: Any, drafts: list[int]) -> None:
    model = cut_model(model_type, bits, **overrides)
    with model.cut_inputs("never"):
        expected = model.generate(PROMPT, **OPTIONS)
    drafts.clear()
    found = model.generate(PROMPT, custom_generate=lossless, **OPTIONS)
    assert torch.equal(found, expected)
    assert -1 in drafts and max(drafts) > 2, "drafted, and verified together"
    assert len(set(found[0].tolist())) > 5, "a text that only repeats would prove little"


def test_the_text_is_the_same_where_drafts_look_at_few_tokens(
    drafts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = cut_model(bits=4, limit=0.01)
    monkeypatch.setattr(rounds, "PART", model.config.vocab_size)  # at the first one, and what the text has had
    monkeypatch.setattr(rounds.Rounds, "copies_text", False)
    monkeypatch.setattr(rounds.Pace, "drafts", lambda self: 3)
    with model.cut_inputs("never"):
        expected = model.generate(PROMPT, **OPTIONS)
    text = expected[0].tolist()
    assert any(token not in (0, *text[:i]) for i, token in enumerate(text) if i >= PROMPT.shape[1])
    drafts.clear()
    with rounds.counting() as counts:
        assert torch.equal(model.generate(PROMPT, custom_generate=lossless, **OPTIONS), expected)
    assert 0 < counts.accepted < counts.drafted


@pytest.mark.parametrize("limit", [0.01, 1e9])  # drafts that are nearly all right, and that are nearly all wrong
@pytest.mark.parametrize("kind", [None, "static"])
def test_what_generate_promises_holds(kind: Any, limit: float) -> None:
    model = cut_model(limit=limit)
    stop = StoppingCriteriaList(
        [lambda ids, scores, **kwargs: torch.tensor([int(ids[0, -1]) == 3 * ids.shape[1] % 64])]
    )
    options = OPTIONS | {
        "return_dict_in_generate": True, "output_scores": True, "repetition_penalty": 1.2, "stopping_criteria": stop,
        "cache_implementation": kind, "disable_compile": True,
    }  # fmt: skip
    with model.cut_inputs("never"):
        expected = model.generate(PROMPT, **options)
    found = model.generate(PROMPT, custom_generate=lossless, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.scores, expected.scores, strict=True))
    length = found.past_key_values.get_seq_length()
    assert int(length) == int(expected.past_key_values.get_seq_length()) == found.sequences.shape[1] - 1
    for one, other in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert torch.equal(one.keys[:, :, :length], other.keys[:, :, :length])


def test_a_streamer_gets_the_prompt_and_each_token_and_is_told_the_end() -> None:
    got: list[Any] = []

    class Told(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            got.extend(value.flatten().tolist())

        def end(self) -> None:
            got.append("end")

    found = cut_model().generate(PROMPT, custom_generate=lossless, streamer=Told(), **OPTIONS)
    assert got == [*found[0].tolist(), "end"]


@pytest.mark.parametrize("raising", ["streamer", "processor"])
def test_what_raises_leaves_the_cache_as_without_drafts(raising: str, drafts: list[int]) -> None:
    class Failing(BaseStreamer):
        calls = 0

        def put(self, value: torch.Tensor) -> None:
            self.calls += 1
            if self.calls == 6:
                raise RuntimeError("failed")

        def end(self) -> None: ...

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == 13:  # the second round's first draft is the first to come here
            raise RuntimeError("failed")
        return scores

    def left(**how: Any) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        given = {"streamer": Failing()} if raising == "streamer" else {"logits_processor": [process]}
        with pytest.raises(RuntimeError, match="failed"):
            model.generate(PROMPT, past_key_values=cache, **given, **how, **OPTIONS)
        return cache

    model = cut_model()
    with model.cut_inputs("never"):
        expected = left()
    found = left(custom_generate=lossless)
    assert -1 in drafts
    length = found.get_seq_length()
    assert length == (14 if raising == "streamer" else PROMPT.shape[1] + 2) <= expected.get_seq_length()
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert torch.equal(one.keys, other.keys[:, :, :length])


def test_end_tokens_that_the_vocabulary_lacks_end_nothing(drafts: list[int]) -> None:
    model = cut_model()
    expected = model.generate(PROMPT, custom_generate=lossless, **OPTIONS)
    ends = [-1, model.config.vocab_size, 10**9]
    found = model.generate(PROMPT, custom_generate=lossless, eos_token_id=ends, pad_token_id=0, **OPTIONS)
    assert torch.equal(found, expected) and -1 in drafts


@pytest.mark.parametrize(("padding", "window"), [(1, 13), (3, 11), (3, 16)])
def test_padding_and_a_window_that_fills_up(padding: int, window: int, drafts: list[int]) -> None:
    model = cut_model("mistral", sliding_window=window)
    mask = (torch.arange(PROMPT.shape[1]) >= padding).long()[None]
    with model.cut_inputs("never"):
        expected = model.generate(PROMPT, attention_mask=mask, **OPTIONS)
    found = model.generate(PROMPT, attention_mask=mask, custom_generate=lossless, **OPTIONS)
    assert torch.equal(found, expected)


def test_answers_to_tasks_are_those_without_cuts_and_what_they_took_is_counted(
    drafts: list[int], tmp_path: Path
) -> None:
    from lm_eval.api.instance import Instance

    from stocha_hf.tasks.harness import HarnessModel
    from stocha_hf.tasks.kept import Kept

    model, tokenizer = cut_model(limit=0.05), tiny_tokenizer()
    requests = [Instance("generate_until", {}, (f"w5 w{i}", {"max_gen_toks": 24}), 0, ("t", i, 1)) for i in (7, 8, 9)]
    with model.cut_inputs("never"):
        written = HarnessModel(model, tokenizer, Kept(), "uncut").generate_until(requests)
    word = written[0].split()[9]
    model.generation_config.repetition_penalty = 1.5  # some models on the Hub have one; tasks ignore it
    ended = Instance("generate_until", {}, ("w5 w7", {"max_gen_toks": 24, "until": [word]}), 0, ("t", 0, 1))
    drafts.clear()
    lm = HarnessModel(model, tokenizer, Kept(tmp_path / "kept.jsonl"), "drafted", lossless=True)
    assert lm.generate_until([*requests, ended]) == [*written, written[0][: written[0].index(word)]]
    found = lm.reading("t")
    steps, drafted, checks = (getattr(found.drafts, key) for key in ("steps", "drafted", "verifications"))
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").open()]
    assert steps == found.steps == sum(row["steps"] for row in kept) and 3 * 23 < steps < 4 * 23
    assert drafted == drafts.count(-1) and checks == sum(size > 0 for size in drafts), "no more, and no fewer"
    assert 0 < found.drafts.accepted <= drafted and found.drafts.accepted + checks >= steps
    share = (drafted * found.drafts.cut_share + checks) / steps
    assert found.bytes_read.share == pytest.approx(share, rel=1e-3) and 0 < found.drafts.cut_share < 1
    drafts.clear()
    again = HarnessModel(model, tokenizer, Kept(tmp_path / "kept.jsonl"), "drafted", lossless=True)
    assert again.generate_until(requests) == written and not drafts, "kept answers are not written again"


def test_answers_of_a_model_without_cuts_come_from_copies() -> None:
    from lm_eval.api.instance import Instance

    from stocha_hf.measurement.evaluation_text import _draft_lines
    from stocha_hf.publishing.tables import _readings
    from stocha_hf.tasks.harness import HarnessModel
    from stocha_hf.tasks.kept import Kept

    model = tiny_model(max_position_embeddings=512).eval()
    patch(model, StochaConfig(activation="silu"))
    request = Instance("generate_until", {}, ("w40 w50 w60", {"max_gen_toks": 100}), 0, ("t", 0, 1))
    expected = HarnessModel(model, tiny_tokenizer(), Kept(), "plain").generate_until([request])
    lm = HarnessModel(model, tiny_tokenizer(), Kept(), "drafted", lossless=True)
    assert lm.generate_until([request]) == expected
    found = lm.reading("t")
    assert found.drafts.drafted == 0 < found.drafts.accepted <= found.drafts.copied
    share = found.drafts.verifications / found.steps  # how many depends on how long each takes; bytes are whole
    assert abs(found.bytes_read.share - share) <= 0.51 / found.bytes_read.dense_blocks and found.steps == 99
    told = found.to_dict()
    assert f"99 tokens: {found.drafts.copied} copied from the text, and" in next(_draft_lines(told))
    assert "what stood in the text before was drafted" in next(_readings({"task_bytes": [told]}))


def test_a_task_that_samples_is_refused_when_lossless() -> None:
    from lm_eval.api.instance import Instance

    from stocha_hf.tasks.harness import HarnessModel
    from stocha_hf.tasks.kept import Kept

    lm = HarnessModel(cut_model(), tiny_tokenizer(), Kept(), "drafted", lossless=True)
    sampled = Instance("generate_until", {}, ("w5 w7", {"do_sample": True, "temperature": 0.8}), 0, ("t", 0, 1))
    with pytest.raises(StochaError, match=r"temperature 0\.8: expected one whose answers are the most likely"):
        lm.generate_until([sampled])


def test_a_speedup_is_of_texts_with_more_than_a_token() -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "lossless.py"
    speedup = runpy.run_path(str(script))["speedup"]
    before, after = ([{"seconds": value} for value in values] for values in ((0.0, 3.0, 4.0), (0.0, 1.0, 0.0)))
    assert speedup(before, after) == 3 and speedup(before[:1], after[:1]) is None


def test_a_repetition_is_eight_tokens_that_stood_before() -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "lossless.py"
    repeated = runpy.run_path(str(script))["repeated"]
    once = list(range(10))
    assert repeated(once, [20, 21]) == 0 and repeated([], once) == 0
    assert repeated(once, once) == 3  # the eighth token of the second time and those after it
    assert repeated([], [5] * 12) == 4 and repeated(once + once, [20]) == 0  # a prompt's own do not count


def test_steps_that_must_call_modules_are_without_drafts(drafts: list[int]) -> None:
    model = cut_model()
    with model.cut_inputs("never"):
        expected = model.generate(PROMPT, **OPTIONS)
    drafts.clear()
    model.model.layers[0].mlp.register_forward_hook(lambda *args: None)
    assert torch.equal(model.generate(PROMPT, custom_generate=lossless, **OPTIONS), expected) and not drafts


@pytest.mark.parametrize("bits", [None, 4])
def test_a_model_without_cuts_drafts_what_its_text_repeats(bits: int | None, drafts: list[int]) -> None:
    model = tiny_model(max_position_embeddings=512)
    patch(model, StochaConfig(activation="relu"))
    if bits:
        exchange(model, Quantization(bits=bits), fill=True)
    options = OPTIONS | {"max_new_tokens": 200, "eos_token_id": None}
    expected = model.eval().generate(PROMPT, **options)
    drafts.clear()
    assert torch.equal(model.generate(PROMPT, custom_generate=lossless, **options), expected)
    assert max(drafts) > 2 and min(drafts) > 0


def test_a_native_model_writes_its_text() -> None:
    model = tiny_model()
    expected = model.generate(PROMPT, **OPTIONS)
    assert torch.equal(model.generate(PROMPT, custom_generate=lossless, **OPTIONS), expected)


def test_what_it_cannot_do_is_refused() -> None:
    model = cut_model()
    for wrong in ({"do_sample": True}, {"num_beams": 2}):
        with pytest.raises(StochaError, match="expected one sequence, one beam and do_sample=False"):
            model.generate(PROMPT, custom_generate=lossless, **OPTIONS | wrong)


def test_more_is_drafted_where_more_is_accepted_and_nothing_where_it_costs_more() -> None:
    def settled(acceptance: int, draft: float, token: float, doubts: bool = False) -> int:
        """Drafts after many rounds in which so many in ten are right, and a wrong one is doubted or not; a
        verification takes 1 + token * tokens.
        """
        pace = Pace(8)
        for i in range(200):
            count = pace.drafts()
            right = 0
            while right < count and (i * 7 + right * 3) % 10 < acceptance:
                right += 1
            is_doubted = doubts and right < count
            count = right + 1 if is_doubted else count
            if count:
                pace.drafted(count, is_doubted, draft * count)
            pace.verified(count, right, is_doubted, 1 + token * (count + 1))
        return pace.drafts()

    assert settled(10, 0.3, 0.05) == 7
    assert 1 <= settled(7, 0.3, 0.05) < 7 == settled(7, 0.3, 0.05, doubts=True)
    assert settled(3, 1.0, 1.0) == 0


def test_what_stood_in_the_text_before_is_drafted() -> None:
    assert Copies([1, 2, 3, 4, 9, 7, 1, 2, 3, 4]).drafts(3) == [9, 7, 1]
    assert Copies([1, 2, 3, 4, 9, 1, 2, 3, 4, 8, 1, 2, 3, 4]).drafts(1) == [8], "the last time counts"
    assert Copies([1, 2, 3, 4, 9, 2, 3, 4]).drafts(3) == [] == Copies([1]).drafts(3) == Copies([5] * 9).drafts(0)
    assert Copies([6, 5, 5, 5, 5, 5]).drafts(4) == [5] * 4, "a loop goes on"
    text = Copies([1, 2, 3, 4])
    text.read([9, 1, 2])
    text.read([3, 4])
    assert text.drafts(2) == [9, 1]


@pytest.mark.parametrize("kind", [None, "static"])
@pytest.mark.parametrize("wrong", [0, 17])
def test_a_text_that_repeats_is_copied_without_steps(
    kind: Any, wrong: int, drafts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Repeats the last ten tokens, but for one of `wrong`."""
        length = ids.shape[1]
        token = length % 64 if wrong and length % wrong == 0 else int(ids[0, -10])
        return torch.full_like(scores, -1e9).index_fill_(1, torch.tensor([token]), 1.0)

    monkeypatch.setattr(rounds.Pace, "drafts", lambda self: self.most)  # whatever it takes
    model = cut_model()
    options = OPTIONS | {"logits_processor": [process], "cache_implementation": kind, "disable_compile": True}
    with model.cut_inputs("never"):
        expected = model.generate(PROMPT, **options)
    drafts.clear()
    with rounds.counting() as counts:
        found = model.generate(PROMPT, custom_generate=lossless, **options)
    assert torch.equal(found, expected)
    assert counts.drafted == drafts.count(-1) and counts.verifications == sum(size > 0 for size in drafts)
    assert 59 <= counts.verifications + counts.accepted <= counts.verifications + counts.drafted + counts.copied
    assert counts.copied > 20 and max(drafts) == 8
    if not wrong:
        assert counts.drafted <= 8 and counts.accepted > 45, "once the text repeats itself, each copy is right"


def test_copies_that_are_wrong_cease_and_are_tried_again() -> None:
    times = Times()
    for tokens in (1, 2, 4, 8):
        times.add(tokens, float(tokens))
    pace = Pace(8, times)
    for _ in range(9):
        count = pace.drafts()
        if count:
            pace.verified(count, 0, False, count + 1)
    assert pace.drafts() == 0
    for _ in range(PATIENCE):
        pace.passed()
    assert pace.drafts() == 1


def test_a_draft_ends_after_a_token_that_it_doubts(drafts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes(doubt: float) -> set[int]:
        """Of verifications, where drafts doubt what is less probable."""
        monkeypatch.setattr(rounds, "DOUBT", doubt)
        drafts.clear()
        found = model.generate(PROMPT, custom_generate=lossless, **OPTIONS)
        assert torch.equal(found, expected)
        return {size for size in drafts if size > 0}

    monkeypatch.setattr(rounds.Rounds, "copies_text", False)
    model = cut_model(limit=0.01)
    with model.cut_inputs("never"):
        expected = model.generate(PROMPT, **OPTIONS)
    assert max(sizes(0.0)) > 2
    assert sizes(1.1) <= {1, 2}
