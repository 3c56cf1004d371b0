"""Training under input cuts with prompts that are computed in full: which positions are cut, and which have a loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import tiny_model, tiny_tokenizer
from helpers.training import SILU, arguments, run
from torch._dynamo.utils import counters
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from stocha_hf.cuts import PROJECTIONS, InputCuts
from stocha_hf.cuts_stocha import cut_projections, projections
from stocha_hf.errors import StochaError
from stocha_hf.modeling_stocha import StochaConfig
from stocha_hf.patching import patch
from stocha_hf.training.compiled_layers import compile_layers
from stocha_hf.training.padding import SEEN
from stocha_hf.training.run import train
from stocha_hf.training.uncut_prompts import CUT_AT, FIRST, WITH_DOUBTS, PromptCollator, prompts_uncut

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.arange(4, 36).view(4, 8)
KEYS = ("input_ids", "labels", CUT_AT, SEEN)
SOME = torch.arange(8) >= torch.tensor([[0], [3], [7], [8]])


def cut_model() -> Any:
    model = tiny_model()
    limits = {name: [0.3, 0.4] for name in PROJECTIONS}
    patch(model, StochaConfig(activation="silu", inputs=InputCuts(limits, train=True)))
    return model.train()


@pytest.mark.slow
def test_inputs_are_cut_where_the_batch_says_and_one_compiled_layer_serves_all_batches(fresh_compiler: None) -> None:
    model, native = cut_model(), tiny_model()
    everywhere = model(TOKENS, use_cache=False).logits
    for layer, limit in zip(projections(native), (0.3, 0.4), strict=True):
        for name in PROJECTIONS:
            layer[name].register_forward_pre_hook(
                lambda module, args, limit=limit: args[0] * ((args[0].abs() > limit) | ~SOME[..., None])
            )
    undo = compile_layers(model, backend="eager")
    counters.clear()
    with prompts_uncut(model) as prompts:
        for prompts.cut_at in (SOME, SOME.flip(0), SOME.clone()):
            found = model(TOKENS, use_cache=False).logits
        assert counters["stats"]["unique_graphs"] == 2  # thresholds as they are, and any thresholds
        prompts.cut_at = None
        assert torch.allclose(model(TOKENS, use_cache=False).logits, everywhere, atol=1e-5)
    undo()
    assert torch.allclose(found, native(TOKENS, use_cache=False).logits, rtol=1e-4, atol=1e-5)
    assert not any("prompts" in vars(module) for module in cut_projections(model))
    assert torch.equal(model(TOKENS, use_cache=False).logits, everywhere)


def collated(rows: list[Any]) -> dict[str, Any]:
    return {"input_ids": torch.stack(rows), "labels": torch.stack(rows)}


def test_a_share_of_texts_begins_uncut_and_has_no_loss_there() -> None:
    rows = list(torch.randint(4, 64, (400, 40), generator=torch.Generator().manual_seed(0)))
    batch = PromptCollator(collated, 0.7, 0)(rows)
    cut, begin = batch[CUT_AT], (~batch[CUT_AT]).sum(1)
    assert torch.equal(cut, torch.arange(40) >= begin[:, None]) and begin.min() == FIRST
    assert (begin > FIRST).float().mean().item() == pytest.approx(0.7, abs=0.07) and 25 < begin.max() < 30
    assert torch.equal(batch["labels"][:, 1:] != -100, cut[:, :-1])
    again = PromptCollator(collated, 0.7, 0)(rows[7:9])  # in another batch, as after a resumed start
    assert torch.equal(again[CUT_AT], cut[7:9])
    assert not torch.equal(PromptCollator(collated, 0.7, 1)(rows)[CUT_AT], cut)
    assert (PromptCollator(collated, 0.0, 0)(rows)[CUT_AT] == (torch.arange(40) >= FIRST)).all()


def test_a_share_of_rows_is_uncut_to_the_end_and_has_a_loss_all_over() -> None:
    rows = list(torch.randint(4, 64, (400, 40), generator=torch.Generator().manual_seed(0)))
    batch = PromptCollator(collated, 0.7, 0, whole=0.2)(rows)
    whole = ~batch[CUT_AT].any(1)
    assert whole.float().mean().item() == pytest.approx(0.2, abs=0.05)
    assert (batch["labels"][whole] == torch.stack(rows)[whole]).all()
    assert (batch["labels"][~whole][:, 1:FIRST] == -100).all()


def test_the_first_tokens_of_each_text_in_a_packed_row_are_uncut() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]])
    batch = {"input_ids": positions + 4, "labels": positions + 4, "position_ids": positions}
    assert torch.equal(PromptCollator(lambda rows: batch, 0.0, 0)([None])[CUT_AT], positions >= FIRST)


@pytest.mark.parametrize("strategy", ["padding_free", "bfd"])
def test_texts_that_are_packed_without_padding_draw_as_rows_of_their_own(strategy: str) -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(9, 40, (60,), generator=draw).tolist()
    texts = [torch.randint(4, 64, (size,), generator=draw).tolist() for size in sizes]
    labels = [[-100] * 4 * (i % 3) + text[4 * (i % 3) :] for i, text in enumerate(texts)]  # some have a prompt
    rows = [{"input_ids": ids, "labels": some} for ids, some in zip(texts, labels, strict=True)]
    shares = {"whole": 0.2, "doubts": 0.4}
    alone = [PromptCollator(DataCollatorForLanguageModeling(0), 0.6, 0, **shares)([row]) for row in rows]
    if strategy == "bfd":  # two rows, that are packed before
        both = [range(25), range(25, 60)]
        rows = [{key: [token for i in some for token in rows[i][key]] for key in rows[0]} for some in both]
        for row, some in zip(rows, both, strict=True):
            row["seq_lengths"] = [sizes[i] for i in some]
    packed = PromptCollator(DataCollatorForLanguageModeling(0, padding_free=True), 0.6, 0, **shares)(rows)
    assert packed["input_ids"].shape == (1, sum(sizes))
    for key in (CUT_AT, WITH_DOUBTS):
        assert torch.equal(packed[key], torch.cat([batch[key] for batch in alone], 1))
    expected = torch.cat([batch["labels"].index_fill(1, torch.tensor([0]), -100) for batch in alone], 1)
    assert torch.equal(packed["labels"], expected)  # the first token of a text is nobody's next one
    cut, doubts = packed[CUT_AT], packed[WITH_DOUBTS]
    assert 0.3 < cut.float().mean() < 0.7 and 0.2 < doubts.float().mean() < 0.6


def test_a_text_of_few_tokens_keeps_a_loss_only_where_it_is_taken_whole() -> None:
    short = {"input_ids": torch.tensor([[4, 5, 6, 7]]), "labels": torch.tensor([[4, 5, 6, 7]])}
    for whole, kept in ((0.0, [-100] * 3), (1.0, [5, 6, 7])):
        found = PromptCollator(lambda rows: short, 0.7, 0, whole)([None])
        assert found["labels"][0, 1:].tolist() == kept and not found[CUT_AT].any()


def test_an_answer_is_cut_and_its_prompt_is_not() -> None:
    labels = torch.tensor([[-100, -100, -100, -100, -100, 7, 8, 9, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 0, 0]])
    batch = {"input_ids": torch.arange(4, 14)[None], "labels": labels, "attention_mask": mask}
    found = PromptCollator(lambda rows: batch, 1.0, 0)([None])
    assert found[CUT_AT].tolist() == [[False] * 5 + [True] * 3 + [False] * 2]
    assert found["labels"].tolist() == [[-100] * 6 + [8, 9, -100, -100]]  # 7 follows from the prompt
    short = batch | {
        "labels": torch.where(mask.bool(), batch["input_ids"], -100).index_fill(1, torch.tensor([0]), -100)
    }
    found = [PromptCollator(lambda rows: short, 1.0, seed)([None])[CUT_AT].int().argmax() for seed in range(20)]
    assert len({int(at) for at in found}) > 1 and min(found) == FIRST  # a BOS alone is no prompt


def test_answers_among_texts_are_cut_and_have_a_loss_behind_their_prompts_alone(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data = tmp_path / "cutting", tmp_path / "answers.jsonl"
    cut_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    answers = {tuple(range(5, 10 + i)): (20 + i, 21, 2 if i % 2 else 40) for i in range(1, 17)}  # 2 is the EOS
    word = tiny_tokenizer().convert_ids_to_tokens
    with data.open("w") as file:
        for number, (prompt, answer) in enumerate(answers.items()):
            row = {"prompt": " ".join(word(prompt)), "completion": " ".join(word(answer)), "finished": answer[-1] == 2}
            file.write(json.dumps(row | {"tokens": 3, "id": str(number)}) + "\n")
    batches: list[Any] = []

    def seen(trainer: Any, **options: Any) -> None:
        batches.extend(trainer.get_train_dataloader())
        raise StochaError("seen")

    monkeypatch.setattr("stocha_hf.training.trainer.StochaTrainer.train", seen)
    words = arguments(folder, text, tmp_path / "out", schedule=SILU, packing=False, uncut_prompts=1.0, max_length=64)
    options = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    del options["dataset"], options["schedule"]
    recipe = {key: yaml.safe_load(value) for key, value in options.items()}
    phases = [{"activation": "silu", "until": 1.0}]
    with pytest.raises(StochaError, match="seen"):
        train(recipe | {"datasets": {str(data): 0.5, str(text): 0.5}, "schedule": phases})
    found, begins = set(), []
    for batch in batches:
        for ids, labels, at, real in zip(*(batch[key] for key in KEYS), strict=True):
            tokens = tuple(ids[: int(real.sum())].tolist())
            places = at.nonzero()[:, 0].tolist()
            assert places == list(range(places[0], len(tokens)))
            assert (labels[1:] != -100).nonzero()[:, 0].tolist() == places[:-1]
            if tokens[:-3] in answers:
                assert tokens[-3:] == answers[tokens[:-3]] and places[0] == len(tokens) - 3
                found.add(tokens[:-3])
            else:
                begins.append(places[0])
    assert found == set(answers) and len(begins) > 10 and len(set(begins)) > 5


def test_padding_is_not_cut_so_that_what_learns_by_counts_counts_tokens_alone() -> None:
    rows, mask = torch.arange(4, 24).view(2, 10), torch.arange(10) < torch.tensor([[7], [10]])
    batch = {"input_ids": rows, "labels": rows.masked_fill(~mask, -100), "attention_mask": mask.long()}
    found = PromptCollator(lambda rows: batch, 0.0, 0)([None])
    assert torch.equal(found[CUT_AT], mask & (torch.arange(10) >= FIRST))


@pytest.mark.slow
def test_a_run_trains_on_what_is_cut_and_refuses_a_model_without_cuts(base: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cutting"
    cut_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    options = {"schedule": SILU, "max_steps": 2, "save_steps": 2, "logging_steps": 1, "distill_weight": 1.0}
    history = run(folder, text, tmp_path / "some", teacher=base, uncut_prompts=1.0, **options)
    everywhere = run(folder, text, tmp_path / "all", teacher=base, **options)
    assert 0 < history[0]["kl"] == pytest.approx(history[0]["loss"], rel=1e-4) != everywhere[0]["kl"]
    stage = json.loads((tmp_path / "some" / "config.json").read_text())["stocha"]["history"][-1]
    assert stage["uncut_prompts"] == 1.0
    with pytest.raises(StochaError, match=r"uncut_prompts is 1\.0 and .*base computes all inputs in full"):
        run(base, text, tmp_path / "none", uncut_prompts=1.0, **options)
