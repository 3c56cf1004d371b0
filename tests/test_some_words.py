"""KL over some words of the vocabulary: what it estimates, its gradients, which words are drawn, and runs with it."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import CONFIGS, first_is_fast, tiny_model
from helpers.training import SILU, losses, run
from test_loss import VOCAB, case
from torch._dynamo.testing import CompileCounterWithBackend

from stocha_hf.errors import StochaError
from stocha_hf.training.heads import open_head
from stocha_hf.training.losses import chunked_losses, token_losses, training_losses
from stocha_hf.training.some_words import SomeWords, Words, check_some_words, count_words

pytestmark = pytest.mark.usefixtures("one_thread")
COUNTS = torch.arange(VOCAB).flip(0)  # the first words are the most frequent
NONE = torch.full((1,), -100)
OPTIONS: dict[str, Any] = {"schedule": SILU, "distill_weight": 1.0, "distill_vocabulary": 20, "logging_steps": 1}


def gradients(loss: torch.Tensor, hidden: torch.Tensor, head: Any) -> list[torch.Tensor]:
    return [*torch.autograd.grad(loss, [hidden, *head.parameters()])]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_with_all_other_words_drawn_it_is_the_whole_kl(temperature: float, softcap: float | None, bias: bool) -> None:
    hidden, head, *others = case(bias=bias)
    options: dict[str, Any] = {"kl_weight": 1.0, "temperature": temperature, "softcap": softcap, "chunk": 7}
    whole = chunked_losses(hidden, head, *others, **options)
    words = SomeWords(COUNTS, 42, seed=0).of_step(3, others[-1])
    assert sorted(words.ids.tolist()) == [*range(VOCAB)] and not words.offsets.any()
    some = chunked_losses(hidden, head, *others, words=words, **options)
    torch.testing.assert_close((some.loss, some.nll, some.kl), (whole.loss, whole.nll, whole.kl))
    assert some.tokens == whole.tokens
    torch.testing.assert_close(gradients(some.loss, hidden, head), gradients(whole.loss, hidden, head))


@pytest.mark.parametrize("temperature", first_is_fast([1.0, 2.0]))
def test_draws_estimate_the_whole_kl_and_its_gradient(temperature: float) -> None:
    """The mean of 1,000 draws of 10 of 40 other words, and what the frequent words alone give."""
    torch.manual_seed(0)
    vocabulary, width = 80, 16
    head, teacher = (torch.nn.Linear(width, vocabulary, dtype=torch.float64) for _ in range(2))
    for part in (head, teacher):
        part.bias.data[:40] += 2.0  # frequent words are likely ones
    hidden = (2 * torch.randn(2, 9, width, dtype=torch.float64)).requires_grad_()
    taught = 2 * torch.randn(2, 9, width, dtype=torch.float64)
    labels = torch.randint(40, (2, 9))
    given = (hidden, head, taught, teacher, labels)
    options: dict[str, Any] = {"kl_weight": 1.0, "temperature": temperature}
    whole = chunked_losses(*given, **options)
    expected = gradients(whole.loss, hidden, head)
    words = SomeWords(torch.arange(vocabulary).flip(0), 40, seed=1)
    drawn, sums = [], [torch.zeros_like(grad) for grad in expected]
    for step in range(1000):
        losses = chunked_losses(*given, words=words.of_step(step, labels), **options)
        drawn.append(torch.stack([losses.kl, losses.nll]))
        for total, grad in zip(sums, gradients(losses.loss, hidden, head), strict=True):
            total += grad / 1000
    kl, nll = torch.stack(drawn).mean(0)
    frequent = Words(words.frequent, torch.zeros(40), words.of_step(0, labels).places)
    alone = chunked_losses(*given, words=frequent, **options)
    print(f"{whole.kl:.3f} {kl:.3f} {alone.kl:.3f} nll {whole.nll:.3f} {nll:.3f} {alone.nll:.3f}")
    assert kl == pytest.approx(whole.kl.item(), rel=0.02) and nll == pytest.approx(whole.nll.item(), rel=0.02)
    assert abs(kl - whole.kl) < abs(alone.kl - whole.kl) / 3 and abs(nll - whole.nll) < abs(alone.nll - whole.nll) / 10
    for mean, grad in zip(sums, expected, strict=True):
        assert (mean - grad).norm() < 0.05 * grad.norm()


def test_a_batchs_own_words_are_there_and_stand_for_themselves() -> None:
    words = SomeWords(COUNTS, 20, seed=0)
    labels = torch.tensor([[3, 48, 30, -100], [30, 48, 19, -100]])
    seen = set()
    for step in range(50):
        ids, offsets, places = words.of_step(step, labels)
        assert ids.unique().numel() == 25 and {*range(20), 30, 48} <= {*ids.tolist()}
        assert offsets[places[torch.tensor([0, 19, 30, 48])]].eq(0).all()
        assert offsets.exp().sum() == pytest.approx(VOCAB)  # they stand for all words
        assert offsets.max() == pytest.approx(math.log(28 / 3))
        assert torch.equal(ids[places[ids[:20]]], ids[:20]) and (places >= 0).sum() == 22
        seen |= {*ids.tolist()}
    assert seen == {*range(VOCAB)}


def test_a_single_other_word_stands_for_all_others() -> None:
    _, offsets, places = SomeWords(COUNTS, 3, seed=0).of_step(0, torch.tensor([[1, 30, 31]]))
    assert offsets.exp().sum() == pytest.approx(VOCAB) and (places >= 0).sum() == 3


def test_with_more_own_words_than_half_of_the_others_the_rest_counts_for_the_kl_alone() -> None:
    hidden, head, taught, teacher, labels = case()
    words = SomeWords(COUNTS, 20, seed=0).of_step(0, labels)
    assert words.offsets.count_nonzero() == 3 and words.offsets.exp().sum() == pytest.approx(VOCAB)
    assert torch.isin(words.ids[words.offsets == 0][20:], labels).all()
    losses = chunked_losses(hidden, head, taught, teacher, labels, kl_weight=1.0, words=words)
    shown = torch.isin(labels[:, 1:], words.ids[words.offsets == 0])
    logits = (head(hidden)[:, :-1][..., words.ids] + words.offsets)[shown]
    nll = torch.nn.functional.cross_entropy(logits, words.places[labels[:, 1:][shown]], reduction="sum")
    assert losses.tokens == (labels[:, 1:] != -100).sum() > shown.sum()
    torch.testing.assert_close(losses.nll / losses.tokens, nll.detach() / shown.sum())


def test_padding_has_no_part_in_it() -> None:
    hidden, head, taught, teacher, labels = case()
    words = SomeWords(COUNTS, 20, seed=0).of_step(0, labels)
    losses = chunked_losses(hidden, head, taught, teacher, labels, kl_weight=1.0, words=words)
    (grad,) = torch.autograd.grad(losses.loss, hidden)
    without = labels[:, 1:] == -100
    assert not grad[:, :-1][without].any() and not grad[:, -1].any() and grad[:, :-1][~without].any(-1).all()


def test_draws_follow_from_seed_and_step_alone() -> None:
    first, same, other = (SomeWords(COUNTS, 20, seed) for seed in (0, 0, 1))
    draws = [first.of_step(step, NONE).ids for step in (5, 6, 5)]
    assert torch.equal(draws[0], draws[2]) and torch.equal(draws[0], same.of_step(5, NONE).ids)
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], other.of_step(5, NONE).ids)


def test_words_are_counted_in_the_first_tokens() -> None:
    rows = Dataset.from_list([{"input_ids": [1, 2, 2]}, {"input_ids": [2, 3]}, {"input_ids": [3] * 9}])
    assert count_words(rows, 5, most=6).tolist() == [0, 1, 3, 2, 0]
    words = SomeWords(count_words(rows, 5, most=6), 3, seed=0)
    assert words.frequent.tolist() == [2, 3, 1] and words.share == 1


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@pytest.mark.parametrize("frozen", [False, True])
def test_model_losses_and_gradients(model_type: str, frozen: bool) -> None:
    """Of tied and of frozen heads, with Gemma's softcap, over all words in another order."""
    model, teacher = tiny_model(model_type), tiny_model(model_type)
    torch.manual_seed(0)
    for weight in (*model.parameters(), *teacher.parameters()):
        weight.data += 0.02 * torch.randn_like(weight)
    open_head(model)
    open_head(teacher)
    model.lm_head.weight.requires_grad_(not frozen)
    ids = torch.randint(3, 64, (2, 12))
    inputs = {"input_ids": ids, "labels": ids}
    found = []
    for words in (None, SomeWords(torch.zeros(64, dtype=torch.int64), 60, seed=0).of_step(0, ids)):
        model.zero_grad()
        losses = training_losses(model, teacher, inputs, kl_weight=1.0, chunk=7, words=words)
        losses.loss.backward()
        assert (model.lm_head.weight.grad is None) == frozen
        found.append([losses.kl, losses.nll, *(weight.grad for weight in model.parameters() if weight.requires_grad)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_one_compiled_graph_serves_all_steps(fresh_compiler: None) -> None:
    hidden, head, *others = case(torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(token_losses, backend=counter)
    words = SomeWords(COUNTS, 20, seed=0)
    for step in range(4):
        given = {"kl_weight": 1.0, "chunk": 11, "words": words.of_step(step, others[-1] if step else NONE)}
        expected = chunked_losses(hidden, head, *others, **given)
        losses = chunked_losses(hidden, head, *others, token_losses=compiled, **given)
        torch.testing.assert_close(losses.kl, expected.kl)
        torch.testing.assert_close(gradients(losses.loss, hidden, head), gradients(expected.loss, hidden, head))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_says_what_it_takes_trains_and_resumes(
    base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], streaming: bool
) -> None:
    teacher, out = tmp_path / "teacher", tmp_path / "out"
    run(base, text, teacher, schedule=SILU, max_steps=2, save_steps=2, learning_rate=3e-2)
    options = OPTIONS | {"teacher": teacher, "dataset_streaming": streaming}
    history = run(base, text, out, **options)
    said = re.search(
        r"the 20 most frequent words are (.*)% of the first (\d+) tokens; .* 5 of the 44 others",
        capsys.readouterr().out,
    )
    assert said and 20 < float(said[1]) <= 100 and int(said[2]) > 100
    [stage] = json.loads((out / "config.json").read_text())["stocha"]["history"]
    assert stage["distill_vocabulary"] == 20
    whole = run(base, text, tmp_path / "whole", **options | {"distill_vocabulary": None})
    assert losses(history) != losses(whole) and losses(history) == pytest.approx(losses(whole), rel=0.3)
    shutil.rmtree(out / "checkpoint-8")
    assert losses(run(base, text, out, **options)) == losses(history)


def test_what_makes_no_sense_is_refused_in_a_sentence(base: Path, text: Path, tmp_path: Path) -> None:
    for options, words in (
        ({"teacher": None}, "distill_vocabulary is 20, teacher None and distill_weight 1.0: expected a teacher"),
        ({"distill_weight": 0.5}, "distill_weight 0.5: .*the next-token loss needs all words"),
        ({"distill_vocabulary": 0}, "distill_vocabulary is 0: expected a number of at least 1"),
        ({"distill_vocabulary": 64}, "distill_vocabulary is 64 and the vocabulary has 64 words: expected fewer"),
    ):
        given = OPTIONS | {"teacher": base} | options
        with pytest.raises(StochaError, match=words):
            run(base, text, tmp_path / "none", **{key: value for key, value in given.items() if value is not None})
    assert not (tmp_path / "none").exists()


def test_a_head_with_an_adapter_is_refused() -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_model(tie_word_embeddings=False), peft.LoraConfig(target_modules=["lm_head"]))
    check_some_words(20, peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"])))
    with pytest.raises(StochaError, match=r"the lm_head is peft's Linear, .*: expected torch's Linear"):
        check_some_words(20, tiny_model(), adapted)
    assert all(type(tiny_model(kind).lm_head) is torch.nn.Linear for kind in CONFIGS)
